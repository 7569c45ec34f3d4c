"""A store of what was found once, shared by all runs of a user: small files, named by what they are about.

    STORE/
        facts-1/                        of this layout
            3f/3f91…c2/                 one tensor: a hash of its dtype, shape and bytes
                ends-16.<key>.<digest>  one fact; the digest is that of the file's own bytes
        names-1/                        likewise: of a config and headers, the names in memory

A fact is whole or absent, for files appear by a rename, and what does not match its digest is removed. Two processes
that find the same thing write the same thing. Nobody holds a lock: who finds a fact gone measures again.
"""

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kasa_cli.errors import IntegrityError, KasaError, ResourceError, UnsafeInput
from kasa_cli.files.durable import TEMPORARY, disk_errors, make_folder, write_file

FACTS, NAMES = "facts-1", "names-1"
VARIABLE = "KASA_STORE"
STALE_SECONDS = 24 * 3600
"""What is unfinished at that age belongs to nobody any more."""
ATTEMPTS = 4
"""To write a fact whose folder somebody else finds empty and removes."""
_CONTENT, _PREFIX = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{2}")
_FACT = re.compile(r"(?P<question>[a-z0-9-]{1,40})\.(?P<key>[0-9a-f]{16})\.(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True)
class Entry:
    """All that is known of one tensor, or model: facts by question, their bytes, and when one was last used."""

    content: str
    questions: tuple[str, ...]
    num_bytes: int
    last_used: float


class Store:
    """A folder of facts. Reading and writing it are safe from several processes and threads at once."""

    def __init__(self, root: Path, layout: str = FACTS) -> None:
        self.root, self.layout = root, layout
        self._facts = root / layout
        self.trouble: KasaError | None = None

    def shelf(self, layout: str) -> "Store":
        """The same folder, for facts about something else."""
        return Store(self.root, layout)

    def get(self, content: str, question: str, key: str) -> bytes | None:
        """The answer to a question about a tensor, if it is here and intact; it then counts as used."""
        for path in self._found(content, question, key):
            payload = _content(path)
            if payload is not None and _is_intact(path, payload):
                with suppress(OSError):
                    os.utime(path)
                return payload
            if payload is not None:
                with suppress(OSError):
                    path.unlink()
        return None

    def put(self, content: str, question: str, key: str, payload: bytes) -> None:
        """Keep an answer. A disk that will not take it costs the next run a decomposition, and this one nothing."""
        if self.trouble:
            return
        path = self._folder(content) / f"{question}.{key}.{hashlib.sha256(payload).hexdigest()}"
        for _ in range(ATTEMPTS):
            try:
                make_folder(path.parent)
                write_file(path, [payload])
                return
            except (ResourceError, IntegrityError) as error:
                trouble = error
                if not isinstance(error.__cause__, FileNotFoundError):
                    break
        self.trouble = trouble

    def entries(self) -> list[Entry]:
        """Every tensor measured, the one used last first."""
        found = [entry for folder in self._tensors() if (entry := _entry(folder))]
        return sorted(found, key=lambda entry: (-entry.last_used, entry.content))

    def any_fact(self, content: str, question: str) -> bytes | None:
        """An answer to a question, whatever versions it was found with; to look at it is not to use it."""
        for path in self._found(content, question):
            payload = _content(path)
            if payload is not None and _is_intact(path, payload):
                return payload
        return None

    def remove(self, content: str) -> None:
        """Forget a tensor."""
        folder = self._folder(content)
        with disk_errors(folder):
            for path in _states(folder):
                if _FACT.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            _remove_empty(folder)

    def sweep(self) -> int:
        """Remove what killed runs were writing, and the folders they left empty; the number of files."""
        num_swept = 0
        for folder in self._tensors():
            stale = [path for path in (folder, *_states(folder)) if _is_stale(path)]
            litter = [path for path in stale if path.name.startswith(".") and path.name.endswith(TEMPORARY)]
            with disk_errors(folder):
                for path in litter:
                    path.unlink(missing_ok=True)
            if stale:  # an empty folder that is new is about to be filled
                _remove_empty(folder)
            num_swept += len(litter)
        for first in _names(self._facts):  # a run may have been killed before it put a folder in there
            if _PREFIX.fullmatch(first) and _is_stale(self._facts / first):
                with suppress(OSError):
                    (self._facts / first).rmdir()
        return num_swept

    def _folder(self, content: str) -> Path:
        if not _CONTENT.fullmatch(content):
            raise ValueError(f"not the hash of a tensor: {content!r}")
        return self._facts / content[:2] / content

    def _found(self, content: str, question: str, key: str | None = None) -> list[Path]:
        """The facts that answer a question, found with these versions, or with any."""
        folder = self._folder(content)
        matches = [match for name in _names(folder) if (match := _FACT.fullmatch(name))]
        return [
            folder / match[0]
            for match in matches
            if match["question"] == question and key in (None, match["key"])
        ]

    def _tensors(self) -> Iterator[Path]:
        for first in _names(self._facts):
            for name in _names(self._facts / first):
                if _CONTENT.fullmatch(name) and name.startswith(first):
                    yield self._facts / first / name


def default_root() -> Path:
    """`KASA_STORE`, else kasa's folder in the user's cache directory.

    Raises:
        ResourceError: the user has no home.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "kasa"
    except RuntimeError as error:
        raise ResourceError("there is no home directory for it", "", f"set {VARIABLE}") from error


def opened(root: Path | None) -> Store:
    """The store for a run: in a folder that the user named, which must be usable, or in the default one.

    Raises:
        ResourceError: the folder that was named cannot be written to.
        UnsafeInput: it is not a folder.
    """
    if root is not None:
        _require_folder(root)
        make_folder(root)
        if not os.access(root, os.W_OK | os.X_OK):
            raise ResourceError("cannot be written to", str(root), "name another with --store, or --no-store")
        return Store(root)
    try:
        return Store(default_root())
    except ResourceError as error:
        nowhere = Store(Path(os.devnull))
        nowhere.trouble = error
        return nowhere


def existing(root: Path | None) -> Store:
    """The store to look into: named or the default one. One that is not there yet is empty.

    Raises:
        ResourceError: there is no default one.
        UnsafeInput: what was named is not a folder.
    """
    if root is not None:
        _require_folder(root)
    return Store(root or default_root())


def _require_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise UnsafeInput("not a folder", str(root), "name another with --store")


def _content(path: Path) -> bytes | None:
    """The bytes of a regular file, without following a link; None where there is none that can be read."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    return None


def _is_intact(path: Path, payload: bytes) -> bool:
    """Whether a fact is the one that was written."""
    return hashlib.sha256(payload).hexdigest() == path.name.rsplit(".", 1)[1]


def _names(folder: Path) -> list[str]:
    """What is in a folder; nothing if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _states(folder: Path) -> dict[Path, os.stat_result]:
    """What is in a folder but for folders, and is still there when it is looked at."""
    states = {}
    for name in _names(folder):
        with suppress(OSError):
            states[folder / name] = (folder / name).lstat()
    return {path: state for path, state in states.items() if not stat.S_ISDIR(state.st_mode)}


def _is_stale(path: Path) -> bool:
    """Whether something is so old that no run can be at it."""
    try:
        return time.time() - path.lstat().st_mtime > STALE_SECONDS
    except OSError:
        return False


def _entry(folder: Path) -> Entry | None:
    """One tensor's facts; None if they are gone meanwhile."""
    questions, num_bytes, last_used = set(), 0, 0.0
    for path, state in _states(folder).items():
        if match := _FACT.fullmatch(path.name):
            questions.add(match["question"])
            num_bytes += state.st_size
            last_used = max(last_used, state.st_mtime)
    return Entry(folder.name, tuple(sorted(questions)), num_bytes, last_used) if questions else None


def _remove_empty(folder: Path) -> None:
    """Remove a tensor's folder and the one around it, unless something else is in them."""
    for place in (folder, folder.parent):
        with suppress(OSError):
            place.rmdir()
