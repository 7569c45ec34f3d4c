"""Folders: the names and hashes of what is in them."""

import hashlib
import os
from pathlib import Path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree_hash(folder: Path) -> dict[str, tuple[int, str]]:
    """Mode and hash of every file below a folder: equal before and after means untouched."""
    hashes = {}
    for directory, _, files in os.walk(folder):
        for file in files:
            path = Path(directory, file)
            content = path.read_bytes() if path.is_file() else b""
            digest = hashlib.sha256(content).hexdigest()
            hashes[path.relative_to(folder).as_posix()] = (path.lstat().st_mode, digest)
    return hashes
