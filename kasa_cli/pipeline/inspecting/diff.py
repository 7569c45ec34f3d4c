"""One weight in two checkpoints: the difference of its entries, its spectrum and its subspaces."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kasa_cli.checkpoint import Checkpoint, Matrix
from kasa_cli.linalg import best_cosines, principal_angles, quantities
from kasa_cli.pipeline.measuring import Bench, Extremes, Facts, weigh
from kasa_cli.report import DiffRow, module_type

INTRUDER = 0.6
"""Cosine below which a direction of B counts as new (Shuttleworth et al. 2024 use 0.5 to 0.7)."""
REACH = 4
"""Each direction of B is compared with this many times the subspace rank of directions of A."""


@dataclass(frozen=True)
class Pair:
    """One weight, in A and in B."""

    name: str
    module: str
    shape: tuple[int, int]
    first: Matrix
    second: Matrix


@dataclass(frozen=True)
class ComparedWeight:
    """The compared quantities of one weight; `top` and `bottom` are left singular vectors."""

    S: Tensor
    extremes: Extremes
    top: Tensor
    bottom: Tensor
    is_new: bool


@dataclass(frozen=True)
class ComparedPair:
    """The row of a pair, None for a weight that is the same in both, and the number of decompositions."""

    row: DiffRow | None
    num_new: int
    num_reused: int


def contrast(pair: Pair, sources: tuple[Checkpoint, Checkpoint], facts: Facts, rank: int) -> ComparedPair:
    """Compare one weight of A with that of B.

    Raises:
        NumericalError: a weight is not finite, or no solver converges.
    """
    device = torch.device("cpu")
    weights = (weigh(sources[0], pair.first, device), weigh(sources[1], pair.second, device))
    if weights[0].content == weights[1].content:
        return ComparedPair(None, 0, 0)
    rank = min(rank, max(1, min(pair.shape) // REACH))
    sides = (_measured(facts.bench(weights[0]), rank, REACH), _measured(facts.bench(weights[1]), rank, 1))
    num_new = sum(side.is_new for side in sides)
    as_computed = replace(pair, shape=weights[0].shape)  # a Conv1D is (in, out) in memory too
    return ComparedPair(_row(as_computed, sides, distance(pair, sources), rank), num_new, 2 - num_new)


def distance(pair: Pair, sources: tuple[Checkpoint, Checkpoint]) -> float:
    """‖B - A‖_F / ‖A‖_F, summed in float64; 0 where both are zero, infinite where only A is zero."""
    norm = change = 0.0
    blocks = zip(pair.first.row_blocks(sources[0]), pair.second.row_blocks(sources[1]), strict=True)
    for A, B in blocks:
        rows = A.to(torch.float64)
        norm += float(rows.square().sum())
        change += float((B.to(torch.float64) - rows).square().sum())
    return _ratio(math.sqrt(change), math.sqrt(norm))


def _measured(bench: Bench, rank: int, reach: int) -> ComparedWeight:
    """Measure one side; its Gram matrix is freed before that of the other side is formed."""
    top = bench.top(reach * rank).U
    bottom = bench.bottom(rank).U if rank < min(bench.weight.shape) else top  # a vector has one direction
    return ComparedWeight(bench.values().S, bench.extremes(), top, bottom, bench.is_new)


def _row(
    pair: Pair, sides: tuple[ComparedWeight, ComparedWeight], relative_distance: float, rank: int
) -> DiffRow:
    a, b = sides
    S, T, first, other = a.S, b.S, a.extremes, b.extremes
    likeness = best_cosines(b.top, a.top)
    return DiffRow(
        name=pair.name,
        module=pair.module,
        module_type=module_type(pair.module),
        shape=pair.shape,
        relative_distance=relative_distance,
        sigma_max=(first.sigma_max, other.sigma_max),
        sigma_min=(first.sigma_min, other.sigma_min),
        kappa=(first.kappa, other.kappa),
        stable_rank=(quantities.stable_rank(S), quantities.stable_rank(T)),
        effective_rank=(quantities.effective_rank(S), quantities.effective_rank(T)),
        spectrum_change=_relative(S, T),
        subspace_rank=rank,
        top_angle=_largest_angle(a.top[:, :rank], b.top),
        bottom_angle=_largest_angle(a.bottom, b.bottom),
        intruders=int((likeness < INTRUDER).sum()),
        least_similarity=float(likeness.min()),
    )


def _relative(S: Tensor, T: Tensor) -> float:
    """‖T - S‖ / ‖S‖ of two lists of singular values."""
    return _ratio(float(torch.linalg.vector_norm(T - S)), float(torch.linalg.vector_norm(S)))


def _ratio(change: float, norm: float) -> float:
    return change / norm if norm else math.inf if change else 0.0


def _largest_angle(X: Tensor, Y: Tensor) -> float:
    return math.degrees(float(principal_angles(X, Y)[-1]))
