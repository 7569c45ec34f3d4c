"""Frozen dataclasses from JSON, with the type of every value checked, and back.

A field with the metadata INLINE holds a dataclass whose fields stand in the same JSON object, or None where its first
field is absent. A field with the metadata OPTIONAL is left out of the JSON where it is None or an
empty map.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache, partial
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Value = TypeVar("Value")

INLINE = {"inline": True}
OPTIONAL = {"optional": True}
SCALARS: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (float, int), bool: (bool,)}


class Malformed(ValueError):
    """A value of another type than its field, or a missing field; `path` leads to it."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.path, self.problem = path, problem


def from_json(kind: type[Value], value: object) -> Value:
    """A dataclass from parsed JSON. Unknown fields are ignored: a later version may write more.

    Raises:
        Malformed: a field is missing, or of another type.
    """
    read: Callable[[object], Value] = _reader(kind)  # type: ignore[arg-type]
    return read(value)


def to_json(value: object) -> Any:
    """Dicts, lists and scalars. JSON has no infinity: a float that is not finite becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            key: item for field in fields(value) for key, item in _items(field, getattr(value, field.name))
        }
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inner(kind: Any) -> Any:
    """The type X of `X | None`, else the type itself."""
    others = [argument for argument in get_args(kind) if argument is not NoneType]
    return others[0] if NoneType in get_args(kind) and len(others) == 1 else kind


def _items(field: "Field[Any]", value: Any) -> list[tuple[str, Any]]:
    if value is None and field.metadata.get("inline"):
        return []
    if value in (None, {}) and field.metadata.get("optional"):
        return []
    data = to_json(value)
    return [*data.items()] if field.metadata.get("inline") else [(field.name, data)]


@cache
def _reader(kind: Any) -> Callable[[object], Any]:
    """The function that checks and converts values of a type."""
    if isinstance(kind, type) and is_dataclass(kind):
        return partial(_read_object, kind, get_type_hints(kind))
    origin, arguments = get_origin(kind), get_args(kind)
    if NoneType in arguments:
        some = _reader(inner(kind))
        return lambda value: None if value is None else some(value)
    if origin is tuple and arguments[-1] is Ellipsis:
        return partial(_read_list, _reader(arguments[0]))
    if origin is tuple:
        return partial(_read_tuple, tuple(map(_reader, arguments)))
    if origin is not None:
        return partial(_read_map, _reader(arguments[1]))
    return partial(_read_scalar, kind)


def _read_object(kind: type[Any], hints: Mapping[str, Any], value: object) -> Any:
    if not isinstance(value, dict):
        raise Malformed("", "is not an object")
    return kind(**{field.name: _read_field(field, hints[field.name], value) for field in fields(kind)})


def _read_field(field: "Field[Any]", kind: Any, values: dict[str, Any]) -> Any:
    if field.metadata.get("inline"):
        is_there = inner(kind) is kind or first_key(inner(kind)) in values
        return _reader(inner(kind))(values) if is_there else None
    if field.name not in values:
        return _default(field)
    return _below(field.name, _reader(kind), values[field.name])


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    if field.default is MISSING:
        raise Malformed(field.name, "is missing")
    return field.default


def first_key(kind: Any) -> str:
    """The JSON key of the first field of a dataclass, which says whether an inline one is there."""
    return fields(kind)[0].name


def _read_list(read: Callable[[object], Any], value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise Malformed("", "is not a list")
    return tuple(_below(str(index), read, item) for index, item in enumerate(value))


def _read_tuple(readers: tuple[Callable[[object], Any], ...], value: object) -> tuple[Any, ...]:
    if not isinstance(value, list) or len(value) != len(readers):
        raise Malformed("", f"is not a list of {len(readers)}")
    pairs = enumerate(zip(readers, value, strict=True))
    return tuple(_below(str(index), read, item) for index, (read, item) in pairs)


def _read_map(read: Callable[[object], Any], value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed("", "is not an object")
    return {key: _below(key, read, item) for key, item in value.items()}


def _read_scalar(kind: Any, value: object) -> Any:
    if kind is float and value is None:
        return math.inf
    if not isinstance(value, SCALARS[kind]) or (isinstance(value, bool) and kind is not bool):
        raise Malformed("", f"is no {kind.__name__}")
    return value


def _below(name: str, read: Callable[[object], Any], value: object) -> Any:
    try:
        return read(value)
    except Malformed as error:
        raise Malformed(f"{name}.{error.path}".removesuffix("."), error.problem) from None
