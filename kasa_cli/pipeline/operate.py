"""OPERATE: a base with some tensors changed, and files of small new tensors; each tensor in memory once.

What is reported of a tensor was measured on what the file holds.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kasa_cli.checkpoint.container import Reader, TensorEntry
from kasa_cli.checkpoint.durable import new_file, pwrite_all
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.sheets import Sheet
from kasa_cli.checkpoint.streaming import TORCH_DTYPES, Form, filling, raw_bytes
from kasa_cli.errors import IntegrityError, NumericalError
from kasa_cli.pipeline.measure import Measured
from kasa_cli.pipeline.workers import Watcher, run

CHUNK = 1 << 20
"""Bytes written, read back and hashed while they are in the cache of one core."""
OPEN_FILES = 64
"""Shards written at once: enough to keep all workers busy, far below what a process may have open."""


Rows = Callable[[int, int], Tensor]
"""Rows [start, stop) of a stored matrix, or entries of a stored vector."""
Finding = TypeVar("Finding", covariant=True)


class Patient(Protocol[Finding]):
    """One tensor on the table: what it becomes, and what is to be measured on it once it is stored."""

    def pieces(self, dtype: str) -> Iterator[Tensor]:
        """The new value, rounded once to `dtype`, in the layout of the file, from its first byte to its last.

        Each piece is used before the next is asked for: they may share memory.
        """

    def examine(self, rows: Rows) -> Finding:
        """Measure what was stored."""


class Surgeon(Protocol[Finding]):
    """Who knows which tensors change, and how."""

    def takes(self, name: str) -> bool:
        """Whether a tensor changes."""

    def prepare(self, name: str) -> Patient[Finding]:
        """Read a tensor and all that its change needs."""


@dataclass(frozen=True)
class Written(Generic[Finding]):
    """One tensor as it stands in the new base. `outcome` is None for a copied one."""

    name: str
    file: str
    dtype: str
    sha256: str
    outcome: Finding | None


def write_base(
    checkpoint: Checkpoint,
    surgeon: Surgeon[Finding],
    sheets: list[Sheet],
    folder: Path,
    num_workers: int,
    watcher: Watcher,
) -> list[Written[Finding]]:
    """Write every file of the base, tensors in parallel; what is reported was read back from the file."""
    total = sum(sheet.form.size for sheet in sheets)
    watcher.stage("write", sum(len(sheet.form.tensors) for sheet in sheets), total)
    written: list[Written[Finding]] = []
    for start in range(0, len(sheets), OPEN_FILES):
        with ExitStack() as files:
            places = [
                Place(sheet.name, descriptor, entry, sheet.sources.get(entry.name, entry.name))
                for sheet in sheets[start : start + OPEN_FILES]
                for descriptor in [files.enter_context(_headed(folder, sheet))]
                for entry in sheet.form.tensors.values()
            ]
            places = _in_turns(places)
            task = partial(_write_one, checkpoint, surgeon)
            written += run(
                task, places, num_workers, lambda one: watcher.finished(one.name, one.entry.num_bytes)
            )
    return written


@dataclass(frozen=True)
class Place:
    """Where one tensor goes, and which one of the old base it is copied from if it does not change."""

    file: str
    descriptor: int
    entry: TensorEntry
    source: str

    @property
    def name(self) -> str:
        """The name of the tensor."""
        return self.entry.name


def _in_turns(places: Iterable[Place]) -> list[Place]:
    """The largest of each file, then the next of each: a file lets one thread write at a time, the others wait."""
    of_file: defaultdict[str, list[Place]] = defaultdict(list)
    for place in sorted(places, key=lambda place: -place.entry.num_bytes):
        of_file[place.file].append(place)
    return [place for turn in zip_longest(*of_file.values()) for place in turn if place is not None]


@contextmanager
def _headed(folder: Path, sheet: Sheet) -> Iterator[int]:
    """A new file of the base with its header in place, to be filled."""
    with new_file(folder / sheet.name, sheet.form.size) as descriptor:
        pwrite_all(descriptor, memoryview(sheet.form.header), 0)
        yield descriptor


def _write_one(checkpoint: Checkpoint, surgeon: Surgeon[Finding], place: Place) -> Written[Finding]:
    descriptor, entry = place.descriptor, place.entry
    if not surgeon.takes(entry.name):
        with Reader(checkpoint.shards[checkpoint.shard_of(place.source)]) as reader:
            sha256 = _put(place, reader.chunks(place.source, CHUNK))
        return Written(entry.name, place.file, entry.dtype, sha256, None)
    patient = surgeon.prepare(entry.name)
    sha256 = _put(place, map(raw_bytes, patient.pieces(entry.dtype)))
    found = patient.examine(lambda start, stop: _rows(descriptor, entry, start, stop))
    return Written(entry.name, place.file, entry.dtype, sha256, found)


def _put(place: Place, buffers: Iterable[memoryview]) -> str:
    """Write a tensor and read it back at once, while it is in the cache; its hash."""
    digest, offset, room = hashlib.sha256(), place.entry.begin, bytearray()
    for buffer in buffers:
        for start in range(0, len(buffer), CHUNK):
            chunk = buffer[start : start + CHUNK]
            room = room if len(room) == len(chunk) else bytearray(len(chunk))
            pwrite_all(place.descriptor, chunk, offset)
            _read_into(place.descriptor, memoryview(room), offset)
            if room != chunk:
                where = f"{place.file}: {place.name}"
                raise IntegrityError(
                    "read back other than written", where, "the disk or the memory may be failing"
                )
            digest.update(chunk)
            offset += len(chunk)
    if offset != place.entry.end:
        raise ValueError(f"{place.name}: {offset - place.entry.begin} of {place.entry.num_bytes} bytes")
    return digest.hexdigest()


def require_finite(Q: Tensor, name: str, dtype: str) -> None:
    """Refuse a result that its dtype cannot hold: the extremes tell, forty times as fast as a look at each entry.

    Raises:
        NumericalError: an entry is NaN or infinite.
    """
    if Q.numel() and not all(math.isfinite(float(bound)) for bound in torch.aminmax(Q)):
        raise too_large(name, dtype)


def too_large(name: str, dtype: str) -> NumericalError:
    """The error for a result that its dtype cannot hold."""
    return NumericalError(f"does not fit {dtype}", name, "choose a wider --dtype")


def _rows(descriptor: int, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor in the file."""
    width = entry.num_bytes // entry.shape[0]
    raw = bytearray((stop - start) * width)
    _read_into(descriptor, memoryview(raw), entry.begin + start * width)
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])


def _read_into(descriptor: int, room: memoryview, offset: int) -> None:
    while room:
        num_read = os.preadv(descriptor, [room], offset)
        if not num_read:
            raise IntegrityError("cut short by somebody else while kasa wrote it")
        room, offset = room[num_read:], offset + num_read


def write_tensors(
    path: Path,
    layout: Form,
    measured: Iterable[Measured],
    make: Callable[[Measured], dict[str, Tensor]],
    watcher: Watcher,
) -> None:
    """Fill a file of small tensors, those of one target after another."""
    items = list(measured)
    watcher.stage(path.parent.name, len(items), len(items))
    with filling(path, layout) as file:
        for one in items:
            for name, tensor in make(one).items():
                file.put(name, tensor)
            watcher.finished(one.target.name, 1)
