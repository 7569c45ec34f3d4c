"""Presets: options from a YAML file, under the names of the command line. Flags override them.

A value is taken as text, as if it were typed: `8.5` is not a rank, and `1e-4` is a number, although YAML 1.1 reads
it as a string.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from kasa_cli.errors import InvalidInput, ResourceError, UsageError

MAX_PRESET = 1_000_000
NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Option:
    """An option of a verb: its parameter, and whether it may be repeated."""

    parameter: str
    is_repeatable: bool


def load(path: Path, known: Mapping[str, Option]) -> dict[str, str | list[str]]:
    """The options of a preset by parameter, without those that are null.

    `known` has the options of the verb by name, with underscores. A list becomes several values, or one value joined
    by commas.

    Raises:
        UsageError: no such file, an option that the verb does not have, or one given twice.
        InvalidInput: not YAML, or not a map of options.
    """
    options: dict[str, str | list[str]] = {}
    parameters: set[str] = set()
    for key, value in _pairs(path):
        where = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InvalidInput("not the name of an option", where)
        option = _known(key.value, known, where)
        if option.parameter in parameters:
            raise UsageError(f"option {key.value!r} twice in a preset", where, "keep one")
        parameters.add(option.parameter)
        values = _values(value, where)
        if value.tag != NULL:
            options[option.parameter] = values if option.is_repeatable else ",".join(values)
    return options


def _pairs(path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    try:
        if not path.is_file():
            raise UsageError("no such preset", str(path), "configs/ of kasa's repository holds some")
        if path.stat().st_size > MAX_PRESET:
            raise InvalidInput("too large for a preset", str(path))
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ResourceError(f"cannot read ({error.strerror})", str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"not YAML ({str(error).splitlines()[0]})", str(path)) from error
    except RecursionError as error:
        raise InvalidInput("YAML nested too deep", str(path)) from error
    if not isinstance(root, yaml.MappingNode):
        raise InvalidInput("not a map of options", str(path))
    return list(root.value)


def _values(value: yaml.Node, where: str) -> list[str]:
    items = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise InvalidInput("neither a value nor a list of values", where)
    return [item.value for item in items]


def _known(key: str, known: Mapping[str, Option], where: str) -> Option:
    name = key.replace("-", "_")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        raise UsageError(f"unknown option {key!r} in a preset", where, hint)
    return known[name]
