"""The Gram matrix of a frame, summed once and used by one solver after another.

Solvers work in place, for a second matrix of that size would be the largest thing in memory. Only the lower triangle
of a symmetric matrix is ever read, so the upper triangle keeps a copy of it.

Shapes: k = short side of the frame, b = block.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import NumericalError
from kasa_cli.linalg import kernels
from kasa_cli.linalg.frame import Frame
from kasa_cli.linalg.lanczos import dominant, start_block

LAPACK_LIMIT = 2**31 - 1
TOP_BLOCK = 8
TOP_STEPS = 64
TOP_TOLERANCE = 1e-9


def gram(M: Frame) -> Float64[Tensor, "k k"]:
    """The lower triangle of M M^T, summed over panels: its relative error is the unit roundoff of float64.

    Raises:
        NumericalError: the short side is beyond the 32-bit sizes of LAPACK.
    """
    if M.num_short**2 > LAPACK_LIMIT:
        raise NumericalError(f"a side of {M.num_short} is beyond what LAPACK can index")
    G = kernels.square(M.num_short, M.device)
    for _, panel in M.panels():
        kernels.add_panel(G, panel)
    return G


class Gram:
    """A frame with its Gram matrix, which is summed when it is first asked for.

    Results are cached by hand: `functools.cached_property` of Python 3.11 holds one lock for all instances, and
    several matrices at once would wait for each other.
    """

    def __init__(self, M: Frame) -> None:
        self.frame = M
        self._is_spent = False
        self._matrix: tuple[Tensor, Tensor] | None = None
        self._leading: Tensor | None = None

    def lend(self) -> Float64[Tensor, "k k"]:
        """The matrix, for one user to overwrite its lower triangle, diagonal included; the same memory each time."""
        G, diagonal = self._matrix_and_diagonal
        if self._is_spent:
            kernels.restore(G, diagonal)
        self._is_spent = True
        return G

    @property
    def diagonal(self) -> Float64[Tensor, " k"]:
        """Squared norms of the rows of the frame."""
        return self._matrix_and_diagonal[1]

    @property
    def trace(self) -> float:
        """The squared Frobenius norm of the frame."""
        return float(self.diagonal.sum())

    @property
    def frobenius(self) -> float:
        """The Frobenius norm of the frame."""
        return math.sqrt(self.trace)

    @property
    def leading(self) -> Float64[Tensor, "k b"]:
        """The dominant eigenvectors, by block Lanczos in float32.

        Half the memory traffic of float64, and enough: a value read off the weight itself in these directions is in
        error by the square of their angle.
        """
        if self._leading is None:
            self._leading = self._find_leading()
        return self._leading

    def _find_leading(self) -> Tensor:
        half = self.lend().T.to(torch.float32).T
        self._is_spent = False  # only read
        k = len(half)
        start, steps = start_block(k, TOP_BLOCK, half), max(1, min(TOP_STEPS, k // TOP_BLOCK))
        ritz = dominant(lambda X: kernels.symmetric_product(half, X), start, TOP_BLOCK, steps, _value_doubt)
        Z: Tensor = torch.linalg.qr(ritz.vectors.to(torch.float64))[0]
        return Z

    @property
    def _matrix_and_diagonal(self) -> tuple[Tensor, Tensor]:
        """The matrix, and its diagonal."""
        if self._matrix is None:
            G = gram(self.frame)
            self._matrix = G, kernels.keep(G)
        return self._matrix


def _value_doubt(values: Tensor, residuals: Tensor) -> float:
    """Relative error of the largest value, quadratic in the residual over the gap (Kato and Temple)."""
    reach = torch.cumsum(residuals.square(), 0)[:TOP_BLOCK]
    gaps = (values[0] - values[1 : TOP_BLOCK + 1]).clamp_min(torch.finfo(values.dtype).tiny)
    return float((reach / gaps).min() / values[0].clamp_min(torch.finfo(values.dtype).tiny)) / TOP_TOLERANCE
