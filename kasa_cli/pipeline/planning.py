"""DECIDE: from headers, names and options to a plan; no weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from kasa_cli.checkpoint.container import BITS
from kasa_cli.checkpoint.known_names import names_of
from kasa_cli.checkpoint.layout import Checkpoint, open_checkpoint
from kasa_cli.checkpoint.manifest import numeric_environment
from kasa_cli.checkpoint.names import NameMap
from kasa_cli.checkpoint.quantized import refuse_quantised
from kasa_cli.checkpoint.source import Source, resolve
from kasa_cli.checkpoint.store import opened
from kasa_cli.checkpoint.targets import Patterns, RankRule, select
from kasa_cli.checkpoint.targets import patterns as asked_for
from kasa_cli.errors import UsageError
from kasa_cli.linalg.subspace import DENSE_SIDE
from kasa_cli.pipeline.facts import Facts
from kasa_cli.pipeline.job import Running, Where
from kasa_cli.pipeline.weights import Matrix, stored_shape, working_set
from kasa_cli.pipeline.workers import BUDGET
from kasa_cli.report import Candidate, MeasurePlan, Piece, Selection, Skipped, Target, ToMeasure

RUNTIME_BYTES = 400 << 20
"""What torch and transformers occupy before the first tensor."""
STREAMED_ROOM = 28 << 20
"""What a worker occupies that adds to a tensor as it streams by, and writes it."""
START_SECONDS, STREAMED_BYTES_PER_SECOND = 3.0, 4e8
"""Of a merge: imports, and what a worker reads, adds to, hashes and writes."""
GRAM_FLOPS_PER_SECOND = 4e10
"""A rank-k update of float64 on one core of a server of 2023: an estimate is all that a plan asks of it."""


@dataclass(frozen=True)
class Plan:
    """A checkpoint, its names, and what is to be done to it."""

    source: Source
    checkpoint: Checkpoint
    names: NameMap
    selection: Selection


def make_plan(
    where: Where,
    patterns: Patterns,
    from_file: Path | None,
    rank_rule: RankRule,
    facts: Facts | None = None,
) -> Plan:
    """Find the model, check every header, map the names and choose the targets."""
    source, checkpoint, names = survey(where, facts)
    patterns = asked_for(patterns.targets, patterns.excludes, from_file)
    return Plan(source, checkpoint, names, select(checkpoint.tensors, names.slots, patterns, rank_rule))


def survey(where: Where, facts: Facts | None = None) -> tuple[Source, Checkpoint, NameMap]:
    """The model behind a name: its files, checked, and the modules its tensors belong to.

    These may be known from the store of `facts`, and are kept there; without it, nothing is written.
    """
    source, checkpoint = find(where)
    refuse_quantised(checkpoint.config, checkpoint.tensors, where.model)
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    return source, checkpoint, names_of(checkpoint.config, shapes, facts.store if facts else None)


def find(where: Where) -> tuple[Source, Checkpoint]:
    """The model's files, every header checked."""
    source = resolve(
        where.model,
        revision=where.revision,
        cache_dir=where.cache_dir,
        local_files_only=where.local_files_only,
    )
    return source, open_checkpoint(source.root, hub_cache=source.hub_cache)


def require_rank(targets: tuple[Target, ...], rank: int, what: str) -> None:
    """Refuse a rank that some target cannot have.

    Raises:
        UsageError: naming the first such target.
    """
    for target in targets:
        if rank >= min(target.shape):
            raise UsageError(
                f"{what} {rank} is not below the smaller side of {target.shape[0]} x {target.shape[1]}",
                target.name,
                f"lower it, or --exclude {target.module}",
            )


def measure_plan(
    command: str,
    where: Where,
    found: tuple[Checkpoint, NameMap],
    chosen: tuple[Candidate, ...],
    skipped: tuple[Skipped, ...],
    running: Running,
) -> MeasurePlan:
    """What a question would read and cost, from headers alone."""
    checkpoint, names = found
    tensors, sizes, shapes = [], [], []
    for one in chosen:
        for matrix in matrices(one):
            entry, shape = checkpoint.tensors[matrix.pieces[0].name], stored_shape(checkpoint, matrix)
            num_bytes = prod(shape) * BITS[entry.dtype] // 8
            tensors.append(ToMeasure(matrix.name, one.module, shape, entry.dtype))
            sizes.append(working_set(shape, num_bytes))
            shapes.append(shape)
    return MeasurePlan(
        command=command,
        model=where.model,
        tensors=tuple(tensors),
        skipped=skipped,
        totals={
            "tensors": len(tensors),
            "tensors_skipped": len(skipped),
            "bytes_to_write": 0,
            **decomposition_cost(shapes, sizes, running.num_workers),
        },
        notes=(names.note,) if names.note else (),
    )


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError("no such device here", name, "use --device cpu")
    return torch.device(name)


def open_facts(running: Running) -> Facts:
    """What earlier runs found in the same numerical environment; or nothing, without a store."""
    store = opened(running.store) if running.use_store else None
    environment = numeric_environment(running.threads_per_worker, pick_device(running.device).type)
    return Facts(store, environment)


def store_notes(facts: Facts) -> list[str]:
    """What a user should know of the store: that it would not keep what was found."""
    trouble = facts.store.trouble if facts.store else None
    if trouble is None:
        return []
    where = f" ({trouble.where})" if trouble.where else ""
    return [
        f"the store could not keep everything, so the next run measures some again: {trouble.what}{where}"
    ]


def decomposition_cost(
    shapes: Sequence[tuple[int, int]], rooms: Sequence[int], num_workers: int
) -> dict[str, float]:
    """Peak bytes and wall seconds expected of decomposing weights that occupy so many bytes each."""
    largest = sorted([0, *rooms])[-num_workers:]
    work = sum(min(shape) ** 2 * sum(shape) for shape in shapes)
    return {
        "memory_bytes": RUNTIME_BYTES + max(largest[-1], min(sum(largest), BUDGET)),
        "seconds": round(2.5 * work / GRAM_FLOPS_PER_SECOND / num_workers, 1),
    }


def streaming_cost(num_bytes: int, held: int, num_workers: int) -> dict[str, float]:
    """Peak bytes and wall seconds expected of a pass over a base of so many bytes, by `benchmarks/merge.py`.

    `held`: bytes that a worker holds of one tensor, beside the rows in work.
    """
    seconds = START_SECONDS + num_bytes / STREAMED_BYTES_PER_SECOND / num_workers
    return {
        "memory_bytes": RUNTIME_BYTES + num_workers * (STREAMED_ROOM + held),
        "seconds": round(seconds, 1),
    }


def memory_needed(targets: tuple[Target, ...], num_workers: int) -> int:
    """Peak bytes expected: the runtime, and for each worker its weight twice, two Gram matrices and panels."""
    largest = max((_working_set(target) for target in targets), default=0)
    return RUNTIME_BYTES + num_workers * largest


def seconds_needed(targets: tuple[Target, ...], num_workers: int) -> float:
    """Wall seconds expected, from the multiplications alone; within a factor of a few."""
    return 2.5 * sum(target.work for target in targets) / GRAM_FLOPS_PER_SECOND / num_workers


def _working_set(target: Target) -> int:
    short, long = sorted(target.shape)
    element = 4 if target.dtype == "F32" else 2
    return 2 * element * short * long + 2 * 8 * max(short, DENSE_SIDE) ** 2 + (64 << 20)


def matrices(candidate: Candidate) -> list[Matrix]:
    """The weights of a candidate, by the name of their first tensor, and where a tensor holds several, its index."""
    return [
        Matrix(_matrix_name(candidate, number, pieces), pieces, candidate.is_transposed)
        for number, pieces in enumerate(candidate.matrices)
    ]


def _matrix_name(candidate: Candidate, number: int, pieces: tuple[Piece, ...]) -> str:
    if len(pieces) == 1 and pieces[0].index is None:
        return pieces[0].name
    return f"{candidate.module}[{number}]"


def require_some(chosen: tuple[Candidate, ...]) -> None:
    """Refuse a question that is about nothing.

    Raises:
        UsageError: there is no candidate.
    """
    if not chosen:
        raise UsageError("no weight is left to look at", "", "name some with --target")
