"""OPERATE: a base with some tensors changed, and files of small new tensors; each tensor in memory once.

What is reported of a tensor was measured on what the file holds.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kasa_cli.checkpoint.container import Reader, TensorEntry
from kasa_cli.checkpoint.durable import new_file, pwrite_all
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.sheets import Sheet
from kasa_cli.checkpoint.staging import Staging
from kasa_cli.checkpoint.streaming import TORCH_DTYPES, Form, raw_bytes
from kasa_cli.errors import NumericalError
from kasa_cli.linalg import rounding
from kasa_cli.linalg.outcome import Outcome, outcome
from kasa_cli.methods import kasa
from kasa_cli.pipeline.measure import Measured, as_weight, read_factors, read_target
from kasa_cli.pipeline.workers import Watcher, run

CHUNK = 16 << 20


@dataclass(frozen=True)
class Written:
    """One tensor as it stands in the new base. `outcome` is None for a copied one."""

    name: str
    file: str
    dtype: str
    sha256: str
    outcome: Outcome | None


@dataclass(frozen=True)
class Surgeon:
    """Everything that one changed tensor needs."""

    checkpoint: Checkpoint
    staging: Staging
    measured: Mapping[str, Measured]
    round_off: rounding.Rounding

    def operate(self, entry: TensorEntry) -> Tensor:
        """The new value of a target, in the dtype of `entry`: W plus its terms, rounded once."""
        measured = self.measured[entry.name]
        factors = read_factors(self.staging, measured)
        stored = self.read(measured)
        L, R = kasa.cut(factors)
        target = rounding.Target(as_weight(stored, measured.target), L, R)
        Q = self.round_off(target, factors.V, TORCH_DTYPES[entry.dtype])
        if not bool(torch.isfinite(Q).all()):
            raise NumericalError(f"does not fit {entry.dtype}", entry.name, "choose a wider --dtype")
        return as_weight(Q, measured.target).contiguous()

    def read(self, measured: Measured) -> Tensor:
        """The original of a target, which must be what was measured."""
        return read_target(self.checkpoint, measured.target.name)

    def examine(self, entry: TensorEntry, rows: Callable[[int, int], Tensor]) -> Outcome:
        """Measure what was stored against the original. `rows` reads rows of the stored tensor."""
        measured = self.measured[entry.name]
        factors = read_factors(self.staging, measured)
        L, R = kasa.cut(factors)
        target = rounding.Target(as_weight(self.read(measured), measured.target), L, R)
        if measured.target.is_transposed:
            whole = rows(0, entry.shape[0]).T
            return outcome(lambda start, stop: whole[start:stop], target, factors.V, factors.S)
        return outcome(rows, target, factors.V, factors.S)


def write_base(
    surgeon: Surgeon, sheets: list[Sheet], folder: Path, num_workers: int, watcher: Watcher
) -> list[Written]:
    """Write every file of the base, tensors in parallel; what is reported was read back from the file."""
    total = sum(sheet.form.size for sheet in sheets)
    watcher.stage("write", sum(len(sheet.form.tensors) for sheet in sheets), total)
    written: list[Written] = []
    for sheet in sheets:
        with new_file(folder / sheet.name, sheet.form.size) as descriptor:
            pwrite_all(descriptor, memoryview(sheet.form.header), 0)
            written += run(
                partial(_write_one, surgeon, sheet.name, descriptor),
                sorted(sheet.form.tensors.values(), key=lambda entry: -entry.num_bytes),
                num_workers,
                lambda entry: watcher.finished(entry.name, entry.num_bytes),
            )
    return written


def _write_one(surgeon: Surgeon, file: str, descriptor: int, entry: TensorEntry) -> Written:
    if entry.name not in surgeon.measured:
        digest = _copy(surgeon.checkpoint, entry, descriptor)
        return Written(entry.name, file, entry.dtype, digest, None)
    pwrite_all(descriptor, raw_bytes(surgeon.operate(entry)), entry.begin)
    measured = surgeon.examine(entry, lambda start, stop: _rows(descriptor, entry, start, stop))
    return Written(entry.name, file, entry.dtype, _digest(descriptor, entry), measured)


def _copy(checkpoint: Checkpoint, entry: TensorEntry, descriptor: int) -> str:
    """Copy the bytes of a tensor; their hash."""
    digest, offset = hashlib.sha256(), entry.begin
    with Reader(checkpoint.shards[checkpoint.shard_of(entry.name)]) as reader:
        for chunk in reader.chunks(entry.name, CHUNK):
            pwrite_all(descriptor, memoryview(chunk), offset)
            digest.update(chunk)
            offset += len(chunk)
    return digest.hexdigest()


def _rows(descriptor: int, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a matrix in the file."""
    width = entry.num_bytes // entry.shape[0]
    raw = bytearray(_pread(descriptor, (stop - start) * width, entry.begin + start * width))
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).view(stop - start, -1)


def _digest(descriptor: int, entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    for offset in range(entry.begin, entry.end, CHUNK):
        digest.update(_pread(descriptor, min(CHUNK, entry.end - offset), offset))
    return digest.hexdigest()


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    parts = []
    while size:
        parts.append(os.pread(descriptor, size, offset))
        size, offset = size - len(parts[-1]), offset + len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)


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
    with new_file(path, layout.size) as descriptor:
        pwrite_all(descriptor, memoryview(layout.header), 0)
        for one in items:
            for name, tensor in make(one).items():
                pwrite_all(descriptor, raw_bytes(tensor), layout.tensors[name].begin)
            watcher.finished(one.target.name, 1)
