"""All singular values of a weight, without its vectors.

Eigenvalues of the Gram matrix are squares, so values far below σ_max lose digits. Where those are few, the solver of
the smallest triplets computes them from the weight itself; where they are many, a QR decomposition and an SVD do.

Shapes: k = short side.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.linalg import kernels
from kasa_cli.linalg.bottom import EPS, Ends, ends_of, level
from kasa_cli.linalg.gram import Gram

SQUARED_FLOOR = 1e-4
"""Share of σ_max above which an eigenvalue of the Gram matrix gives σ to seven digits (ε (σ_max / σ)² times some
tens)."""
MOST_SMALL = 256
"""Up to so many small values the solver of the smallest triplets is the cheaper one."""


@dataclass(frozen=True)
class Values:
    """All singular values, descending, and the name of the solver."""

    S: Float64[Tensor, " k"]
    solver: str


def values_of(gram: Gram, bottom: Ends) -> Values:
    """All singular values: each to about 1e-7 of itself, or to roundoff of σ_max if that is more.

    `bottom` has the smallest triplets at some level; both extremes are taken from it, so that κ is the same number
    everywhere.

    Raises:
        NumericalError: LAPACK cannot do it.
    """
    M = gram.frame
    eigenvalues = kernels.eigenvalues(gram.lend()).clamp_min(0.0)
    S = eigenvalues.sqrt().flip(0) * M.scale
    num_small = int((SQUARED_FLOOR * bottom.sigma_max > S).sum())
    if num_small > len(bottom.S):
        if num_small > MOST_SMALL or level(len(S), num_small) < num_small:
            return Values(_from_triangle(gram, bottom), "qr-svd")
        small = ends_of(gram, level(len(S), num_small))
        return Values(_joined(S, small, bottom), f"gram-eigh + {small.solver}")
    return Values(_joined(S, bottom, bottom), f"gram-eigh + {bottom.solver}")


def _joined(S: Tensor, small: Ends, bottom: Ends) -> Tensor:
    """The smallest values replaced by those computed from the weight; both extremes as in `bottom`."""
    joined = S.clone()
    if len(small.S):
        joined[-len(small.S) :] = small.S
    return _with_extremes(joined, bottom)


def _from_triangle(gram: Gram, bottom: Ends) -> Tensor:
    """A QR decomposition and an SVD of its triangle: accurate for every condition number, and slow."""
    M = gram.frame
    S = torch.linalg.svdvals(M.triangle())
    S = S.where(EPS * M.num_long * S[0] < S, 0.0)
    return _with_extremes(S * M.scale, bottom)


def _with_extremes(S: Tensor, bottom: Ends) -> Tensor:
    """The values, descending, between the extremes of `bottom`."""
    S = torch.sort(S.clamp(bottom.sigma_min, bottom.sigma_max), descending=True)[0]
    S[-1], S[0] = bottom.sigma_min, bottom.sigma_max
    return S
