"""A weight and a low-rank term, added and rounded some rows at a time, always in the same memory.

Fresh memory for each block would cost more than the arithmetic (page faults).

Shapes: o = rows of the weight as stored, i = its columns, r = rank of the term, j = rows of a block, k <= j.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.linalg.rounding import BITS, on_the_way

SAFE_SQUARES = (1e-20, 1e30)
"""A sum of squares between these two neither overflows in float32 nor loses digits to its smallest number."""

Then = Callable[[Float64[Tensor, "j i"], int], Float64[Tensor, "j i"]]
"""Maps rows of a sum, given the index of the first one, to the rows that are rounded."""


class Sum:
    """Rounds the exact T = then(W + L R) to `dtype`, a block of rows at a time, and measures the blocks so far.

    `max_abs_change` is the largest |Q - before| of an entry; `off` and `whole` sum (Q - T)² and T². In half precision
    the three are measured in float32, which is exact enough beside 8 or 11 bits.
    """

    def __init__(
        self,
        L: Float64[Tensor, "o r"],
        R: Float64[Tensor, "r i"],
        dtype: torch.dtype,
        num_rows: int,
        then: Then | None = None,
    ) -> None:
        self.L, self.R, self.dtype, self.then = L, R, dtype, then
        self.max_abs_change = self.off = self.whole = 0.0
        self._exact = R.new_empty(num_rows, R.shape[1])
        self._is_half = dtype.itemsize <= 2
        self._near = torch.empty_like(self._exact, dtype=torch.float32) if self._is_half else self._exact
        self._scratch = torch.empty_like(self._near)
        self._rounded = torch.empty_like(self._exact, dtype=dtype)

    def block(
        self, W: Float[Tensor, "j i"], start: int, before: Float[Tensor, "k i"] | None = None
    ) -> Float[Tensor, "j i"]:
        """Rows [start, start + j), rounded, in memory that the next call overwrites.

        The change is measured against `before` (default W), which may have fewer rows.
        """
        T, near, scratch, Q = (
            room[: len(W)] for room in (self._exact, self._near, self._scratch, self._rounded)
        )
        T.copy_(W)
        if len(self.R):
            T.addmm_(self.L[start : start + len(W)], self.R)
        if self.then is not None:
            T = self.then(T, start)
        near = on_the_way(T, self.dtype, near) if self._is_half else T
        Q.copy_(near)
        self.whole += _squares(near)
        self.off += _squares(near.sub_(scratch.copy_(Q)))
        old = W if before is None else before
        self.max_abs_change = max(self.max_abs_change, _largest(scratch[: len(old)].sub_(old)))
        return Q


def _squares(X: Float[Tensor, "j i"]) -> float:
    flat = X.reshape(-1)
    total = float(torch.dot(flat, flat))
    if not SAFE_SQUARES[0] < total < SAFE_SQUARES[1] and flat.dtype != torch.float64:
        return _squares(X.to(torch.float64))
    return total


def _largest(D: Float[Tensor, "j i"]) -> float:
    """The largest magnitude of an entry.

    Overwrites D by |D|: the bits of positive numbers are in order, and faster to compare.
    """
    if not D.numel():
        return 0.0
    return float(D.abs_().view(BITS[D.dtype]).max().view(D.dtype))
