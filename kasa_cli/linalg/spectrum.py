"""All singular values of a weight, without its vectors.

Eigenvalues of the Gram matrix are squares: what lies far below σ_max loses digits there. Those few are read off the
weight itself, by the solver of the small end; where they are many, from the triangle of a QR decomposition.

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
"""Of σ_max: above it an eigenvalue of the Gram matrix gives σ to seven digits (ε (σ_max / σ)² times some tens)."""
MOST_SMALL = 256
"""So many small values are worth the solver of the small end."""


@dataclass(frozen=True)
class Values:
    """All singular values, descending, and how they were found."""

    S: Float64[Tensor, " k"]
    solver: str


def values_of(gram: Gram, found: Ends) -> Values:
    """All singular values: each to about 1e-7 of itself, or to roundoff of σ_max if that is more.

    `found` are the ends at some level; the extremes are theirs, so that κ is one number whatever was asked.

    Raises:
        NumericalError: LAPACK cannot do it.
    """
    M = gram.frame
    eigenvalues = kernels.eigenvalues(gram.lend()).clamp_min(0.0)
    S = eigenvalues.sqrt().flip(0) * M.scale
    num_small = int((SQUARED_FLOOR * found.sigma_max > S).sum())
    if num_small > len(found.S):
        if num_small > MOST_SMALL or level(len(S), num_small) < num_small:
            return Values(_from_triangle(gram, found), "qr-svd")
        small = ends_of(gram, level(len(S), num_small))
        return Values(_joined(S, small, found), f"gram-eigh + {small.solver}")
    return Values(_joined(S, found, found), f"gram-eigh + {found.solver}")


def _joined(S: Tensor, small: Ends, found: Ends) -> Tensor:
    """The smallest replaced by what was read off the weight; both extremes as the ends have them."""
    joined = S.clone()
    if len(small.S):
        joined[-len(small.S) :] = small.S
    return _with_extremes(joined, found)


def _from_triangle(gram: Gram, found: Ends) -> Tensor:
    """By a QR decomposition and an SVD of its triangle: right for every condition number, and slow."""
    M = gram.frame
    S = torch.linalg.svdvals(M.triangle())
    S = S.where(EPS * M.num_long * S[0] < S, 0.0)
    return _with_extremes(S * M.scale, found)


def _with_extremes(S: Tensor, found: Ends) -> Tensor:
    """Descending, between the largest and the smallest value of the ends."""
    S = torch.sort(S.clamp(found.sigma_min, found.sigma_max), descending=True)[0]
    S[-1], S[0] = found.sigma_min, found.sigma_max
    return S
