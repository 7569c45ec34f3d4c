"""The changes of one weight by adapters of any kind: W' = f_n(… f_1(W + Σ L R + D)), rounded once.

Most kinds add low-rank terms. Some add a dense matrix that is computed a few rows at a time (LoHa), some are a map of
rows (DoRA, HRA). All work by blocks of rows in float64, so that memory stays near that of the weight.

Shapes: o = out_features, i = in_features, r = rank of a term, j = rows of a block.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.errors import UsageError
from kasa_cli.linalg import blocks, rounded

Dense = Callable[[int, int], Float64[Tensor, "j i"]]
"""Rows [start, stop) of a matrix that is added."""
Map = Callable[[Float64[Tensor, "j i"], int], Float64[Tensor, "j i"]]
"""The new values of the rows from `start` on; never in place."""
BiasMap = Callable[[Float64[Tensor, " o"]], Float64[Tensor, " o"]]
OfWeight = Callable[[Float[Tensor, "o i"]], "Term"]
"""The term that is added, from the weight as it was."""

LEAST_ROWS = 16
"""Rows of a block at least: a product of fewer is slow, and a transposed weight is read in runs of as many."""


@dataclass(frozen=True)
class Term:
    """A low-rank term: adds L R."""

    L: Float64[Tensor, "o r"]
    R: Float64[Tensor, "r i"]


@dataclass(frozen=True)
class Change:
    """The change of one weight and its bias by an adapter: W' = map(W + Σ L R + dense), b' = bias_map(b + shift).

    The map takes blocks of rows that begin at multiples of `grain` and end at one, or at the last row. If it adds a
    low-rank term once the weight is known, `of_weight` computes that term.
    """

    terms: tuple[Term, ...] = ()
    dense: Dense | None = None
    map: Map | None = None
    grain: int = 1
    shift: Float64[Tensor, " o"] | None = None
    bias_map: BiasMap | None = None
    of_weight: OfWeight | None = None

    @property
    def is_linear(self) -> bool:
        """Whether it is a sum, which a weight can scale."""
        return self.map is None and self.bias_map is None

    @property
    def is_low_rank(self) -> bool:
        """Whether it changes the weight by terms only."""
        return self.map is None and self.dense is None


def right_factor(P: Float64[Tensor, "i r"], Q: Float64[Tensor, "i r"]) -> Change:
    """The map W' = W - W P Q^T: low-rank once W is known."""

    def of_weight(W: Tensor) -> Term:
        L = P.new_empty(len(W), P.shape[1])
        for start, stop in row_blocks(W.shape, ()):
            L[start:stop] = -(W[start:stop].to(torch.float64) @ P)
        return Term(L, Q.T)

    return Change(map=lambda X, first: torch.addmm(X, X @ P, Q.T, alpha=-1), of_weight=of_weight)


def scaled_rows(scale: Float64[Tensor, " o"]) -> Map:
    """The map diag(scale) W."""
    return lambda X, first: X * scale[first : first + len(X), None]


def weighted(change: Change, weight: int | float) -> Change:
    """The change times a weight: W + weight (W' - W).

    Raises:
        UsageError: the weight is not a finite number, or the change is a map and its weight is not 1.
    """
    if weight == 1:
        return change
    if not math.isfinite(weight):
        raise UsageError(f"cannot weight an adapter by {weight}: give a finite number")
    if not change.is_linear:
        raise UsageError(
            f"cannot weight by {weight} an adapter that multiplies instead of adding",
            "",
            "leave its weight at 1",
        )
    dense, shift = change.dense, change.shift
    return replace(
        change,
        terms=tuple(Term(weight * term.L, term.R) for term in change.terms),
        dense=None if dense is None else lambda start, stop: weight * dense(start, stop),
        shift=None if shift is None else weight * shift,
    )


def transposed(change: Change) -> Change:
    """The same change of the transposed weight, for terms."""
    return Change(terms=tuple(Term(term.R.T, term.L.T) for term in change.terms))


def rows(W: Float[Tensor, "o i"], changes: Sequence[Change], start: int, stop: int) -> Float64[Tensor, "j i"]:
    """Rows [start, stop) of the exact result; the bounds are multiples of every grain, or the last row."""
    return applied_to(changes, W[start:stop].to(torch.float64, copy=True), start)


def applied_to(changes: Sequence[Change], T: Float64[Tensor, "j i"], start: int) -> Float64[Tensor, "j i"]:
    """The new values of the rows from `start` on; T is overwritten."""
    stop = start + len(T)
    for change in changes:
        for term in change.terms:
            T.addmm_(term.L[start:stop], term.R)
        if change.dense is not None:
            T.add_(change.dense(start, stop))
        if change.map is not None:
            T = change.map(T, start)
    return T


def sums(W: Float[Tensor, "o i"], terms: Sequence[Term]) -> Iterator[Float64[Tensor, "j i"]]:
    """W + Σ L R by blocks of rows, each in the memory of the one before: an allocator loses what is between."""
    room = torch.empty(0, dtype=torch.float64)
    for start, stop in row_blocks(W.shape, ()):
        room = (
            room if len(room) >= stop - start else W.new_empty(stop - start, W.shape[1], dtype=torch.float64)
        )
        yield applied_to((Change(tuple(terms)),), room[: stop - start].copy_(W[start:stop]), start)


def apply(W: Float[Tensor, "o i"], changes: Sequence[Change], dtype: torch.dtype) -> Float[Tensor, "o i"]:
    """The weight after all changes in turn, each entry rounded once, to the nearest, in the layout of W.

    `W` may be the transposed view of a weight that is stored as (in, out); then so is the result. With terms only, it
    is read as it is stored.
    """
    if W.stride(0) < W.stride(1) and all(change.is_low_rank for change in changes):
        return apply(W.T, [transposed(change) for change in changes], dtype).T
    Q = torch.empty_like(W, dtype=dtype)
    for start, stop in row_blocks(W.shape, changes):
        Q[start:stop] = rounded(rows(W, changes, start, stop), dtype)
    return Q


def apply_bias(b: Float[Tensor, " o"], changes: Sequence[Change], dtype: torch.dtype) -> Float[Tensor, " o"]:
    """The bias after all changes in turn, rounded once."""
    T = b.to(torch.float64)
    for change in changes:
        if change.shift is not None:
            T = T + change.shift
        if change.bias_map is not None:
            T = change.bias_map(T)
    return rounded(T, dtype)


def factors(changes: Sequence[Change]) -> Term | None:
    """All changes as one low-rank term, for `rounding.ExactSum`; None where one of them is more than that."""
    if not all(change.is_low_rank for change in changes):
        return None
    terms = [term for change in changes for term in change.terms]
    if not terms:
        return None
    return Term(torch.cat([term.L for term in terms], dim=1), torch.cat([term.R for term in terms]))


def grain_of(changes: Sequence[Change]) -> int:
    """What blocks of rows must be multiples of."""
    return math.lcm(*(change.grain for change in changes))


def row_blocks(shape: Sequence[int], changes: Sequence[Change]) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of rows that no grain straddles.

    >>> list(row_blocks((10, 1 << 16), [Change(grain=2), Change(grain=3)]))
    [(0, 10)]
    >>> list(row_blocks((40, 1 << 16), [Change(grain=12)]))
    [(0, 24), (24, 40)]
    """
    o, i = shape
    grain = grain_of(changes)
    least = math.ceil(LEAST_ROWS / grain)
    for start, stop in blocks(math.ceil(o / grain), i * grain, least):
        yield start * grain, min(stop * grain, o)
