"""Asks the same question of many matrices, several at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kasa_cli.checkpoint import Matrix, TensorSource
from kasa_cli.pipeline import workers
from kasa_cli.pipeline.measuring.facts import Bench, Facts, pick_device
from kasa_cli.pipeline.measuring.weights import weigh
from kasa_cli.pipeline.workers import RunOptions, Task, Watcher, blas_threads, run_stage
from kasa_cli.report import Decompositions, Skipped

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Asked(Generic[Answer]):
    """Answers by the name of the matrix, the matrices that `keep_going` skips, and the number of decompositions."""

    answers: dict[str, Answer]
    skipped: tuple[Skipped, ...]
    num_new: int

    @property
    def totals(self) -> Decompositions:
        """The number of new and of reused decompositions, for the report."""
        return {
            "decompositions": self.num_new,
            "decompositions_reused": len(self.answers) - self.num_new,
        }


def ask(
    source: TensorSource,
    matrices: Sequence[Matrix],
    question: Callable[[Bench], Answer],
    facts: Facts,
    running: RunOptions,
    watcher: Watcher,
) -> Asked[Answer]:
    """Ask every matrix, the largest first; answers in the order given. Tied weights are one matrix, asked once.

    Raises:
        NumericalError: a weight is not finite, or no solver converges; unless `running.keep_going`.
    """
    matrices = list({matrix.name: matrix for matrix in matrices}.values())
    device = pick_device(running.device)

    def answer(matrix: Matrix) -> tuple[Answer | Skipped, bool]:
        bench = facts.bench(weigh(source, matrix, device))
        return question(bench), bench.is_new

    task = Task(
        answer,
        name=lambda matrix: matrix.name,
        work=lambda matrix: matrix.work,
        memory=room,
        on_failure=(lambda matrix, error: (Skipped(matrix.name, error.what), False))
        if running.keep_going
        else None,
    )
    with blas_threads(running.threads_per_worker):
        results = run_stage("measure", task, matrices, running.num_workers, watcher)
    pairs = zip(matrices, results, strict=True)
    answers = {matrix.name: answer for matrix, (answer, _) in pairs if not isinstance(answer, Skipped)}
    skipped = tuple(answer for answer, _ in results if isinstance(answer, Skipped))
    return Asked(answers, skipped, sum(is_new for _, is_new in results))


def room(matrix: Matrix) -> int:
    """The part of the memory budget that a measurement takes: all of it for a streamed matrix, whose Gram matrix is
    large too."""
    return max(matrix.memory, workers.BUDGET) if matrix.is_streamed else matrix.memory
