"""Durable files: complete or absent. Only this module creates files.

The order guarantees it: write under a temporary name in the same folder, fsync the file, rename,
fsync the folder. A crash at any point leaves the old file or the new one, and at worst a temporary name.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kasa_cli.errors import IntegrityError, InvalidInput, ResourceError

TEMPORARY = ".kasa-tmp"
CHUNK = 8 << 20

_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EACCES: "check the permissions of the folder",
    errno.EPERM: "check the permissions of the folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EIO: "the disk may be failing: check it, then run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write smaller shards",
}
# Errors of a filesystem that lacks an operation, as opposed to an operation that fails.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a `ResourceError` that names the file and the cause."""
    try:
        yield
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise ResourceError(cause, _blamed(error, path), _REMEDIES.get(error.errno or 0, "")) from error


def _blamed(error: OSError, path: Path) -> str:
    named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    return str(path) if not named or named.endswith(TEMPORARY) else named


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, size: int | None = None) -> str:
    """Write the chunks to `path`, whole or not at all; return the SHA-256 of the bytes."""
    digest, written = hashlib.sha256(), 0
    with _renamed_when_done(path) as file:
        _reserve(file, size or 0)
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            pwrite_all(file, data, written)
            digest.update(data)
            written += len(data)
        _require_size(path, written, written if size is None else size)
        _require_size(path, os.fstat(file).st_size, written)
    return digest.hexdigest()


@contextmanager
def new_file(path: Path, size: int) -> Iterator[int]:
    """A descriptor with `size` reserved bytes, to fill with `pwrite_all` in any order; the file becomes `path` at the
    end.

    Threads may share the descriptor; all of them must be done with it before the block ends.
    """
    with _renamed_when_done(path) as file:
        _reserve(file, size)
        yield file
        _require_size(path, os.fstat(file).st_size, size)


@contextmanager
def open_for_reading(path: Path) -> Iterator[int]:
    """A descriptor of a regular file for reading, until the block ends."""
    with disk_errors(path):
        # O_NONBLOCK: opening a pipe would wait for a writer.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise InvalidInput("not a regular file", str(path))
            yield file
        finally:
            os.close(file)


def copy_file(source: Path, target: Path) -> str:
    """Copy bytes, sharing them on filesystems that can; return the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with open_for_reading(source) as origin:
        size = os.fstat(origin).st_size
        buffer = memoryview(bytearray(min(CHUNK, size)))
        with new_file(target, size) as file:
            for offset in range(0, size, CHUNK):
                piece = buffer[: size - offset]
                copied = _clone(origin, file, offset, len(piece))
                pread_all(file, piece[:copied], offset, str(target))
                with disk_errors(source):
                    pread_all(origin, piece[copied:], offset + copied, str(source))
                pwrite_all(file, piece[copied:], offset + copied)
                digest.update(piece)
    return digest.hexdigest()


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; one system call writes at most 2 GiB."""
    rest = data.cast("B")
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written


def pread_all(fd: int, room: memoryview, offset: int, where: str = "") -> None:
    """Fill `room` from `offset`."""
    while room:
        num_read = os.preadv(fd, [room], offset)
        if not num_read:
            raise IntegrityError("became shorter during the read", where)
        room, offset = room[num_read:], offset + num_read


def sha256_file(path: Path) -> str:
    """SHA-256 of the content of a file."""
    with open_for_reading(path) as file, open(file, "rb", buffering=0, closefd=False) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def canonical_json(value: object) -> bytes:
    """The canonical JSON of a value, so that equal values are equal files.

    >>> canonical_json({"b": 1, "a": "é"})
    b'{\\n "a": "\\\\u00e9",\\n "b": 1\\n}\\n'
    """
    return f"{json.dumps(value, sort_keys=True, allow_nan=False, indent=1)}\n".encode("ascii")


def make_folder(path: Path) -> None:
    """Create a folder and its parents, each of them durable before the next."""
    with disk_errors(path), suppress(FileExistsError):
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir()
            sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems cannot sync a folder and return EINVAL. Every other error counts.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below `folder`, and the folder itself last."""
    with disk_errors(folder):
        for root, _, names in os.walk(folder, topdown=False):
            for path in (Path(root, name) for name in sorted(names)):
                if not path.is_symlink():
                    sync(path)
            sync(Path(root))


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed runs left in a folder."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def _renamed_when_done(path: Path) -> Iterator[int]:
    temporary = path.with_name(f".{os.urandom(8).hex()}{TEMPORARY}")
    with disk_errors(path):
        try:
            with _created(temporary) as file:
                yield file
                os.fsync(file)
            temporary.replace(path)
            _sync_name(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _created(path: Path) -> Iterator[int]:
    # Mode 0666 lets the kernel apply the umask: asking for the umask would change it for other threads.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        yield file
    except Exception:
        os.close(file)
        raise
    # Not after Ctrl-C: a worker may still write to it, and the number of a closed descriptor is soon reused.
    os.close(file)


def _sync_name(path: Path) -> None:
    try:
        sync(path.parent)
    except OSError:
        # After a failed fsync the system may drop the unwritten pages, so the file counts as lost.
        path.unlink(missing_ok=True)
        raise


def _reserve(file: int, size: int) -> None:
    if size:
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            os.ftruncate(file, size)


def _require_size(path: Path, num_written: int, num_expected: int) -> None:
    if num_written != num_expected:
        raise IntegrityError(f"{num_written} bytes written, {num_expected} expected", str(path))


def _clone(source: int, target: int, offset: int, size: int) -> int:
    """Copy inside the kernel; the number of bytes copied, which is 0 on filesystems that cannot."""
    copied = 0
    try:
        while copied < size:
            moved = os.copy_file_range(source, target, size - copied, offset + copied, offset + copied)
            if not moved:
                break
            copied += moved
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return copied
