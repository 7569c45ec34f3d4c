"""Writes a new base: rewritten tensors and copies, each hashed and read back.

The checks on a rewritten tensor are computed from the bytes that its file holds.
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

from kasa_cli.checkpoint import TORCH_DTYPES, Checkpoint, Sheet, TensorEntry, blake3, raw_bytes
from kasa_cli.errors import NumericalError
from kasa_cli.files import Lanes, OpenFile, new_file, opened_directly, pread_all, pwrite_all
from kasa_cli.pipeline.workers import Watcher, run

CHUNK = 1 << 20
"""Bytes written and hashed in one go, while they are in the cache of one core."""
OPEN_FILES = 16
"""Number of files filled at once: enough to keep all workers busy, far below a process's limit of open files."""


RowReader = Callable[[int, int], Tensor]
"""Reads rows [start, stop) of a stored matrix, or entries of a stored vector."""
Checks = TypeVar("Checks", covariant=True)


class TensorRewrite(Protocol[Checks]):
    """The new value of one tensor, and the checks on its stored bytes."""

    def pieces(self, dtype: str) -> Iterator[Tensor]:
        """The new value, rounded once to `dtype`, in the layout of the file, from its first byte to its last.

        Each piece is used before the next is requested: pieces may share memory.
        """

    def check(self, rows: RowReader) -> Checks:
        """Compare the stored tensor with the exact value."""


class Rewriter(Protocol[Checks]):
    """Decides which tensors are rewritten, and how."""

    def rewrites(self, name: str) -> bool:
        """Whether a tensor changes."""

    def prepare(self, name: str) -> TensorRewrite[Checks]:
        """Read a tensor and everything its change needs."""


@dataclass(frozen=True)
class WrittenTensor(Generic[Checks]):
    """One tensor of the new base. `checks` is None for a copied tensor."""

    name: str
    file: str
    dtype: str
    blake3: str
    checks: Checks | None


@dataclass(frozen=True)
class Destination:
    """The place of one tensor in the new base, and the tensor of the old base that it comes from."""

    file: str
    target: OpenFile
    entry: TensorEntry
    source: str

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.entry.name


@dataclass(frozen=True)
class WrittenBase(Generic[Checks]):
    """A new base: its tensors with their hashes, and the hash of the header of each file."""

    tensors: list[WrittenTensor[Checks]]
    header_sha256: Mapping[str, str]


def write_base(
    checkpoint: Checkpoint,
    rewriter: Rewriter[Checks],
    sheets: list[Sheet],
    folder: Path,
    num_workers: int,
    watcher: Watcher,
) -> WrittenBase[Checks]:
    """Write every file of the base and read it back.

    The largest files are written first, several at once, and their tensors in parallel.
    """
    total = sum(sheet.layout.size for sheet in sheets)
    watcher.stage("write", sum(len(sheet.layout.tensors) for sheet in sheets), total)
    writer = _BaseWriter(checkpoint, rewriter, folder)
    written: list[WrittenTensor[Checks]] = []
    ordered = sorted(sheets, key=lambda sheet: -sheet.layout.size)
    for start in range(0, len(sheets), OPEN_FILES):
        with ExitStack() as files:
            destinations = [
                destination
                for sheet in ordered[start : start + OPEN_FILES]
                for destination in _destinations(sheet, files.enter_context(writer.new_file(sheet)))
            ]
            written += run(
                writer.write_tensor,
                _in_turns(destinations),
                num_workers,
                lambda destination: watcher.finished(destination.name, destination.entry.num_bytes),
            )
    headers = {sheet.name: hashlib.sha256(sheet.layout.header).hexdigest() for sheet in sheets}
    return WrittenBase(written, headers)


def _destinations(sheet: Sheet, file: OpenFile) -> list[Destination]:
    """The tensors of a file, in the order of their bytes."""
    entries = sorted(sheet.layout.tensors.values(), key=lambda entry: entry.begin)
    return [
        Destination(sheet.name, file, entry, sheet.sources.get(entry.name, entry.name)) for entry in entries
    ]


def _in_turns(destinations: Iterable[Destination]) -> list[Destination]:
    """The largest tensor of each file, then the next of each: a file accepts one writing thread at a time."""
    of_file: defaultdict[str, list[Destination]] = defaultdict(list)
    for destination in sorted(destinations, key=lambda destination: -destination.entry.num_bytes):
        of_file[destination.file].append(destination)
    turns = zip_longest(*of_file.values())
    return [destination for turn in turns for destination in turn if destination is not None]


@dataclass(frozen=True)
class _BaseWriter(Generic[Checks]):
    checkpoint: Checkpoint
    rewriter: Rewriter[Checks]
    folder: Path
    lanes: Lanes = field(default_factory=Lanes)

    @contextmanager
    def new_file(self, sheet: Sheet) -> Iterator[OpenFile]:
        """A new file of the base that holds its header and awaits its tensors."""
        with new_file(self.folder / sheet.name, sheet.layout.size) as descriptor:
            pwrite_all(descriptor, memoryview(sheet.layout.header), 0)
            with opened_directly(descriptor) as file:
                yield file

    def write_tensor(self, destination: Destination) -> WrittenTensor[Checks]:
        """Write a tensor, rewritten or copied."""
        entry, source = destination.entry, destination.source
        if not self.rewriter.rewrites(entry.name):
            digest = self.put(destination, self.checkpoint.chunks(source, CHUNK))
            return WrittenTensor(entry.name, destination.file, entry.dtype, digest, None)
        rewrite = self.rewriter.prepare(entry.name)
        digest = self.put(destination, map(raw_bytes, rewrite.pieces(entry.dtype)))
        checks = rewrite.check(lambda start, stop: _rows(destination.target, entry, start, stop))
        return WrittenTensor(entry.name, destination.file, entry.dtype, digest, checks)

    def put(self, destination: Destination, buffers: Iterable[memoryview]) -> str:
        """Write a tensor and read every byte of it back; returns its hash."""
        digest, entry = blake3(), destination.entry
        where = f"{destination.file}: {destination.name}"
        with self.lanes.stretch(destination.target, entry.begin, entry.end, where) as out:
            for buffer in buffers:
                for start in range(0, len(buffer), CHUNK):
                    chunk = buffer[start : start + CHUNK]
                    out.put(chunk)
                    digest.update(chunk)
        if out.at != entry.end:
            raise ValueError(f"{destination.name}: {out.at - entry.begin} of {entry.num_bytes} bytes")
        return digest.hexdigest()


def require_finite(Q: Tensor, name: str, dtype: str) -> None:
    """Refuse a result that its dtype cannot hold. Checking minimum and maximum is 40 times faster than every entry.

    Raises:
        NumericalError: an entry is NaN or infinite.
    """
    if Q.numel() and not all(math.isfinite(float(bound)) for bound in torch.aminmax(Q)):
        raise too_large(name, dtype)


def too_large(name: str, dtype: str) -> NumericalError:
    """The error for a result that its dtype cannot hold."""
    is_half = TORCH_DTYPES[dtype].itemsize <= 2
    return NumericalError(f"does not fit {dtype}", name, "choose a wider --dtype" if is_half else "")


def _rows(file: OpenFile, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor in a file."""
    width = entry.num_bytes // entry.shape[0]
    raw = bytearray((stop - start) * width)
    pread_all(file.descriptor, memoryview(raw), entry.begin + start * width)
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])
