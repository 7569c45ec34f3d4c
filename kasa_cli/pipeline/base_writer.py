"""OPERATE: a base with some tensors changed, and files of small new tensors; each tensor in memory once.

What is reported of a tensor was measured on what the file holds.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kasa_cli.checkpoint.dtypes import TORCH_DTYPES
from kasa_cli.checkpoint.hashing import blake3
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.safetensors_file import Reader, TensorEntry
from kasa_cli.checkpoint.safetensors_writer import raw_bytes
from kasa_cli.checkpoint.shard_plan import Sheet
from kasa_cli.errors import NumericalError
from kasa_cli.files.direct_io import Lanes, Opened, opened_directly
from kasa_cli.files.durable import new_file, pread_all, pwrite_all
from kasa_cli.pipeline.workers import Watcher, run

CHUNK = 1 << 20
"""Bytes put on their way and hashed while they are in the cache of one core."""
OPEN_FILES = 16
"""Files filled at once: enough to keep all workers busy, far below what a process may have open."""


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
    blake3: str
    outcome: Finding | None


@dataclass(frozen=True)
class Place:
    """Where one tensor goes, and which one of the old base it is copied from if it does not change."""

    file: str
    opened: Opened
    entry: TensorEntry
    source: str

    @property
    def name(self) -> str:
        """The name of the tensor."""
        return self.entry.name


@dataclass(frozen=True)
class NewBase(Generic[Finding]):
    """A base that was written: its tensors with their hashes, and by file the hash of all else in it, its header."""

    tensors: list[Written[Finding]]
    header_sha256: Mapping[str, str]


def write_base(
    checkpoint: Checkpoint,
    surgeon: Surgeon[Finding],
    sheets: list[Sheet],
    folder: Path,
    num_workers: int,
    watcher: Watcher,
) -> NewBase[Finding]:
    """Write every file of the base; what is reported was read back from it.

    The tensors of some files at a time go in parallel, the largest files first.
    """
    total = sum(sheet.form.size for sheet in sheets)
    watcher.stage("write", sum(len(sheet.form.tensors) for sheet in sheets), total)
    operation = _Operation(checkpoint, surgeon, folder)
    written: list[Written[Finding]] = []
    ordered = sorted(sheets, key=lambda sheet: -sheet.form.size)
    for start in range(0, len(sheets), OPEN_FILES):
        with ExitStack() as files:
            places = [
                place
                for sheet in ordered[start : start + OPEN_FILES]
                for place in _places(sheet, files.enter_context(operation.headed(sheet)))
            ]
            written += run(
                operation.write_one,
                _in_turns(places),
                num_workers,
                lambda place: watcher.finished(place.name, place.entry.num_bytes),
            )
    headers = {sheet.name: hashlib.sha256(sheet.form.header).hexdigest() for sheet in sheets}
    return NewBase(written, headers)


def _places(sheet: Sheet, opened: Opened) -> list[Place]:
    """The tensors of a file, in the order of their bytes."""
    entries = sorted(sheet.form.tensors.values(), key=lambda entry: entry.begin)
    return [Place(sheet.name, opened, one, sheet.sources.get(one.name, one.name)) for one in entries]


def _in_turns(places: Iterable[Place]) -> list[Place]:
    """The largest of each file, then the next of each: a file lets one thread write at a time, the others wait."""
    of_file: defaultdict[str, list[Place]] = defaultdict(list)
    for place in sorted(places, key=lambda place: -place.entry.num_bytes):
        of_file[place.file].append(place)
    return [place for turn in zip_longest(*of_file.values()) for place in turn if place is not None]


@dataclass(frozen=True)
class _Operation(Generic[Finding]):
    checkpoint: Checkpoint
    surgeon: Surgeon[Finding]
    folder: Path
    lanes: Lanes = field(default_factory=Lanes)

    @contextmanager
    def headed(self, sheet: Sheet) -> Iterator[Opened]:
        """A new file of the base with its header in place, to be filled."""
        with new_file(self.folder / sheet.name, sheet.form.size) as descriptor:
            pwrite_all(descriptor, memoryview(sheet.form.header), 0)
            with opened_directly(descriptor) as opened:
                yield opened

    def write_one(self, place: Place) -> Written[Finding]:
        """A tensor, changed or copied."""
        entry = place.entry
        if not self.surgeon.takes(entry.name):
            with Reader(self.checkpoint.shards[self.checkpoint.shard_of(place.source)]) as reader:
                digest = self.put(place, reader.chunks(place.source, CHUNK))
            return Written(entry.name, place.file, entry.dtype, digest, None)
        patient = self.surgeon.prepare(entry.name)
        digest = self.put(place, map(raw_bytes, patient.pieces(entry.dtype)))
        found = patient.examine(lambda start, stop: _rows(place.opened, entry, start, stop))
        return Written(entry.name, place.file, entry.dtype, digest, found)

    def put(self, place: Place, buffers: Iterable[memoryview]) -> str:
        """Write a tensor, of which every byte is read back; its hash."""
        digest, entry = blake3(), place.entry
        where = f"{place.file}: {place.name}"
        with self.lanes.stretch(place.opened, entry.begin, entry.end, where) as out:
            for buffer in buffers:
                for start in range(0, len(buffer), CHUNK):
                    chunk = buffer[start : start + CHUNK]
                    out.put(chunk)
                    digest.update(chunk)
        if out.at != entry.end:
            raise ValueError(f"{place.name}: {out.at - entry.begin} of {entry.num_bytes} bytes")
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
    is_half = TORCH_DTYPES[dtype].itemsize <= 2
    return NumericalError(f"does not fit {dtype}", name, "choose a wider --dtype" if is_half else "")


def _rows(opened: Opened, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor in the file."""
    width = entry.num_bytes // entry.shape[0]
    raw = bytearray((stop - start) * width)
    pread_all(opened.descriptor, memoryview(raw), entry.begin + start * width)
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])
