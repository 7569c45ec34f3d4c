"""Forecasts of memory and time, for `--dry-run`."""

from collections.abc import Sequence

from kasa_cli.checkpoint import decomposition_work
from kasa_cli.linalg import DENSE_SIDE
from kasa_cli.pipeline.workers import BUDGET
from kasa_cli.report import Cost
from kasa_cli.targets import Target

RUNTIME_BYTES = 400 << 20
"""Bytes that torch and transformers occupy before the first tensor."""

STREAMED_ROOM = 28 << 20
"""Bytes that a worker occupies while it streams a tensor, adds to it and writes it."""

START_SECONDS, STREAMED_BYTES_PER_SECOND = 3.0, 4e8
"""A merge: seconds for imports, and bytes that a worker reads, adds to, hashes and writes in a second."""

GRAM_FLOPS_PER_SECOND = 4e10
"""A rank-k update in float64 on one core of a server of 2023; a plan needs an estimate only."""


def decomposition_cost(shapes: Sequence[tuple[int, int]], rooms: Sequence[int], num_workers: int) -> Cost:
    """Expected peak bytes and wall seconds of decomposing matrices that occupy `rooms` bytes each."""
    largest = sorted([0, *rooms])[-num_workers:]
    work = sum(decomposition_work(shape) for shape in shapes)
    return {
        "memory_bytes": RUNTIME_BYTES + max(largest[-1], min(sum(largest), BUDGET)),
        "seconds": round(2.5 * work / GRAM_FLOPS_PER_SECOND / num_workers, 1),
    }


def streaming_cost(num_bytes: int, num_held: int, num_workers: int) -> Cost:
    """Expected peak bytes and wall seconds of one pass over a base of `num_bytes`, from `benchmarks/merge.py`.

    `num_held`: bytes of one tensor that a worker keeps in memory, without the rows in work.
    """
    seconds = START_SECONDS + num_bytes / STREAMED_BYTES_PER_SECOND / num_workers
    return {
        "memory_bytes": RUNTIME_BYTES + num_workers * (STREAMED_ROOM + num_held),
        "seconds": round(seconds, 1),
    }


def memory_needed(targets: tuple[Target, ...], num_workers: int) -> int:
    """Expected peak bytes: the runtime, and for each worker its weight twice, two Gram matrices and panels."""
    largest = max((_working_set(target) for target in targets), default=0)
    return RUNTIME_BYTES + num_workers * largest


def seconds_needed(targets: tuple[Target, ...], num_workers: int) -> float:
    """Expected wall seconds, from the number of multiplications alone; correct within a factor of a few."""
    return 2.5 * sum(target.matrix.work for target in targets) / GRAM_FLOPS_PER_SECOND / num_workers


def _working_set(target: Target) -> int:
    short, long = sorted(target.matrix.shape)
    element = 4 if target.matrix.dtype == "F32" else 2
    return 2 * element * short * long + 2 * 8 * max(short, DENSE_SIDE) ** 2 + (64 << 20)
