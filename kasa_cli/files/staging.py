"""Staging: an output is built in a folder beside it, under one lock, and published by one rename.

    OUT                      absent, the old output, or the complete new one
    OUT.kasa-partial/        a sibling, hence on the same filesystem, where a rename is atomic
        .lock, .lock-holder  the lock of the whole run, and its holder
        job.json             everything the bytes depend on; another job does not resume this one
        parts/               finished pieces of work, each with its digest in its name
        out/                 the tree that becomes OUT
        publishing           exists while OUT is being replaced or has just appeared
    OUT.kasa-old/            the old OUT for the moment between two renames

The folder is the journal: a part exists under its final name only if it was synced and renamed there.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from kasa_cli.errors import (
    IntegrityError,
    InvalidInput,
    Locked,
    NumericalError,
    OutputExists,
    ResourceError,
    UnsafeInput,
    UsageError,
)
from kasa_cli.files.durable import (
    canonical_json,
    disk_errors,
    make_folder,
    sha256_file,
    sweep,
    sync,
    sync_tree,
    write_file,
)
from kasa_cli.files.lock import RunLock

MANIFEST = "kasa.manifest.json"
STAGING, OLD = "kasa-partial", "kasa-old"
_KEY = re.compile(r"[0-9A-Za-z_-]{1,128}")
_PATIENCE = 5
_REPLACE = b"replace\n"
HOPELESS = (InvalidInput, NumericalError, UsageError)
"""Errors that the same command would raise again: without a finished part the staging is removed."""
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY}


class Staging:
    """The right to build `output`, and the finished parts of earlier runs of the same job.

    `resumed` is true when an earlier run of the same job left its staging; `out` is the folder in which to build the
    tree.
    """

    def __init__(
        self,
        output: Path,
        *,
        fingerprint: Mapping[str, object],
        overwrite: bool = False,
        restart: bool = False,
    ) -> None:
        with disk_errors(output):
            # A link to a folder is followed, so that the staging is on the filesystem of the output.
            dangling = output.is_symlink() and not output.exists()
            self._output = output.absolute() if dangling else Path(os.path.realpath(output))
        self._fingerprint = canonical_json(dict(fingerprint))
        self._overwrite = overwrite
        self._restart = restart
        self._old = self._beside(OLD)
        self._folder = self._beside(STAGING)
        self._job = self._folder / "job.json"
        self._parts = self._folder / "parts"
        self._marker = self._folder / "publishing"
        self._lock = RunLock(self._folder / ".lock")
        self.out = self._folder / "out"
        self.resumed = False
        self._finished: dict[str, Path] = {}

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._take_lock()
            undo.callback(self._lock.release)
            undo.callback(self._leave_no_empty_staging)
            with disk_errors(self._folder):
                self._prepare()
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, HOPELESS) and not self._finished:
            with suppress(OSError):
                self._discard()
                self._remove_folder()
        self._lock.release()

    def part(self, key: str) -> Path | None:
        """The finished part of that key, if its content is intact."""
        path = self._finished.get(_checked(key))
        if path is None:
            return None
        with disk_errors(path):
            if _is_intact(path):
                return path
            self._finished.pop(key, None)
            path.unlink(missing_ok=True)
        return None

    def keep_part(self, key: str, payload: bytes) -> None:
        """Keep a finished part for later runs."""
        digest = hashlib.sha256(payload).hexdigest()
        path = self._parts / f"{_checked(key)}.{digest}.safetensors"
        write_file(path, [payload], size=len(payload))
        self._finished[key] = path

    def publish(self) -> None:
        """Publish the tree in `out` as the output by one rename, and remove the staging."""
        sync_tree(self.out)
        with disk_errors(self._output):
            self._check_output()
            replaces = _is_occupied(self._output)
            write_file(self._marker, [_REPLACE if replaces else b"new\n"])
            try:
                self._swap(replaces)
            finally:
                self._settle()
            self._remove_folder()

    def _beside(self, suffix: str) -> Path:
        return self._output.parent / f"{self._output.name}.{suffix}"

    def _take_lock(self) -> None:
        for _ in range(_PATIENCE):
            make_folder(self._folder)
            self._refuse_symlinks()
            # The holder removes the folder and the lock when it ends; then a new lock can be taken.
            with disk_errors(self._folder), suppress(FileNotFoundError):
                if self._lock.acquire():
                    return
        raise Locked("other runs keep taking the lock", str(self._output), "try again")

    def _refuse_symlinks(self) -> None:
        with disk_errors(self._folder), suppress(FileNotFoundError):
            for path in (self._folder, *self._folder.iterdir()):
                if path.is_symlink():
                    raise UnsafeInput("a symbolic link where only kasa writes", str(path), "remove it")

    def _prepare(self) -> None:
        self._settle()
        self._check_output()
        self._probe()
        if self._restart or not self._job.exists():
            self._discard()
        self._compare_job()
        _remove(self.out)
        sweep(self._folder)
        make_folder(self._parts)
        sweep(self._parts)
        self._finished = {
            path.name.split(".")[0]: path for path in sorted(self._parts.glob("*.*.safetensors"))
        }
        make_folder(self.out)

    def _swap(self, replaces: bool) -> None:
        if replaces:
            self._output.rename(self._old)
        try:
            self.out.rename(self._output)
        except OSError as error:
            if error.errno in _IN_THE_WAY:
                raise OutputExists("something appeared in the way", str(self._output), "move it") from error
            raise

    def _settle(self) -> None:
        """Complete an interrupted publication, or undo it if the new output is not in place."""
        if not self._marker.exists():
            return
        replaces = self._marker.read_bytes() == _REPLACE
        if replaces and not os.path.lexists(self._output):
            self._old.rename(self._output)
            sync(self._output.parent)
        elif not self.out.exists() and _is_occupied(self._output):
            sync(self._output.parent)
            if replaces:
                _remove(self._old)
            self._discard()
        self._marker.unlink(missing_ok=True)

    def _check_output(self) -> None:
        where = str(self._output)
        if os.path.lexists(self._old):
            raise OutputExists("an earlier output is in the way", str(self._old), "move it or remove it")
        if not _is_occupied(self._output):
            return
        if not self._overwrite:
            raise OutputExists("the output exists", where, "choose another, or replace it with --overwrite")
        if self._output.is_symlink() or not (self._output / MANIFEST).is_file():
            raise OutputExists("not an output of kasa, and not overwritten", where, "choose another")

    def _probe(self) -> None:
        """Check before the work that the output's name can be created."""
        probe = self._beside("kasa-probe")
        with suppress(FileExistsError):
            probe.mkdir()
        probe.rmdir()

    def _compare_job(self) -> None:
        if not self._job.exists():
            write_file(self._job, [self._fingerprint])
            return
        differing = _differing(self._job.read_bytes(), self._fingerprint)
        if differing:
            problem = f"the interrupted run was another job ({', '.join(differing)})"
            remedy = "repeat its command, or discard its work with --restart"
            raise IntegrityError(problem, str(self._folder), remedy)
        self.resumed = True

    def _discard(self) -> None:
        for path in (self._job, self.out, self._parts):
            _remove(path)
        sweep(self._folder)

    def _leave_no_empty_staging(self) -> None:
        if not self._job.exists() and not self._marker.exists():
            self._remove_folder()

    def _remove_folder(self) -> None:
        # The lock is removed last. A run that creates the next lock between these two lines keeps the folder.
        with suppress(OSError):
            self._lock.remove()
            self._folder.rmdir()


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is, contains or lies inside one of the inputs, by whatever path it is named."""
    around_output = _identities(output)
    working = [output.parent / f"{output.name}.{suffix}" for suffix in (STAGING, OLD)]
    for path in inputs:
        if {_identity(place) for place in (output, *working)} & _identities(path):
            raise OutputExists("the output is, or contains, an input", str(output), "choose another")
        if _identity(path) in around_output:
            raise UsageError("the output lies inside an input", str(output), "choose another")


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse, before the work, an output that the disk has no room for."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    with disk_errors(place):
        state = os.statvfs(place)
    available = state.f_bavail * state.f_frsize
    if num_bytes > available:
        problem = f"the output needs {num_bytes:,} bytes and {available:,} are available"
        raise ResourceError(problem, str(folder), "free some space or choose another disk")


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        state = path.stat()
        return state.st_dev, state.st_ino
    return None


def _identities(path: Path) -> set[tuple[int, int]]:
    """The path and all folders around it as the filesystem knows them, through links and mounts."""
    real = Path(os.path.realpath(path))
    return {identity for place in (real, *real.parents) if (identity := _identity(place))}


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"not a key of a part: {key!r}")
    return key


def _is_intact(part: Path) -> bool:
    if not os.path.lexists(part):
        return False
    if not stat.S_ISREG(part.lstat().st_mode):
        raise UnsafeInput("not a regular file where a finished part was", str(part), "remove it")
    return sha256_file(part) == part.name.split(".")[-2]


def _is_occupied(path: Path) -> bool:
    """Whether the path exists and is not an empty folder, which a rename would replace."""
    if path.is_symlink() or not path.is_dir():
        return os.path.lexists(path)
    with os.scandir(path) as entries:
        return any(entries)


def _differing(recorded: bytes, present: bytes) -> list[str]:
    """The top-level fields in which two jobs differ."""
    try:
        # Compared as JSON text, since Python takes 1, 1.0 and True as equal.
        recorded_fields, present_fields = (
            {(name, canonical_json(value)) for name, value in json.loads(job).items()}
            for job in (recorded, present)
        )
        return sorted({name for name, _ in recorded_fields ^ present_fields})
    except (ValueError, AttributeError):
        return ["its record cannot be read"]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
