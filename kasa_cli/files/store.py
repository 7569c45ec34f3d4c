"""The store: measured facts, shared by all runs of a user, as small files named by the content they describe.

    STORE/
        facts-1/                        version 1 of the layout
            3f/3f91…c2/                 one tensor: a hash of its dtype, shape and bytes
                ends-16.<key>.<digest>  one fact; the digest is that of the file's own bytes
        names-1/                        likewise: module names in memory, by config and headers

A fact is complete or absent, since files appear by a rename, and a fact that does not match its digest is removed.
Two processes that measure the same tensor write the same bytes. There is no lock: a process that misses a fact
measures again.
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
"""A temporary file of this age belongs to no running process."""
ATTEMPTS = 4
"""Attempts to write a fact while another process removes its empty folder."""
_CONTENT, _PREFIX = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{2}")
_FACT = re.compile(r"(?P<question>[a-z0-9-]{1,40})\.(?P<key>[0-9a-f]{16})\.(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True)
class StoreEntry:
    """The facts about one tensor or model: their questions, their size, and the time of the last use."""

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
        """The part of the same folder with another layout, for facts of another sort."""
        return Store(self.root, layout)

    def get(self, content: str, question: str, key: str) -> bytes | None:
        """The answer to a question about a tensor, if the store has it intact; this counts as a use."""
        for path in self._paths(content, question, key):
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
        """Keep an answer. If the disk refuses it, this run goes on and the next one measures again."""
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

    def entries(self) -> list[StoreEntry]:
        """The entries of all tensors, the last used first."""
        entries = [entry for folder in self._tensors() if (entry := _entry(folder))]
        return sorted(entries, key=lambda entry: (-entry.last_used, entry.content))

    def any_fact(self, content: str, question: str) -> bytes | None:
        """An answer to a question, measured with any versions; this does not count as a use."""
        for path in self._paths(content, question):
            payload = _content(path)
            if payload is not None and _is_intact(path, payload):
                return payload
        return None

    def remove(self, content: str) -> None:
        """Remove all facts about a tensor."""
        folder = self._folder(content)
        with disk_errors(folder):
            for path in _states(folder):
                if _FACT.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            _remove_empty(folder)

    def sweep(self) -> int:
        """Remove temporary files and empty folders of killed runs; the number of files removed."""
        num_swept = 0
        for folder in self._tensors():
            stale = [path for path in (folder, *_states(folder)) if _is_stale(path)]
            litter = [path for path in stale if path.name.startswith(".") and path.name.endswith(TEMPORARY)]
            with disk_errors(folder):
                for path in litter:
                    path.unlink(missing_ok=True)
            if stale:  # a new empty folder is about to be filled
                _remove_empty(folder)
            num_swept += len(litter)
        for first in _names(self._facts):  # a killed run may have left it empty
            if _PREFIX.fullmatch(first) and _is_stale(self._facts / first):
                with suppress(OSError):
                    (self._facts / first).rmdir()
        return num_swept

    def _folder(self, content: str) -> Path:
        if not _CONTENT.fullmatch(content):
            raise ValueError(f"not the hash of a tensor: {content!r}")
        return self._facts / content[:2] / content

    def _paths(self, content: str, question: str, key: str | None = None) -> list[Path]:
        """Paths of the facts that answer a question, measured with the versions of `key`, or with any."""
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
        raise ResourceError("no home directory for the store", "", f"set {VARIABLE}") from error


def open_store(root: Path | None) -> Store:
    """The store for a run: in the folder that the user named, which must be writable, or in the default one.

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
    """The store to list: the named or the default one. A store that does not exist is empty.

    Raises:
        ResourceError: there is no default one.
        UnsafeInput: the named path is not a folder.
    """
    if root is not None:
        _require_folder(root)
    return Store(root or default_root())


def _require_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise UnsafeInput("not a folder", str(root), "name another with --store")


def _content(path: Path) -> bytes | None:
    """The bytes of a regular file, without following a link; None if it cannot be read."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    return None


def _is_intact(path: Path, payload: bytes) -> bool:
    """Whether a fact matches its digest."""
    return hashlib.sha256(payload).hexdigest() == path.name.rsplit(".", 1)[1]


def _names(folder: Path) -> list[str]:
    """Names in a folder; none if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _states(folder: Path) -> dict[Path, os.stat_result]:
    """The files in a folder, with their states; files that vanish meanwhile are left out."""
    states = {}
    for name in _names(folder):
        with suppress(OSError):
            states[folder / name] = (folder / name).lstat()
    return {path: state for path, state in states.items() if not stat.S_ISDIR(state.st_mode)}


def _is_stale(path: Path) -> bool:
    """Whether a path is older than any running process."""
    try:
        return time.time() - path.lstat().st_mtime > STALE_SECONDS
    except OSError:
        return False


def _entry(folder: Path) -> StoreEntry | None:
    """The entry of one tensor; None if its facts are gone."""
    questions, num_bytes, last_used = set(), 0, 0.0
    for path, state in _states(folder).items():
        if match := _FACT.fullmatch(path.name):
            questions.add(match["question"])
            num_bytes += state.st_size
            last_used = max(last_used, state.st_mtime)
    return StoreEntry(folder.name, tuple(sorted(questions)), num_bytes, last_used) if questions else None


def _remove_empty(folder: Path) -> None:
    """Remove a tensor's folder and the one around it, unless something else is in them."""
    for place in (folder, folder.parent):
        with suppress(OSError):
            place.rmdir()
