"""The same question to many weights: measured or remembered, several at once, with what could not be answered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from kasa_cli.checkpoint.matrix import Matrix
from kasa_cli.checkpoint.tensor_source import TensorSource
from kasa_cli.errors import NumericalError
from kasa_cli.pipeline import workers
from kasa_cli.pipeline.measuring.facts import Bench, Facts, pick_device
from kasa_cli.pipeline.measuring.weights import weigh
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
    source: TensorSource,
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
    watcher.stage("measure", len(matrices), sum(matrix.work for matrix in matrices))
    with blas_threads(running.threads_per_worker):
        found = run(
            lambda matrix: _ask_one(source, matrix, question, facts, (device, running.keep_going)),
            sorted(matrices, key=lambda matrix: -matrix.work),
            running.num_workers,
            lambda matrix: watcher.finished(matrix.name, matrix.work),
            room,
        )
    by_name = {name: (answer, is_new) for name, answer, is_new in found}
    given = [(matrix.name, *by_name[matrix.name]) for matrix in matrices]
    answers = {name: answer for name, answer, _ in given if not isinstance(answer, Skipped)}
    skipped = tuple(answer for _, answer, _ in given if isinstance(answer, Skipped))
    return Asked(answers, skipped, sum(is_new for name, _, is_new in given if name in answers))


def _ask_one(
    source: TensorSource,
    matrix: Matrix,
    question: Callable[[Bench], Answer],
    facts: Facts,
    how: tuple[torch.device, bool],
) -> tuple[str, Answer | Skipped, bool]:
    device, keep_going = how
    bench = facts.bench(weigh(source, matrix, device))
    try:
        return matrix.name, question(bench), bench.is_new
    except NumericalError as error:
        if not keep_going:
            raise
        return matrix.name, Skipped(matrix.name, error.what), False


def room(matrix: Matrix) -> int:
    """The part of the memory budget that a measurement takes: all of it for a streamed matrix, whose Gram matrix is
    large too."""
    return max(matrix.memory, workers.BUDGET) if matrix.is_streamed else matrix.memory
