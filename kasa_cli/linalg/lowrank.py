"""The singular value decomposition of a product of two thin factors, which is never formed.

Shapes: o = out_features, i = in_features, r = columns of the factors, p = min(r, o, i).
"""

import torch
from jaxtyping import Float64
from torch import Tensor


def svd_of_product(
    L: Float64[Tensor, "o r"], R: Float64[Tensor, "r i"]
) -> tuple[Float64[Tensor, "o p"], Float64[Tensor, " p"], Float64[Tensor, "i p"]]:
    """U, S and V of L R = U diag(S) V^T, largest first: a QR of both factors, and the SVD of their small core.

    >>> U, S, V = svd_of_product(torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[2.0, 0.0, 0.0]]).double())
    >>> S, bool(torch.allclose((U * S) @ V.T, torch.tensor([[6.0, 0, 0], [8, 0, 0]]).double()))
    (tensor([10.], dtype=torch.float64), True)
    """
    Q_left, T_left = torch.linalg.qr(L)
    Q_right, T_right = torch.linalg.qr(R.T)
    U, S, Vh = torch.linalg.svd(T_left @ T_right.T, full_matrices=False)
    return Q_left @ U, S, Q_right @ Vh.T
