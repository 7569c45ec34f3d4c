"""The plan of measuring candidates."""

from kasa_cli.checkpoint import Checkpoint
from kasa_cli.errors import UsageError
from kasa_cli.model_names import NameMap
from kasa_cli.pipeline.costs import decomposition_cost
from kasa_cli.pipeline.opening import ModelLocation
from kasa_cli.pipeline.workers import RunOptions
from kasa_cli.report import MeasurePlan, Skipped, ToMeasure
from kasa_cli.targets import Candidate


def measure_plan(
    command: str,
    where: ModelLocation,
    model: tuple[Checkpoint, NameMap],
    chosen: tuple[Candidate, ...],
    skipped: tuple[Skipped, ...],
    running: RunOptions,
) -> MeasurePlan:
    """The matrices that a question reads, and its cost, from headers alone."""
    note = model[1].note
    matrices = [(matrix, candidate.module) for candidate in chosen for matrix in candidate.matrices]
    return MeasurePlan(
        command=command,
        model=where.model,
        tensors=tuple(ToMeasure(m.name, module, m.stored_shape, m.dtype) for m, module in matrices),
        skipped=skipped,
        totals={
            "tensors": len(matrices),
            "tensors_skipped": len(skipped),
            "bytes_to_write": 0,
            **decomposition_cost(
                [m.shape for m, _ in matrices], [m.memory for m, _ in matrices], running.num_workers
            ),
        },
        notes=(note,) if note else (),
    )


def require_some(chosen: tuple[Candidate, ...]) -> None:
    """Refuse a question without a candidate.

    Raises:
        UsageError: there is no candidate.
    """
    if not chosen:
        raise UsageError("no weight is left to measure", "", "name some with --target")
