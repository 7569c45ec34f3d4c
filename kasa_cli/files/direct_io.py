"""Stretches of a new file, each read back from where it was written: from the disk itself, if the system lets us.

Pages of the cache cost more than the sums of a merge: the system must find them, fill them and, where the output is
larger than the memory, throw out others. So whole blocks go straight from here to the disk and come back from it to
be compared, in a thread of their own while the next ones are made. The blocks at both ends of a stretch belong to its
neighbours, too: they take the usual way, as does everything on a filesystem that knows no other.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kasa_cli.errors import IntegrityError
from kasa_cli.files.durable import pread_all, pwrite_all

BLOCK = 4096
"""What addresses, offsets and lengths of direct access are multiples of, whatever the disk."""
ROOM = 4 << 20
"""Bytes that go to the disk at once, and the least stretch that does not take the usual way."""


@dataclass(frozen=True)
class Opened:
    """A new file, and where the filesystem lets it, the same one past the page cache."""

    descriptor: int
    direct: int | None


@contextmanager
def opened_directly(descriptor: int, mode: int = os.O_RDWR) -> Iterator[Opened]:
    """An open file, with direct access to it until the block ends."""
    direct = _directly(descriptor, mode)
    try:
        yield Opened(descriptor, direct)
    except Exception:
        _close(direct)
        raise
    _close(direct)  # not after Ctrl-C: a worker may still write to it


class Lane:
    """A thread and the memory for one stretch at a time: what is being filled, what is leaving, what comes back."""

    def __init__(self) -> None:
        self.filling, self.leaving, self.back = (memoryview(mmap.mmap(-1, ROOM)) for _ in range(3))

    @cached_property
    def thread(self) -> ThreadPoolExecutor:
        """Started when it is first needed."""
        return ThreadPoolExecutor(1, thread_name_prefix="kasa-disk")

    def swap(self) -> None:
        """What was filled leaves, and its memory is that of what left before."""
        self.filling, self.leaving = self.leaving, self.filling


@dataclass
class Lanes:
    """As many lanes as stretches are written at once, each used again and again."""

    idle: list[Lane] = field(default_factory=list)

    @contextmanager
    def stretch(self, file: Opened, begin: int, end: int, where: str) -> Iterator["Stretch"]:
        """Bytes [begin, end) of a file, to be put from the first to the last; all are written when the block ends.

        Raises:
            IntegrityError: other bytes came back than were written, at `where`.
        """
        lane = self.idle.pop() if self.idle else Lane()
        out = Stretch(file, begin, end, where, lane)
        try:
            yield out
        finally:
            out.settle()
            self.idle.append(lane)


class Stretch:
    """Bytes of a file that are being written. `at` is where the next one goes."""

    def __init__(self, file: Opened, begin: int, end: int, where: str, lane: Lane) -> None:
        self.file, self.at, self.end, self.where, self.lane = file, begin, end, where, lane
        first, last = -(-begin // BLOCK) * BLOCK, end // BLOCK * BLOCK
        self._whole = range(first, last) if file.direct is not None and last - first >= ROOM else range(0)
        self._filled = 0
        self._pending: Future[None] | None = None

    def put(self, data: memoryview) -> None:
        """The next bytes; `data` may be used again afterwards."""
        while data:
            taken = self._fill(data) if self.at in self._whole else self._write(data)
            self.at, data = self.at + taken, data[taken:]

    def settle(self) -> None:
        """Wait for the thread."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, data: memoryview) -> int:
        """Bytes at an end, the usual way."""
        stop = self._whole.start if self.at < self._whole.start else self.end
        piece = data[: min(stop - self.at, ROOM)]
        self.settle()  # it may be reading into the memory that this reads into
        self._verified(self.file.descriptor, piece, self.at)
        return len(piece)

    def _fill(self, data: memoryview) -> int:
        """Bytes of whole blocks: they leave when there is no more room, or no more of them."""
        taken = min(len(data), self._whole.stop - self.at, ROOM - self._filled)
        self.lane.filling[self._filled : self._filled + taken] = data[:taken]
        self._filled += taken
        if self._filled == ROOM or self.at + taken == self._whole.stop:
            self.settle()
            self.lane.swap()
            start, piece = self.at + taken - self._filled, self.lane.leaving[: self._filled]
            self._pending, self._filled = self.lane.thread.submit(self._leave, piece, start), 0
        return taken

    def _leave(self, piece: memoryview, start: int) -> None:
        _either(self.file, lambda descriptor: self._verified(descriptor, piece, start))

    def _verified(self, descriptor: int, data: memoryview, offset: int) -> None:
        back = self.lane.back[: len(data)]
        pwrite_all(descriptor, data, offset)
        pread_all(descriptor, back, offset)
        if not _equal(back, data):
            raise IntegrityError(
                "read back other than written", self.where, "the disk or the memory may be failing"
            )


def _either(file: Opened, work: Callable[[int], None]) -> None:
    """Directly, or the usual way where that cannot be."""
    if file.direct is not None:
        try:
            return work(file.direct)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some filesystems know better only now
                raise
    return work(file.descriptor)


def _directly(descriptor: int, mode: int) -> int | None:
    """Another descriptor of the same file: this one has not the name that the file will have."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", mode | os.O_CLOEXEC | os.O_DIRECT)
    except (AttributeError, OSError):  # not on this system, or not on this filesystem
        return None


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _equal(one: memoryview, other: memoryview) -> bool:
    """Sixty times as fast as `==` of views, which looks at each byte as an object."""
    kind = np.int64 if len(one) % 8 == 0 else np.uint8
    return np.array_equal(np.frombuffer(one, kind), np.frombuffer(other, kind))
