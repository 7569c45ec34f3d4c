"""OPERATE: a base with some tensors changed, and files of small new tensors; each tensor in memory once.

What is reported of a tensor was measured on what the file holds.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kasa_cli.checkpoint.container import Reader, TensorEntry
from kasa_cli.checkpoint.durable import new_file, pwrite_all
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.sheets import Sheet
from kasa_cli.checkpoint.streaming import TORCH_DTYPES, Form, filling, raw_bytes
from kasa_cli.errors import NumericalError
from kasa_cli.pipeline.measure import Measured
from kasa_cli.pipeline.workers import Watcher, run

CHUNK = 16 << 20
OPEN_FILES = 64
"""Shards written at once: enough to keep all workers busy, far below what a process may have open."""


Rows = Callable[[int, int], Tensor]
"""Rows [start, stop) of a stored matrix, or entries of a stored vector."""
Finding = TypeVar("Finding", covariant=True)


class Patient(Protocol[Finding]):
    """One tensor on the table: what it becomes, and what is to be measured on it once it is stored."""

    def operate(self, dtype: str) -> Tensor:
        """The new value, rounded once to `dtype`, in the layout of the file."""

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
                Place(sheet.name, descriptor, entry)
                for sheet in sheets[start : start + OPEN_FILES]
                for descriptor in [files.enter_context(_headed(folder, sheet))]
                for entry in sheet.form.tensors.values()
            ]
            places.sort(key=lambda place: -place.entry.num_bytes)
            task = partial(_write_one, checkpoint, surgeon)
            written += run(
                task, places, num_workers, lambda one: watcher.finished(one.name, one.entry.num_bytes)
            )
    return written


@dataclass(frozen=True)
class Place:
    """Where one tensor goes."""

    file: str
    descriptor: int
    entry: TensorEntry

    @property
    def name(self) -> str:
        """The name of the tensor."""
        return self.entry.name


@contextmanager
def _headed(folder: Path, sheet: Sheet) -> Iterator[int]:
    """A new file of the base with its header in place, to be filled."""
    with new_file(folder / sheet.name, sheet.form.size) as descriptor:
        pwrite_all(descriptor, memoryview(sheet.form.header), 0)
        yield descriptor


def _write_one(checkpoint: Checkpoint, surgeon: Surgeon[Finding], place: Place) -> Written[Finding]:
    file, descriptor, entry = place.file, place.descriptor, place.entry
    if not surgeon.takes(entry.name):
        return Written(entry.name, file, entry.dtype, _copy(checkpoint, entry, descriptor), None)
    patient = surgeon.prepare(entry.name)
    pwrite_all(descriptor, raw_bytes(patient.operate(entry.dtype)), entry.begin)
    found = patient.examine(lambda start, stop: _rows(descriptor, entry, start, stop))
    return Written(entry.name, file, entry.dtype, _digest(descriptor, entry), found)


def _copy(checkpoint: Checkpoint, entry: TensorEntry, descriptor: int) -> str:
    """Copy the bytes of a tensor; their hash."""
    digest, offset = hashlib.sha256(), entry.begin
    with Reader(checkpoint.shards[checkpoint.shard_of(entry.name)]) as reader:
        for chunk in reader.chunks(entry.name, CHUNK):
            pwrite_all(descriptor, memoryview(chunk), offset)
            digest.update(chunk)
            offset += len(chunk)
    return digest.hexdigest()


def require_finite(Q: Tensor, name: str, dtype: str) -> None:
    """Refuse a result that its dtype cannot hold: the extremes tell, forty times as fast as a look at each entry.

    Raises:
        NumericalError: an entry is NaN or infinite.
    """
    if Q.numel() and not all(math.isfinite(float(bound)) for bound in torch.aminmax(Q)):
        raise NumericalError(f"does not fit {dtype}", name, "choose a wider --dtype")


def _rows(descriptor: int, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor in the file."""
    width = entry.num_bytes // entry.shape[0]
    raw = bytearray((stop - start) * width)
    _read_into(descriptor, memoryview(raw), entry.begin + start * width)
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])


def _digest(descriptor: int, entry: TensorEntry) -> str:
    digest, room = hashlib.sha256(), memoryview(bytearray(min(CHUNK, entry.num_bytes)))
    for offset in range(entry.begin, entry.end, CHUNK):
        piece = room[: entry.end - offset]
        _read_into(descriptor, piece, offset)
        digest.update(piece)
    return digest.hexdigest()


def _read_into(descriptor: int, room: memoryview, offset: int) -> None:
    while room:
        num_read = os.preadv(descriptor, [room], offset)
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
