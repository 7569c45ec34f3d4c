"""Direct writing: ranges of a new file are written past the page cache and read back from the disk for comparison.

The page cache costs more processor time than the arithmetic of a merge, and reading back from it does not test the
disk. So whole blocks are written with O_DIRECT, read back and compared in a thread of their own while the next ones
are computed. The first and the last block of a range are shared with its neighbours, so they go through the page
cache, as does everything on a filesystem without direct access.
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
"""Addresses, offsets and lengths of direct access are multiples of this, whatever the disk."""
ROOM = 4 << 20
"""Bytes of one direct write, and the smallest range that is written directly."""


@dataclass(frozen=True)
class OpenFile:
    """A new file: its descriptor, and a second one with direct access if the filesystem has that."""

    descriptor: int
    direct: int | None


@contextmanager
def opened_directly(descriptor: int, mode: int = os.O_RDWR) -> Iterator[OpenFile]:
    """An open file, with direct access to it until the block ends."""
    direct = _directly(descriptor, mode)
    try:
        yield OpenFile(descriptor, direct)
    except Exception:
        _close(direct)
        raise
    _close(direct)  # not after Ctrl-C: a worker may still write to it


class Lane:
    """A thread and three buffers for one range at a time: one is filled, one is written, one is read back into."""

    def __init__(self) -> None:
        self.filling, self.written, self.back = (memoryview(mmap.mmap(-1, ROOM)) for _ in range(3))

    @cached_property
    def thread(self) -> ThreadPoolExecutor:
        """The thread, started at its first use."""
        return ThreadPoolExecutor(1, thread_name_prefix="kasa-disk")

    def swap(self) -> None:
        """Exchange the filled buffer and the written one."""
        self.filling, self.written = self.written, self.filling


@dataclass
class Lanes:
    """A pool of lanes: one for each range that is written at the same time."""

    idle: list[Lane] = field(default_factory=list)

    @contextmanager
    def stretch(self, file: OpenFile, begin: int, end: int, where: str) -> Iterator["Stretch"]:
        """Write bytes [begin, end) of a file in order; all of them are on the disk when the block ends.

        Raises:
            IntegrityError: the bytes read back differ from those written, at `where`.
        """
        lane = self.idle.pop() if self.idle else Lane()
        out = Stretch(file, begin, end, where, lane)
        try:
            yield out
        finally:
            out.settle()
            self.idle.append(lane)


class Stretch:
    """A range of a file that is being written. `at` is the offset of the next byte."""

    def __init__(self, file: OpenFile, begin: int, end: int, where: str, lane: Lane) -> None:
        self.file, self.at, self.end, self.where, self.lane = file, begin, end, where, lane
        first, last = -(-begin // BLOCK) * BLOCK, end // BLOCK * BLOCK
        self._whole = range(first, last) if file.direct is not None and last - first >= ROOM else range(0)
        self._filled = 0
        self._pending: Future[None] | None = None

    def put(self, data: memoryview) -> None:
        """Write the next bytes; `data` may be reused afterwards."""
        while data:
            num_bytes = self._fill(data) if self.at in self._whole else self._write(data)
            self.at, data = self.at + num_bytes, data[num_bytes:]

    def settle(self) -> None:
        """Wait for the pending write."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, data: memoryview) -> int:
        """Write bytes of the first or last block through the page cache."""
        stop = self._whole.start if self.at < self._whole.start else self.end
        piece = data[: min(stop - self.at, ROOM)]
        self.settle()  # the pending write may be reading back into the same buffer
        self._verified(self.file.descriptor, piece, self.at)
        return len(piece)

    def _fill(self, data: memoryview) -> int:
        """Collect bytes of whole blocks; the buffer is written when it is full or the blocks end."""
        num_bytes = min(len(data), self._whole.stop - self.at, ROOM - self._filled)
        self.lane.filling[self._filled : self._filled + num_bytes] = data[:num_bytes]
        self._filled += num_bytes
        if self._filled == ROOM or self.at + num_bytes == self._whole.stop:
            self.settle()
            self.lane.swap()
            start, piece = self.at + num_bytes - self._filled, self.lane.written[: self._filled]
            self._pending, self._filled = self.lane.thread.submit(self._write_out, piece, start), 0
        return num_bytes

    def _write_out(self, piece: memoryview, start: int) -> None:
        _either(self.file, lambda descriptor: self._verified(descriptor, piece, start))

    def _verified(self, descriptor: int, data: memoryview, offset: int) -> None:
        back = self.lane.back[: len(data)]
        pwrite_all(descriptor, data, offset)
        pread_all(descriptor, back, offset)
        if not _equal(back, data):
            raise IntegrityError(
                "the bytes read back differ from those written",
                self.where,
                "the disk or the memory may be failing",
            )


def _either(file: OpenFile, work: Callable[[int], None]) -> None:
    """Do the work by direct access, or through the page cache where the filesystem refuses."""
    if file.direct is not None:
        try:
            return work(file.direct)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some filesystems refuse only at the first write
                raise
    return work(file.descriptor)


def _directly(descriptor: int, mode: int) -> int | None:
    """A second descriptor of the same open file, with direct access; None where that is not possible."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", mode | os.O_CLOEXEC | os.O_DIRECT)
    except (AttributeError, OSError):  # not on this system, or not on this filesystem
        return None


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _equal(first: memoryview, second: memoryview) -> bool:
    """Whether two buffers are equal; sixty times as fast as `==` of views, which makes an object of each byte."""
    kind = np.int64 if len(first) % 8 == 0 else np.uint8
    return np.array_equal(np.frombuffer(first, kind), np.frombuffer(second, kind))
