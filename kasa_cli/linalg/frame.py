"""A weight seen from its short side, in float64, a panel at a time.

Shapes: o = out_features, i = in_features, k = min(o, i), l = max(o, i), w = panel width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.errors import NumericalError

PANEL_BYTES = 4 << 20
"""A panel stays in the cache of one core, so that peak memory does not grow with the weight either."""
PANEL_WIDTH = 512
"""At least: each panel costs a pass over the Gram matrix."""
LARGEST = 2.0**960
"""Above it singular values may overflow; only float64 weights reach it."""


@dataclass(frozen=True)
class Frame:
    """`W` or its transpose, whichever is wide, with a power of two taken out.

    The scale keeps squares of entries near 1e38 and of denormals inside float64; a power of two costs no
    rounding.
    """

    matrix: Float[Tensor, "k l"]
    is_transposed: bool
    exponent: int

    @property
    def scale(self) -> float:
        """The power of two that was taken out."""
        return math.ldexp(1.0, self.exponent)

    @property
    def num_short(self) -> int:
        """The short side, k."""
        return self.matrix.shape[0]

    @property
    def num_long(self) -> int:
        """The long side, l."""
        return self.matrix.shape[1]

    def panels(self) -> Iterator[tuple[int, Float64[Tensor, "k w"]]]:
        """Yield (first column, scaled float64 columns) over the long side.

        Every panel lies in the same memory: use it before you ask for the next. Fresh memory for each would cost
        more than the arithmetic (page faults).
        """
        k, width = self.num_short, max(PANEL_WIDTH, PANEL_BYTES // (8 * self.num_short))
        room = torch.empty(k * width, dtype=torch.float64, device=self.matrix.device)
        for start in range(0, self.num_long, width):
            columns = self.matrix[:, start : start + width]
            w = columns.shape[1]
            panel = room[: k * w].view(w, k).T if self.is_transposed else room[: k * w].view(k, w)
            yield start, panel.copy_(columns).mul_(1.0 / self.scale)

    def transposed_product(self, Z: Float64[Tensor, "k p"]) -> Float64[Tensor, "l p"]:
        """The product of the transposed frame with Z, summed in float64."""
        Y = Z.new_empty(self.num_long, Z.shape[1])
        for start, panel in self.panels():
            Y[start : start + panel.shape[1]] = panel.T @ Z
        return Y

    def product(self, X: Float64[Tensor, "l p"]) -> Float64[Tensor, "k p"]:
        """The product of the frame with X, summed in float64."""
        Y = X.new_zeros(self.num_short, X.shape[1])
        for start, panel in self.panels():
            Y.addmm_(panel, X[start : start + panel.shape[1]])
        return Y

    def dense(self) -> Float64[Tensor, "k l"]:
        """The whole scaled frame in float64."""
        return self.matrix.to(torch.float64, copy=True).mul_(1.0 / self.scale)


def frame(W: Float[Tensor, "o i"]) -> Frame:
    """Turn a weight to its short side and find its scale.

    Raises:
        NumericalError: an entry is NaN or infinite (LAPACK would answer with NaN and no error), or so large that
            a singular value may lie beyond float64.
    """
    largest = largest_entry(W)
    if largest > LARGEST:
        raise NumericalError(f"an entry of {largest:.3g} leaves no room to sum in float64")
    exponent = max(math.frexp(largest)[1], -1000) if largest else 0
    is_tall = W.shape[0] > W.shape[1]
    return Frame(W.T if is_tall else W, is_tall, exponent)


def largest_entry(W: Float[Tensor, "o i"]) -> float:
    """The largest absolute value of an entry.

    Raises:
        NumericalError: an entry is NaN or infinite; the message names the first one.

    >>> largest_entry(torch.tensor([[1.0, -3.0]]))
    3.0
    """
    if W.numel() == 0:
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(W))
    if math.isfinite(low) and math.isfinite(high):
        return max(abs(low), abs(high))
    row, column = (int(index) for index in torch.nonzero(~torch.isfinite(W))[0])
    raise NumericalError(f"entry [{row}, {column}] is {float(W[row, column])}")
