"""Untrusted files: only regular files are opened, reads are bounded, and parsing is strict."""

import json
import os
import stat
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from kasa_cli.errors import InvalidInput, ResourceError, UnsafeInput

MAX_CONFIG = 16_000_000

MAX_CONFIG_DEPTH = 64

MAX_JSON_ITEMS = 4_000_000  # brackets and commas: keeps the memory of a parse well under 1 GiB
MAX_READ = 1 << 30  # one system call moves less than 2 GiB


def quote(name: str) -> str:
    """A name from a file, short enough for one line of an error.

    >>> quote("a" * 200)[-5:]
    "aaa…'"
    """
    return repr(name) if len(name) <= 120 else repr(name[:120] + "…")


def open_regular(path: Path) -> FileIO:
    """Open a regular file, unbuffered. Anything else is refused; a FIFO cannot block the open."""
    require_regular(path)  # before the open, since opening some devices has side effects
    try:
        file = FileIO(path, "rb", opener=open_at_once)
    except OSError as error:
        refuse_unreadable(path, error)
    if not stat.S_ISREG(
        os.fstat(file.fileno()).st_mode
    ):  # after the open, since the name may point elsewhere by now
        file.close()
        raise UnsafeInput("not a regular file", str(path))
    return file


def open_at_once(path: str, flags: int) -> int:
    """An opener for `open` that never waits for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def require_regular(path: Path) -> None:
    """Refuse FIFOs, devices, sockets and directories, without opening them."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        refuse_unreadable(path, error)
    if not stat.S_ISREG(mode):
        raise UnsafeInput("not a regular file", str(path))


def refuse_unreadable(path: Path, error: OSError) -> NoReturn:
    """Turn a failed open or read into the error of its kind."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        raise InvalidInput("no such file", str(path)) from error
    raise ResourceError(f"cannot read ({error.strerror})", str(path)) from error


def read_exactly(file: FileIO, path: Path, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`."""
    room = bytearray(size)
    read_into(file, path, memoryview(room), offset)
    return bytes(room)


def read_into(file: FileIO, path: Path, room: memoryview, offset: int) -> None:
    """Fill `room` with the bytes at `offset`."""
    while room:
        try:
            num_read = os.preadv(file.fileno(), [room[:MAX_READ]], offset)
        except OSError as error:
            refuse_unreadable(path, error)
        if not num_read:
            raise InvalidInput(f"truncated: nothing at byte {offset}", str(path), "download it again")
        room, offset = room[num_read:], offset + num_read


def read_small(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise InvalidInput(f"too large: {size} bytes, more than the {limit} allowed", str(path))
        return read_exactly(file, path, size, 0)


def parse_json(raw: bytes, path: Path, *, unique_keys: bool = True) -> Any:
    """Parse untrusted JSON: bounded, UTF-8, and without duplicate keys unless the caller allows them."""
    if sum(raw.count(sign) for sign in (b"[", b"{", b",")) > MAX_JSON_ITEMS:
        raise InvalidInput("too large: more JSON than any checkpoint needs", str(path))
    try:
        pairs = unique if unique_keys else None
        return json.loads(raw.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise InvalidInput("JSON nested too deep", str(path)) from error
    except ValueError as error:  # bad UTF-8, bad JSON, a number of too many digits, a key twice
        raise InvalidInput(f"invalid JSON ({error})", str(path)) from error


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a duplicate key is an error."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        [(duplicate, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate name {quote(duplicate)}")
    return mapping


def constant(text: str) -> float:
    """The value of a JSON constant. Real configs hold Infinity (Mamba-2's `time_step_limit`); NaN is refused."""
    if text == "NaN":
        raise ValueError("NaN")
    return float(text)


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether JSON is nested deeper than `limit`; works level by level, without recursion."""
    level = [value]
    for _ in range(limit):
        branches = [
            item.values() if isinstance(item, dict) else item
            for item in level
            if isinstance(item, dict | list)
        ]
        level = [item for branch in branches for item in branch]
    return bool(level)


def enumerated(names: list[str], limit: int = 5) -> str:
    """The first names, and the number of the others.

    >>> enumerated(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name if len(name) <= 120 else quote(name) for name in names[:limit]) + rest
