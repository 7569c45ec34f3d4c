"""A folder for what many tests read and none writes: built once a process, and compared at the end of the tests."""

from pathlib import Path

from tests.builders.folders import tree_hash

HASHES: dict[Path, dict[str, tuple[int, str]]] = {}
"""Of each shared folder, the modes and hashes of its files as they were built."""
_root: list[Path] = []


def start(root: Path) -> None:
    """Name the folder; conftest.py does."""
    _root.append(root)


def place(*parts: str) -> Path:
    """A path in the folder."""
    return _root[0].joinpath(*parts)


def keep(folder: Path) -> Path:
    """Note what was built, for `changes`."""
    HASHES[folder] = tree_hash(folder)
    return folder


def changes() -> list[Path]:
    """The shared folders that some test wrote into."""
    return [folder for folder, hashes in HASHES.items() if tree_hash(folder) != hashes]
