"""The same question to many weights: measured or remembered, several at once, with what could not be answered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Generic, TypeVar

import torch

from kasa_cli.checkpoint.dtypes import BITS
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.errors import NumericalError
from kasa_cli.pipeline import workers
from kasa_cli.pipeline.measuring.facts import Bench, Facts, pick_device
from kasa_cli.pipeline.measuring.weights import Matrix, is_streamed, stored_shape, weigh, working_set
from kasa_cli.pipeline.workers import Running, Watcher, blas_threads, run
from kasa_cli.report import Skipped

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Asked(Generic[Answer]):
    """Answers by the name of the matrix; what was skipped under `keep_going`; how many were measured just now."""

    answers: dict[str, Answer]
    skipped: tuple[Skipped, ...]
    num_new: int

    @property
    def totals(self) -> dict[str, int]:
        """For the report: a second question costs no decomposition."""
        return {
            "decompositions": self.num_new,
            "decompositions_reused": len(self.answers) - self.num_new,
        }


def ask(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    question: Callable[[Bench], Answer],
    facts: Facts,
    running: Running,
    watcher: Watcher,
) -> Asked[Answer]:
    """Ask every matrix, the largest first; answers in the order given. Tied weights are one matrix, asked once.

    Raises:
        NumericalError: a weight is not finite, or no solver converges; unless `running.keep_going`.
    """
    matrices = list({matrix.name: matrix for matrix in matrices}.values())
    device = pick_device(running.device)
    shapes = {matrix.name: stored_shape(checkpoint, matrix) for matrix in matrices}
    watcher.stage("measure", len(matrices), sum(_work(shape) for shape in shapes.values()))
    with blas_threads(running.threads_per_worker):
        found = run(
            lambda matrix: _ask_one(checkpoint, matrix, question, facts, (device, running.keep_going)),
            sorted(matrices, key=lambda matrix: -_work(shapes[matrix.name])),
            running.num_workers,
            lambda matrix: watcher.finished(matrix.name, _work(shapes[matrix.name])),
            lambda matrix: size(checkpoint, matrix),
        )
    by_name = {name: (answer, is_new) for name, answer, is_new in found}
    given = [(matrix.name, *by_name[matrix.name]) for matrix in matrices]
    answers = {name: answer for name, answer, _ in given if not isinstance(answer, Skipped)}
    skipped = tuple(answer for _, answer, _ in given if isinstance(answer, Skipped))
    return Asked(answers, skipped, sum(is_new for name, _, is_new in given if name in answers))


def _ask_one(
    checkpoint: Checkpoint,
    matrix: Matrix,
    question: Callable[[Bench], Answer],
    facts: Facts,
    how: tuple[torch.device, bool],
) -> tuple[str, Answer | Skipped, bool]:
    device, keep_going = how
    bench = facts.bench(weigh(checkpoint, matrix, device))
    try:
        return matrix.name, question(bench), bench.is_new
    except NumericalError as error:
        if not keep_going:
            raise
        return matrix.name, Skipped(matrix.name, error.what), False


def _work(shape: tuple[int, int]) -> float:
    short, long = sorted(shape)
    return short * short * (long + short)


def size(checkpoint: Checkpoint, matrix: Matrix) -> int:
    """What a matrix takes of the budget: all of it if it is too large to be held, its Gram matrix being large too."""
    entry = checkpoint.tensors[matrix.pieces[0].name]
    shape = stored_shape(checkpoint, matrix)
    own = working_set(shape, prod(shape) * BITS[entry.dtype] // 8)
    return max(own, workers.BUDGET) if is_streamed(entry, matrix) else own
