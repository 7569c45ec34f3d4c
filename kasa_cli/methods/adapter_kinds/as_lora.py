"""An update as the two factors that a plain LoRA holds: all of it, or its largest components.

The loss is measured on the factors as they are stored, in float32.

Shapes: o = out_features, i = in_features, n = rank of the terms, p = min(n, o, i), m = components kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from kasa_cli.errors import NumericalError
from kasa_cli.linalg import Gram, StreamedWeight, frame_of, kernels, svd_of_product, tops_of
from kasa_cli.methods.adapter_kinds.change import Change, Term, row_blocks, rows


@dataclass(frozen=True)
class Limit:
    """How much of an update is kept: at most `rank` components, the fewest with a share of Σσ², or all."""

    rank: int | None = None
    energy: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether components may be lost."""
        return self.rank is not None or self.energy is not None

    def count(self, squares: Float64[Tensor, " p"]) -> int:
        """Number of components kept, from all σ², largest first.

        >>> squares = torch.tensor([9.0, 4.0, 1.0]).double()
        >>> [Limit(energy=share).count(squares) for share in (0.5, 0.65, 0.93, 1.0)], Limit(rank=2).count(squares)
        ([1, 2, 3, 3], 2)
        """
        if self.energy is None:
            return len(squares) if self.rank is None else min(self.rank, len(squares))
        energies = torch.cumsum(squares, 0)
        return min(int((energies < self.energy * energies[-1]).sum()) + 1, len(squares))


@dataclass(frozen=True)
class Compact:
    """An update as a LoRA of scaling 1 stores it, B A; its norm, and the norm of the error.

    `exact_rank` is the rank at which there is no error, None if it is not known.
    """

    B: Float32[Tensor, "o m"]
    A: Float32[Tensor, "m i"]
    exact_rank: int | None
    norm: float
    error: float


def of_terms(terms: Sequence[Term], limit: Limit) -> Compact:
    """The sum of low-rank terms: the factors side by side, or the largest components of their product."""
    L, R = torch.cat([term.L for term in terms], dim=1), torch.cat([term.R for term in terms])
    exact_rank = min(L.shape[1], L.shape[0], R.shape[1])
    left, right = L, R
    if limit.is_set or L.shape[1] > exact_rank:
        U, S, V = svd_of_product(L, R)
        m = limit.count(S.square())
        left, right = U[:, :m] * S[:m], V[:, :m].T
    B, A = _stored(left), _stored(right)
    missing = _norm(torch.cat([L, -B.to(torch.float64)], dim=1), torch.cat([R, A.to(torch.float64)]))
    return Compact(B, A, exact_rank, _norm(L, R), missing)


def of_weight(W: Float[Tensor, "o i"], change: Change, limit: Limit) -> Compact:
    """The largest components of W' - W, for a change that is not low-rank; W' - W is computed by rows.

    A tall difference is never held in memory. A wide one is, in float32: its Gram matrix needs whole columns.
    """
    gram = Gram(frame_of(_difference(W, change)))
    m = _count(gram, limit)
    if gram.trace == 0:
        B, A = (
            W.new_zeros(W.shape[0], m, dtype=torch.float32),
            W.new_zeros(m, W.shape[1], dtype=torch.float32),
        )
    else:
        largest = tops_of(gram, m)
        B, A = _stored(largest.U * largest.S), _stored(largest.V.T)
    norm = error = 0.0
    for start, stop in row_blocks(W.shape, (change,)):
        D = _rows(W, change, start, stop)
        norm += float(D.square().sum())
        error += float(
            torch.addmm(D, B[start:stop].to(torch.float64), A.to(torch.float64), alpha=-1).square().sum()
        )
    return Compact(B, A, None, math.sqrt(norm), math.sqrt(error))


def _count(gram: Gram, limit: Limit) -> int:
    """Number of components kept; for a rank, no eigenvalues are needed."""
    if limit.energy is None:
        k = gram.frame.num_short
        return k if limit.rank is None else min(limit.rank, k)
    return limit.count(kernels.eigenvalues(gram.lend()).flip(0).clamp_min(0))


def _difference(W: Float[Tensor, "o i"], change: Change) -> Tensor | StreamedWeight:
    """W' - W, by rows if it is tall."""
    o, i = W.shape
    if o > i:

        def read(start: int, stop: int) -> Tensor:
            first = start - start % change.grain
            last = min(o, math.ceil(stop / change.grain) * change.grain)
            return _rows(W, change, first, last)[start - first : stop - first]

        return StreamedWeight((o, i), read, W.device)
    D = torch.empty(o, i, dtype=torch.float32, device=W.device)
    for start, stop in row_blocks(W.shape, (change,)):
        D[start:stop] = _rows(W, change, start, stop)
    return D


def _rows(W: Float[Tensor, "o i"], change: Change, start: int, stop: int) -> Float64[Tensor, "j i"]:
    return rows(W, (change,), start, stop) - W[start:stop].to(torch.float64)


def _stored(X: Float64[Tensor, "a b"]) -> Float32[Tensor, "a b"]:
    """A factor in float32, as it is written.

    Raises:
        NumericalError: an entry is not finite, or does not fit float32.
    """
    stored = X.to(torch.float32).contiguous()
    if not torch.isfinite(stored).all():
        raise NumericalError("a factor of the update does not fit float32")
    return stored


def _norm(L: Float64[Tensor, "o n"], R: Float64[Tensor, "n i"]) -> float:
    """‖L R‖_F by a QR of both: from products of L with itself a small difference would be lost in roundoff."""
    left, right = torch.linalg.qr(L, mode="r")[1], torch.linalg.qr(R.T, mode="r")[1]
    return float(torch.linalg.matrix_norm(left @ right.T))
