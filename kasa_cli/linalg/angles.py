"""Angles between subspaces, and between single directions.

Shapes: n = the space's dimension, t = the subspaces' dimension, a and b = numbers of directions.
"""

import torch
from jaxtyping import Float64
from torch import Tensor


def principal_angles(X: Float64[Tensor, "n t"], Y: Float64[Tensor, "n t"]) -> Float64[Tensor, " t"]:
    """Principal angles between the spaces of two orthonormal bases, in radians, ascending.

    Cosines are the singular values of XᵀY (Björck and Golub 1973), sines those of Y - X XᵀY; the angle is read off
    the smaller of the two, so that angles near 0 and near π/2 alike are right to roundoff (Knyazev and Argentati
    2002).
    """
    products = X.T @ Y
    cosines = torch.linalg.svdvals(products).clamp(0, 1)
    sines = torch.linalg.svdvals(Y - X @ products).clamp(0, 1).flip(0)
    return torch.where(sines < cosines, sines.asin(), cosines.acos())


def best_cosines(X: Float64[Tensor, "n a"], Y: Float64[Tensor, "n b"]) -> Float64[Tensor, " a"]:
    """For each unit column of X the largest |cosine| with any unit column of Y.

    A top left singular vector of a fine-tuned weight whose best cosine with all of the base's is small is an
    intruder dimension (Shuttleworth et al. 2024, arXiv 2410.21228).
    """
    return (X.T @ Y).abs().amax(dim=1).clamp_max(1)
