"""The matrices of the candidates, and the plan of measuring them."""

from math import prod

from kasa_cli.checkpoint.dtypes import BITS
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.errors import UsageError
from kasa_cli.model_names.names import NameMap
from kasa_cli.pipeline.costs import decomposition_cost
from kasa_cli.pipeline.measuring.weights import Matrix, stored_shape, working_set
from kasa_cli.pipeline.opening import Where
from kasa_cli.pipeline.workers import Running
from kasa_cli.report import Candidate, MeasurePlan, Piece, Skipped, ToMeasure


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
