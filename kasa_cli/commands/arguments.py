"""Arguments that the verbs share, as the types that the pipeline takes."""

import os
from collections.abc import Iterable
from pathlib import Path

from kasa_cli.pipeline import ModelLocation
from kasa_cli.targets import Patterns, patterns

PathLike = str | os.PathLike[str]
"""A path as text or as any path object."""


def path(value: PathLike) -> Path:
    """A path object."""
    return Path(os.fspath(value))


def optional_path(value: PathLike | None) -> Path | None:
    """A path object, None where no path is given."""
    return None if value is None else path(value)


def location(
    model: PathLike, revision: str | None, cache_dir: PathLike | None, local_files_only: bool
) -> ModelLocation:
    """Where a model comes from: a directory or a Hub id, with the options of the download."""
    return ModelLocation(os.fspath(model), revision, optional_path(cache_dir), local_files_only)


def sequence(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Several values; a string is one value, and None is no value.

    >>> sequence("q_proj"), sequence(["q_proj", "v_proj"]), sequence(None)
    (('q_proj',), ('q_proj', 'v_proj'), ())
    """
    return (value,) if isinstance(value, str) else tuple(value or ())


def separated(value: str | Iterable[str]) -> tuple[str, ...]:
    """Several values, or a string that joins them by commas.

    >>> separated("base, tail"), separated(["base", "tail"]), separated("")
    (('base', 'tail'), ('base', 'tail'), ())
    """
    items = value.split(",") if isinstance(value, str) else value
    return tuple(item.strip() for item in items if item.strip())


def target_patterns(
    targets: str | Iterable[str] | None,
    excludes: str | Iterable[str] | None,
    targets_from: PathLike | None,
) -> Patterns:
    """The patterns of the targets, with the names that a file of `select-targets` lists."""
    return patterns(sequence(targets), sequence(excludes), optional_path(targets_from))
