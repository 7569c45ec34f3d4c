"""Converts every patch of an adapter into the factors of a plain LoRA, keeps them as parts, and writes one file.

All factors together may exceed the memory, and the common rank of the file is known only after the last conversion.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from kasa_cli.adapters import Adapter, FactorEntry, Placed
from kasa_cli.checkpoint import (
    BITS,
    Checkpoint,
    FactorRecord,
    Filling,
    OpenFiles,
    filling,
    hash_tensor,
    lay_out,
    measuring_bytes,
    read_header,
)
from kasa_cli.errors import IntegrityError, InvalidInput, NumericalError
from kasa_cli.files import Staging, canonical_json
from kasa_cli.methods.adapter_kinds import Change, Compact, Limit, Term, of_terms, of_weight
from kasa_cli.pipeline.adapter_on_base import changes_of, label, needs_weight, weight_under
from kasa_cli.pipeline.converting.case import TruncationTerms
from kasa_cli.pipeline.converting.representable import no_form
from kasa_cli.pipeline.measuring import SOLVER_EDITION, Facts, header
from kasa_cli.pipeline.workers import Task, Watcher, run_stage
from kasa_cli.report import ConvertedRow


@dataclass(frozen=True)
class Converter:
    """The inputs of the conversion of a patch. `truncation` is None if the update is that of the adapter alone."""

    adapter: Adapter
    files: OpenFiles
    checkpoint: Checkpoint
    facts: Facts
    staging: Staging
    limit: Limit
    truncation: TruncationTerms | None


@dataclass(frozen=True)
class Converted:
    """A converted patch: the key of its factors, the hashes of the base's tensors, and the measurements.

    `norm` is the Frobenius norm of the update, `error` that of its difference from the stored factors.
    """

    place: Placed
    key: str
    hashes: Mapping[str, str]
    rank: int
    exact_rank: int | None
    norm: float
    error: float

    @property
    def loss(self) -> float:
        """The error, relative to the update."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def row(self) -> ConvertedRow:
        """The row of the report."""
        return ConvertedRow(
            label(self.place.patch), tuple(self.hashes), self.rank, self.exact_rank, self.norm, self.loss
        )


def loss_of_all(results: Sequence[Converted]) -> float:
    """The error of all updates together, relative to their norm."""
    norm, error = (
        math.hypot(*(result.norm for result in results)),
        math.hypot(*(result.error for result in results)),
    )
    return error / norm if norm else 0.0


def convert_all(
    converter: Converter, places: Sequence[Placed], num_workers: int, watcher: Watcher
) -> list[Converted]:
    """Convert every patch and keep its factors as a part; results are in the given order.

    Raises:
        InvalidInput: naming the module that no plain LoRA can express.
    """
    task = Task(
        partial(_convert, converter),
        name=lambda place: place.patch.module,
        work=lambda place: math.prod(place.shape),
        memory=partial(working_room, converter.checkpoint),
    )
    return run_stage("convert", task, places, num_workers, watcher)


def write_factors(
    path: Path,
    metadata: tuple[str, str],
    items: Sequence[tuple[Converted, list[FactorEntry]]],
    rank: int,
    staging: Staging,
    run_on: tuple[int, Watcher],
) -> dict[str, FactorRecord]:
    """Write all factors at one rank; returns dtype, shape and hash of every tensor by name.

    `run_on` is the number of workers and the watcher.
    """
    num_workers, watcher = run_on
    layout = lay_out(
        [shape for _, entries in items for entry in entries for shape in entry.shapes(rank)], metadata
    )
    with filling(path, layout) as file:
        task = Task(partial(_write, file, rank, staging), name=lambda item: item[0].place.patch.module)
        run_stage("write", task, items, num_workers, watcher)
    container = read_header(path)
    return {
        name: FactorRecord(entry.dtype, entry.shape, hash_tensor(container, name))
        for name, entry in container.tensors.items()
    }


def _convert(converter: Converter, place: Placed) -> Converted:
    names = dict.fromkeys(part.piece.name for parts in place.matrices for part in parts)
    hashes = {name: hash_tensor(converter.checkpoint, name) for name in names}
    key = _part_key(place, hashes)
    if converter.staging.part(key) is None:
        converter.staging.keep_part(key, _convert_one(converter, place))
    payload = _payload(converter.staging, key, place)
    return Converted(place, key, hashes, **header(payload))


def _convert_one(converter: Converter, place: Placed) -> bytes:
    """The factors of a patch, packed, with their measurements."""
    weight = cache(partial(weight_under, converter.checkpoint, place))
    try:
        tensors = converter.files.tensors(converter.adapter.container, place.patch.tensors)
        changes = changes_of(tensors, place, weight)
        compacts = [_compact(converter, place, change, weight) for change in changes]
    except (InvalidInput, NumericalError) as error:
        module = place.patch.module
        where = error.where if module in error.where else f"{module}: {error.where}".removesuffix(": ")
        raise type(error)(error.what, where, error.remedy) from error
    return _packed(compacts, place.is_transposed)


def _packed(compacts: Sequence[Compact], is_transposed: bool) -> bytes:
    """The factors in the orientation of the weight in memory: left (e x rows x n), right (e x n x columns)."""
    rank = max(compact.B.shape[1] for compact in compacts)
    pairs = [(compact.A.T, compact.B.T) if is_transposed else (compact.B, compact.A) for compact in compacts]
    left = torch.stack([torch.nn.functional.pad(pair, (0, rank - pair.shape[1])) for pair, _ in pairs])
    right = torch.stack([torch.nn.functional.pad(pair, (0, 0, 0, rank - len(pair))) for _, pair in pairs])
    exact = [compact.exact_rank for compact in compacts if compact.exact_rank is not None]
    fields = {
        "rank": rank,
        "exact_rank": max(exact) if exact else None,
        "norm": math.hypot(*(compact.norm for compact in compacts)),
        "error": math.hypot(*(compact.error for compact in compacts)),
    }
    return save({"left": left, "right": right}, {"kasa": json.dumps(fields, sort_keys=True)})


def _compact(converter: Converter, place: Placed, change: Change, weight: Callable[[], Tensor]) -> Compact:
    terms, limit = _terms(change, weight), converter.limit
    if terms is not None:
        truncation = converter.truncation
        truncated = truncation.terms(converter.checkpoint, converter.facts, place) if truncation else ()
        return of_terms((*terms, *truncated), limit)
    if not limit.is_set:
        raise no_form(place)
    return of_weight(weight(), change, limit)


def _terms(change: Change, weight: Callable[[], Tensor]) -> tuple[Term, ...] | None:
    """The whole change as low-rank terms; None if it is not a sum of such terms."""
    if change.is_low_rank:
        return change.terms
    return (change.of_weight(weight()),) if change.of_weight else None


def _write(file: Filling, rank: int, staging: Staging, item: tuple[Converted, list[FactorEntry]]) -> None:
    result, entries = item
    tensors = load(_payload(staging, result.key, result.place))
    for entry in entries:
        for name, tensor in entry.tensors(tensors["left"], tensors["right"], rank).items():
            file.put(name, tensor)


def _payload(staging: Staging, key: str, place: Placed) -> bytes:
    path = staging.part(key)
    if path is None:
        raise IntegrityError(
            "a finished part is altered on disk", place.patch.module, "run the command again"
        )
    return path.read_bytes()


def _part_key(place: Placed, hashes: Mapping[str, str]) -> str:
    """The key of the factors within a job; the job itself determines the adapter and the options."""
    patch = place.patch
    about = [SOLVER_EDITION, patch.module, patch.parameter, patch.depth, sorted(hashes.items())]
    return hashlib.sha256(canonical_json({"part": about})).hexdigest()


def working_room(checkpoint: Checkpoint, place: Placed) -> int:
    """Bytes that a conversion needs at most: for a decomposition, and for the difference in float32."""
    entry = checkpoint.tensors[place.matrices[0][0].piece.name]
    size = math.prod(place.shape)
    return measuring_bytes(place.shape, size * BITS[entry.dtype] // 8) + 4 * size


def is_decomposed(place: Placed, truncation: TruncationTerms | None) -> bool:
    """Whether a conversion may decompose a matrix: a weight of the original base, or a dense update."""
    patch = place.patch
    is_low_rank = patch.row.is_low_rank(patch.settings)
    return needs_weight(patch) or not is_low_rank or (truncation is not None and not truncation.is_made)
