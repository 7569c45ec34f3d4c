"""An `adapter_config.json`: read within bounds, every field known and of its type. Nothing in it is followed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kasa_cli.adapters.config_fields import check_fields, check_object
from kasa_cli.adapters.peft import CONFIG
from kasa_cli.adapters.peft_types import METHODS, PROMPTS, Method
from kasa_cli.errors import InvalidInput, UnsafeInput
from kasa_cli.files.untrusted import MAX_CONFIG, enumerated, parse_json, quote, read_small

Config = Mapping[str, Any]


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config as plain data, bounded and checked field by field."""
    path = folder / CONFIG
    config = parse_json(read_small(path, MAX_CONFIG), path)
    check_object(config, path)
    method_of(config, path)
    check_label(config, path)
    return dict(config)


def check_label(config: Config, path: Path) -> None:
    """The base's name is never followed; but it is shown, and must not talk to the terminal."""
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and name and not name.isprintable():
        raise UnsafeInput(f"base_model_name_or_path {quote(name)} is not printable", str(path))


def method_of(config: Config, path: Path) -> Method:
    """The row of an adapter's type.

    Raises:
        InvalidInput: a type that cannot be merged, or a field that is not understood.
    """
    name = str(config.get("peft_type"))
    method = METHODS.get(name)
    if method is None:
        why = (
            "it adds to the input, not to the weights"
            if name in PROMPTS
            else "kasa does not know how to merge it"
        )
        raise InvalidInput(f"peft_type {quote(name)}: {why}", str(path))
    check_fields(config, method.fields, path)
    missing = [field for field in method.needs if config.get(field) is None]
    if missing:
        raise InvalidInput(f"{enumerated(missing)} is missing", str(path))
    return method
