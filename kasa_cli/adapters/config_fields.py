"""What a field of a stranger's config must be: rows for the tables of fields.

A field that changes the maths and is not understood must stop the run: PEFT warns and goes on. So every field has a
row: any value for what only training needs, a type for what is used, a reason for what cannot be merged once set.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kasa_cli.errors import InvalidInput
from kasa_cli.files.untrusted import MAX_CONFIG_DEPTH, depth_exceeds, enumerated, quote

MAX_COUNT = 1 << 31


class Field(NamedTuple):
    """What a value must be; `expects` says it in an error."""

    holds: Callable[[Any], bool]
    expects: str


def is_absent(value: Any) -> bool:
    """Null, false or empty: the same as not being there. 0 is a number and says something."""
    return value is None or value is False or value in ("", [], {})


def is_count(value: Any) -> bool:
    """A whole number above 0. `true` is none."""
    return type(value) is int and 0 < value < MAX_COUNT


def is_number(value: Any) -> bool:
    """A finite number that float64 can hold. `true` is none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def are_names(value: Any) -> bool:
    """Nothing, a regular expression (never matched here), or a list of names."""
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(name, str) for name in value))
    )


def map_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for a JSON object, or nothing, whose values hold."""
    return lambda value: value is None or (isinstance(value, dict) and all(map(holds, value.values())))


def unset(reason: str) -> Field:
    """A row for what cannot be merged once it is set."""
    return Field(is_absent, f"must be unset: {reason}")


def one_of(*values: Any) -> Field:
    """A row for one of a few values, each of its own type: 1 is not `true`."""
    known = {(type(value), value) for value in values}
    listed = ", ".join(str(value) for value in values)
    return Field(
        lambda value: isinstance(value, str | bool) and (type(value), value) in known,
        f"must be one of {listed}",
    )


ANY = Field(lambda _: True, "anything")
FLAG = Field(lambda value: value is None or isinstance(value, bool), "must be true or false")
COUNT = Field(is_count, "must be a whole number above 0")
NUMBER = Field(is_number, "must be a finite number")
NAMES = Field(are_names, "must be a string or a list of strings")
LIST = Field(
    lambda value: value is None or (isinstance(value, list) and are_names(value)), "must be a list of strings"
)
RANKS = Field(map_of(is_count), "must map patterns to whole numbers above 0")
ALPHAS = Field(map_of(is_number), "must map patterns to finite numbers")
BIAS = Field(
    lambda value: isinstance(value, str) and (value in ("none", "all") or value.endswith("_only")),
    "must be none, all or …_only",
)
VERSION = Field(
    lambda value: (
        value is None or (isinstance(value, str) and re.match(r"\d{1,4}\.\d{1,4}", value) is not None)
    ),
    "must be a version",
)
SAVED = Field(lambda value: value is True, "must be true: PEFT's random projections are not drawn again")
LABEL = Field(lambda value: value is None or isinstance(value, str), "must be a string")


def rows(field: Field, names: str) -> dict[str, Field]:
    """The same row for several names."""
    return dict.fromkeys(names.split(), field)


LAYERS = Field(
    lambda value: (
        value is None or all(type(one) is int for one in (value if isinstance(value, list) else [value]))
    ),
    "must be a number or a list of numbers",
)
KASA = Field(map_of(is_number), "must map beta and gamma to numbers")
INDICES = Field(
    lambda value: value is None or isinstance(value, list | dict), "must be a list, or map layers to lists"
)


def check_object(config: Any, path: Path) -> None:
    """Refuse what is no JSON object, or a bottomless one."""
    if not isinstance(config, dict):
        raise InvalidInput("not a JSON object", str(path))
    if depth_exceeds(config, MAX_CONFIG_DEPTH):
        raise InvalidInput("JSON nested too deep", str(path))


def check_fields(config: Mapping[str, Any], fields: Mapping[str, Field], path: Path) -> None:
    """Refuse a field that nobody knows, and a value that does not fit its field."""
    unknown = [quote(name) for name, value in config.items() if name not in fields and not is_absent(value)]
    if unknown:
        what = f"unknown fields that may change the result: {enumerated(unknown, 3)}"
        raise InvalidInput(what, str(path), "use a newer kasa, or remove them if they mean nothing")
    for name, value in config.items():
        if name in fields and not fields[name].holds(value):
            raise InvalidInput(f"{name} is {quote(str(value))}: {fields[name].expects}", str(path))
