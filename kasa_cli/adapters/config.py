"""Reads `adapter_config.json` within limits; every field must be known and of its type. No path in it is opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kasa_cli.adapters.peft import CONFIG
from kasa_cli.errors import InvalidInput, UnsafeInput
from kasa_cli.files import (
    MAX_CONFIG,
    MAX_CONFIG_DEPTH,
    depth_exceeds,
    enumerated,
    parse_json,
    quote,
    read_small,
)
from kasa_cli.methods.adapter_kinds import (
    PEFT_TYPES,
    REFUSED,
    ConfigType,
    Field,
    Initialisation,
    Kind,
    initialisation_of,
    is_absent,
)

Config = Mapping[str, Any]


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config as plain data, bounded and checked field by field."""
    path = folder / CONFIG
    config = parse_json(read_small(path, MAX_CONFIG), path)
    check_object(config, path)
    kinds_of(config, path)
    check_label(config, path)
    return dict(config)


def check_object(config: Any, path: Path) -> None:
    """Refuse anything but a JSON object, and one nested too deep."""
    if not isinstance(config, dict):
        raise InvalidInput("not a JSON object", str(path))
    if depth_exceeds(config, MAX_CONFIG_DEPTH):
        raise InvalidInput("JSON nested too deep", str(path))


def check_label(config: Config, path: Path) -> None:
    """Refuse a base's name with control characters: the name is never opened, but it is shown in the terminal."""
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and name and not name.isprintable():
        raise UnsafeInput(f"base_model_name_or_path {quote(name)} is not printable", str(path))


def kinds_of(config: Config, path: Path) -> tuple[Kind, ...]:
    """The kinds of adapters that have configs of this type, the config checked.

    Raises:
        InvalidInput: the type cannot be merged, or a field is unknown, missing or invalid.
    """
    name = str(config.get("peft_type"))
    if name not in PEFT_TYPES:
        why = REFUSED.get(name, "kasa does not know how to merge it")
        raise InvalidInput(f"peft_type {quote(name)}: {why}", str(path))
    check_fields(config, PEFT_TYPES[name][0].config, path)
    return PEFT_TYPES[name]


def check_fields(config: Config, config_type: ConfigType, path: Path) -> None:
    """Refuse an unknown field, a value that does not fit its field, and a config without a required field.

    Raises:
        InvalidInput: naming the field.
    """
    check_values(config, config_type.fields, path)
    missing = [field for field in config_type.needed if config.get(field) is None]
    if missing:
        raise InvalidInput(f"{enumerated(missing)} is missing", str(path))


def check_values(config: Config, fields: Mapping[str, Field], path: Path) -> None:
    """Refuse an unknown field, and a value that does not fit its field."""
    unknown = [quote(name) for name, value in config.items() if name not in fields and not is_absent(value)]
    if unknown:
        problem = f"unknown fields that may change the result: {enumerated(unknown, 3)}"
        raise InvalidInput(problem, str(path), "use a newer kasa, or remove them if they have no effect")
    for name, value in config.items():
        if name in fields and not fields[name].holds(value):
            raise InvalidInput(f"{name} is {quote(str(value))}: {fields[name].expects}", str(path))


def kind_of(config: Config, path: Path) -> Kind:
    """The kind of adapter that a config describes.

    Raises:
        InvalidInput: the config is invalid, or describes several kinds at once.
    """
    kinds = kinds_of(config, path)
    named = [kind for kind in kinds if kind.is_named(config)]
    if len(named) > 1:
        names = " and ".join(kind.name for kind in named)
        raise InvalidInput(f"{names} at once: PEFT has no such adapter", str(path))
    if named:
        return named[0]
    name = initialisation(config, kinds[0], path).kind
    return next((kind for kind in kinds if kind.name == name), kinds[0])


def initialisation(config: Config, kind: Kind, path: Path) -> Initialisation:
    """How PEFT initialised an adapter of this kind.

    Raises:
        InvalidInput: `init_lora_weights` has an unknown value.
    """
    if not kind.config.initialisations:
        return Initialisation("")
    known = initialisation_of(config)
    if known is None:
        init = quote(str(config.get("init_lora_weights", True)).lower())
        raise InvalidInput(f"init_lora_weights {init} is not known", str(path))
    return known
