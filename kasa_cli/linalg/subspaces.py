"""Subspaces: orthogonality defects, shares of an update inside subspaces, and angles between subspaces.

Shapes: o = out_features, i = in_features, n = a factor's long side, r = its columns, p = components of the update,
t = dimension of the subspaces.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor


def defect(X: Float64[Tensor, "n r"]) -> float:
    """‖XᵀX - I_r‖_F: 0 for orthonormal columns, √r for columns of zeros.

    >>> defect(torch.eye(3, 2).double()), defect(torch.zeros(5, 4).double())
    (0.0, 2.0)
    """
    products = X.T @ X
    products.diagonal().sub_(1)
    return float(torch.linalg.matrix_norm(products))


def opposite_defect(defect_columns: float, n: int, r: int) -> float:
    """‖XXᵀ - I_n‖_F from ‖XᵀX - I_r‖_F, which is its square less n - r: the n x n matrix is never made.

    >>> opposite_defect(3.0, 20, 4)
    5.0
    """
    return math.sqrt(max(0.0, defect_columns * defect_columns + n - r))


@dataclass(frozen=True)
class Shares:
    """The energy of an update D within the spaces of U (left) and V (right), over ‖D‖².

    `left` is ‖UᵀD‖² and `right` ‖DV‖², `both` ‖UᵀDV‖²: the part inside both spaces.
    """

    both: float
    left: float
    right: float


@dataclass(frozen=True)
class Spaces:
    """Orthonormal bases of a left and a right subspace."""

    U: Float64[Tensor, "o t"]
    V: Float64[Tensor, "i t"]


def spaces(L: Float64[Tensor, "o t"], R: Float64[Tensor, "t i"]) -> Spaces | None:
    """The column and the row space of L R, for L with orthogonal columns and R with orthogonal rows of any length.

    None where a column of L is zero: its direction is unknown.

    >>> basis = spaces(torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[0.0, 4.0]]).double())
    >>> basis and (basis.U.flatten().abs().tolist(), basis.V.flatten().abs().tolist())
    ([0.0, 1.0], [0.0, 1.0])
    """
    lengths = L.norm(dim=0)
    if not (lengths > 0).all():
        return None
    return Spaces(torch.linalg.qr(L / lengths)[0], torch.linalg.qr(R.T)[0])


def shares(
    update: tuple[Float64[Tensor, "o p"], Float64[Tensor, " p"], Float64[Tensor, "i p"]], within: Spaces
) -> Shares | None:
    """How much of an update, given by its SVD, lies in two subspaces; None for a zero update."""
    U, S, V = update
    if not len(S) or not S[0] > 0:
        return None
    S = S / S[0]
    total = float(S.square().sum())
    left, right = within.U.T @ (U * S), (S[:, None] * V.T) @ within.V
    both = (within.U.T @ U) @ right
    return Shares(*(float(X.square().sum()) / total for X in (both, left, right)))


def random_shares(o: int, i: int, t: int) -> Shares:
    """What an update of random directions has on average.

    >>> random_shares(8, 4, 2)
    Shares(both=0.125, left=0.25, right=0.5)
    """
    return Shares(both=t * t / (o * i), left=t / o, right=t / i)


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
