"""A weight and a low-rank term, added and rounded some rows at a time, always in the same memory.

Fresh memory for each block would cost more than the arithmetic (page faults).

Shapes: o = rows of the weight as stored, i = its columns, r = rank of the term, j = rows of a block.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.linalg.rounding import on_the_way

SAFE_SQUARES = (1e-20, 1e30)
"""A sum of squares in between neither overflowed in float32 nor lost anything of note below its smallest number."""


class Sum:
    """The exact sum W + L R of blocks of rows, each rounded once to `dtype`, and what came of it so far.

    `max_abs_change` is the largest |Q - W| of an entry; `off` and `whole` sum (Q - T)² and T² of the exact T. In half
    precision the three are measured in float32, which is exact enough beside 8 or 11 bits.
    """

    def __init__(
        self, L: Float64[Tensor, "o r"], R: Float64[Tensor, "r i"], dtype: torch.dtype, num_rows: int
    ) -> None:
        self.L, self.R, self.dtype = L, R, dtype
        self.max_abs_change = self.off = self.whole = 0.0
        self._exact = R.new_empty(num_rows, R.shape[1])
        self._scratch = torch.empty_like(self._exact, dtype=torch.float32 if dtype.itemsize <= 2 else R.dtype)

    def block(self, W: Float[Tensor, "j i"], start: int) -> Float[Tensor, "j i"]:
        """Rows [start, start + j) of the sum, rounded; `W` is those of the weight."""
        T = self._exact[: len(W)]
        T.copy_(W)
        if len(self.R):
            T.addmm_(self.L[start : start + len(W)], self.R)
        near = on_the_way(T, self.dtype) if self.dtype.itemsize <= 2 else T
        Q = near.to(self.dtype)
        self._measure(W, near, Q)
        return Q

    def _measure(self, W: Tensor, T: Tensor, Q: Tensor) -> None:
        D = self._scratch[: len(W)]
        self.whole += _squares(T)
        self.off += _squares(D.copy_(Q).sub_(T))
        self.max_abs_change = max(self.max_abs_change, _largest(D.copy_(Q).sub_(W)))


def _squares(X: Float[Tensor, "j i"]) -> float:
    flat = X.reshape(-1)
    found = float(torch.dot(flat, flat))
    if not SAFE_SQUARES[0] < found < SAFE_SQUARES[1] and flat.dtype != torch.float64:
        return _squares(X.to(torch.float64))
    return found


def _largest(X: Float[Tensor, "j i"]) -> float:
    if not X.numel():
        return 0.0
    low, high = torch.aminmax(X)
    return max(-float(low), float(high))
