"""Patterns over module names, as the user gives them."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.files import parse_json, read_small

MAX_TARGETS_FILE = 100_000_000


@dataclass(frozen=True)
class Patterns:
    """Globs over full module names, or bare suffixes. Without targets the default applies."""

    targets: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()


def patterns(
    targets: Iterable[str] | None, excludes: Iterable[str] | None, from_file: Path | None = None
) -> Patterns:
    """Patterns, and the names of a file that `kasa select-targets` wrote.

    Raises:
        InvalidInput: the file is not of that form.
    """
    named = targets_from(from_file) if from_file else ()
    return Patterns((*(targets or ()), *named), tuple(excludes or ()))


def matches(module: str, pattern: str) -> bool:
    """A glob over the full name, or the name itself or its end.

    >>> [matches("model.layers.0.mlp.up_proj", p) for p in ("up_proj", "model.layers.*.mlp.*", "proj", "mlp.*")]
    [True, True, False, False]
    """
    return fnmatchcase(module, pattern) or module == pattern or module.endswith(f".{pattern}")


def targets_from(path: Path) -> tuple[str, ...]:
    """The `target_modules` of a file that `kasa select-targets` wrote.

    Raises:
        InvalidInput: not JSON, or not of that form.
    """
    chosen = parse_json(read_small(path, MAX_TARGETS_FILE), path)
    modules = chosen.get("target_modules") if isinstance(chosen, dict) else None
    if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
        raise InvalidInput(
            "no list target_modules in it", str(path), "give the JSON of `kasa select-targets`"
        )
    return tuple(modules)


def require_match(pattern: str, modules: Iterable[str]) -> None:
    """Refuse a pattern that matches no module; the error lists near names."""
    known = list(modules)
    if any(matches(module, pattern) for module in known):
        return
    near = _near(pattern, known)
    remedy = f"near names: {', '.join(near)}" if near else "list the names with --dry-run"
    raise UsageError("the pattern matches no module", pattern, remedy)


def _near(pattern: str, modules: list[str]) -> list[str]:
    """Names and ends of names that are similar to the pattern."""
    ends = {".".join(module.split(".")[-depth:]): None for depth in (1, 2) for module in modules}
    return difflib.get_close_matches(pattern, [*ends, *modules], n=4, cutoff=0.5)
