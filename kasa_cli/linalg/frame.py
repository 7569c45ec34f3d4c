"""A weight seen from its short side, in float64, a panel at a time.

Shapes: o = out_features, i = in_features, k = min(o, i), l = max(o, i), w = panel width, n = rows of a block.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.errors import NumericalError

PANEL_BYTES = 4 << 20
"""A panel stays in the cache of one core, so that peak memory does not grow with the weight either."""
PANEL_WIDTH = 512
"""Smallest width of a panel: each panel costs a pass over the Gram matrix."""
BLOCK_ENTRIES = 1 << 23
"""Entries of a block of a weight that is read by rows."""
LARGEST = 2.0**960
"""Above it singular values may overflow; only float64 weights reach it."""


@dataclass(frozen=True)
class StreamedWeight:
    """A weight too large for memory: `read(start, stop)` reads rows of it, again at each call."""

    shape: tuple[int, int]
    read: Callable[[int, int], Float[Tensor, "n i"]]
    device: torch.device

    def blocks(self) -> Iterator[Float[Tensor, "n i"]]:
        """All rows, some at a time."""
        step = max(1, BLOCK_ENTRIES // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield self.read(start, min(start + step, self.shape[0]))


@dataclass(frozen=True)
class Frame:
    """`W` or its transpose, whichever is wide, with a power of two taken out.

    `columns(start, stop)` are columns of that wide matrix. The scale keeps squares of entries near 1e38 and of
    denormals inside float64; a power of two costs no rounding.
    """

    columns: Callable[[int, int], Float[Tensor, "k w"]]
    shape: tuple[int, int]
    device: torch.device
    is_transposed: bool
    exponent: int

    @property
    def scale(self) -> float:
        """The power of two that was taken out."""
        return math.ldexp(1.0, self.exponent)

    @property
    def num_short(self) -> int:
        """The short side, k."""
        return self.shape[0]

    @property
    def num_long(self) -> int:
        """The long side, l."""
        return self.shape[1]

    def panels(self) -> Iterator[tuple[int, Float64[Tensor, "k w"]]]:
        """Yield (first column, scaled float64 columns) over the long side.

        Every panel uses the same memory, so a panel is valid until the next one. Fresh memory for each would cost
        more than the arithmetic (page faults).
        """
        k, width = self.num_short, max(PANEL_WIDTH, PANEL_BYTES // (8 * self.num_short))
        room = torch.empty(k * width, dtype=torch.float64, device=self.device)
        for start in range(0, self.num_long, width):
            columns = self.columns(start, min(start + width, self.num_long))
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
        return self.columns(0, self.num_long).to(torch.float64, copy=True).mul_(1.0 / self.scale)

    def triangle(self) -> Float64[Tensor, "k k"]:
        """R with the singular values of the frame and, transposed, its left vectors: a QR summed over panels.

        Demmel, Grigori, Hoemmen and Langou, "Communication-optimal parallel and sequential QR", 2012.
        """
        R = torch.empty(0, self.num_short, dtype=torch.float64, device=self.device)
        width = max(PANEL_WIDTH, self.num_short)  # each step costs a pass over R
        for start in range(0, self.num_long, width):
            panel = self.columns(start, min(start + width, self.num_long)).T.to(torch.float64) / self.scale
            R = torch.linalg.qr(torch.cat([R, panel]), mode="r")[1]
        return R


def frame_of(W: Float[Tensor, "o i"] | StreamedWeight) -> Frame:
    """The frame of a weight: its wide orientation and its scale.

    Raises:
        NumericalError: an entry is NaN or infinite (LAPACK would answer with NaN and no error), or so large that
            a singular value may lie beyond float64.
    """
    largest = largest_entry(W)
    if largest > LARGEST:
        raise NumericalError(f"an entry of {largest:.3g} is too large to sum squares in float64")
    exponent = max(math.frexp(largest)[1], -1000) if largest else 0
    is_tall = W.shape[0] > W.shape[1]
    columns = _columns_of_rows(W) if isinstance(W, StreamedWeight) else _columns(W.T if is_tall else W)
    return Frame(columns, (min(W.shape), max(W.shape)), W.device, is_tall, exponent)


def largest_entry(W: Float[Tensor, "o i"] | StreamedWeight) -> float:
    """The largest absolute value of an entry.

    Raises:
        NumericalError: an entry is NaN or infinite; the message names the first one.

    >>> largest_entry(torch.tensor([[1.0, -3.0]]))
    3.0
    """
    largest, first = 0.0, 0
    for block in W.blocks() if isinstance(W, StreamedWeight) else [W]:
        largest = max(largest, _largest(block, first))
        first += len(block)
    return largest


def _largest(block: Tensor, first: int) -> float:
    if block.numel() == 0:
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(block))
    if math.isfinite(low) and math.isfinite(high):
        return max(abs(low), abs(high))
    row, column = (int(index) for index in torch.nonzero(~torch.isfinite(block))[0])
    raise NumericalError(f"entry [{first + row}, {column}] is {float(block[row, column])}")


def _columns(matrix: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: matrix[:, start:stop]


def _columns_of_rows(W: StreamedWeight) -> Callable[[int, int], Tensor]:
    """Columns of the frame are the transposed rows of a tall weight.

    Raises:
        NumericalError: the weight is not tall: a wide one would have to be read again for each panel.
    """
    if W.shape[0] <= W.shape[1]:
        raise NumericalError("only a tall weight is measured by rows")
    return lambda start, stop: W.read(start, stop).T
