"""Presets: options from a YAML file, by the names they have on the command line. Flags win over them."""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from kasa_cli.errors import InvalidInput, UsageError

MAX_PRESET = 1_000_000


def load(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options of a preset, by parameter name.

    Raises:
        UsageError: no such file, or an option that the verb does not have.
        InvalidInput: not YAML, or not a map.
    """
    if not path.is_file():
        raise UsageError("no such preset", str(path))
    if path.stat().st_size > MAX_PRESET:
        raise InvalidInput("too large for a preset", str(path))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"not YAML ({str(error).splitlines()[0]})", str(path)) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidInput("not a map of options", str(path))
    return {_known(key, known, path): value for key, value in content.items()}


def _known(key: str, known: Collection[str], path: Path) -> str:
    name = key.replace("-", "_")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        raise UsageError(f"unknown option {key!r} in a preset", str(path), hint)
    return name
