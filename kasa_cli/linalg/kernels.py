"""The five dense kernels, in place on one symmetric float64 (or float32) matrix.

On a CPU scipy's BLAS is called on Fortran-ordered memory, because torch has no rank-k update (half the work of
a product) and no in-place Cholesky factorisation (half the memory); elsewhere torch does the same.

Shapes: k = short side, w = panel width, b = block. Only the lower triangle of a symmetric matrix is kept.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.linalg import blas, lapack
from torch import Tensor

Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]


def square(k: int, like: Tensor) -> Float64[Tensor, "k k"]:
    """A zero matrix in Fortran order, the order that BLAS updates in place."""
    return torch.zeros(k, k, dtype=torch.float64, device=like.device).T


def add_panel(G: Float64[Tensor, "k k"], panel: Float64[Tensor, "k w"]) -> None:
    """Add panel @ panel.T to the lower triangle of G, in place (BLAS `syrk`)."""
    if not G.is_cpu:
        G.addmm_(panel, panel.T)
        return
    rows = panel.numpy()
    a, trans = (rows.T, 1) if panel.is_contiguous() else (np.asfortranarray(rows), 0)
    blas.dsyrk(1.0, a, beta=1.0, c=G.numpy(), trans=trans, lower=1, overwrite_c=1)


def factorise(G: Float64[Tensor, "k k"]) -> bool:
    """Overwrite G by its lower Cholesky factor; False when G is not positive definite (G is then spent)."""
    if not G.is_cpu:
        L, info = torch.linalg.cholesky_ex(G)
        G.copy_(L)
        return int(info) == 0
    _, info = lapack.dpotrf(G.numpy(), lower=1, clean=0, overwrite_a=1)
    return int(info) == 0


def forward_solve(L: Float64[Tensor, "k k"], X: Float64[Tensor, "k w"]) -> Float64[Tensor, "k w"]:
    """L^-1 X for a lower triangular L."""
    if not L.is_cpu:
        below: Tensor = torch.linalg.solve_triangular(L, X, upper=False)
        return below
    return _tensor(blas.dtrsm(1.0, L.numpy(), _fortran(X), lower=1, overwrite_b=1))


def backward_solve(L: Float64[Tensor, "k k"], X: Float64[Tensor, "k w"]) -> Float64[Tensor, "k w"]:
    """L^-T X for a lower triangular L."""
    if not L.is_cpu:
        above: Tensor = torch.linalg.solve_triangular(L.T, X, upper=True)
        return above
    return _tensor(blas.dtrsm(1.0, L.numpy(), _fortran(X), lower=1, trans_a=1, overwrite_b=1))


def symmetric_product(G: Float[Tensor, "k k"], X: Float[Tensor, "k b"]) -> Float[Tensor, "k b"]:
    """G X, reading the lower triangle of G only (BLAS `symm`), in the precision of both."""
    if not G.is_cpu:
        full = torch.tril(G) + torch.tril(G, -1).T
        return full @ X
    symm = blas.dsymm if G.dtype == torch.float64 else blas.ssymm
    return _tensor(symm(1.0, G.numpy(), _fortran(X), lower=1))


def _tensor(A: Array) -> Tensor:
    tensor: Tensor = torch.from_numpy(A)
    return tensor


def _fortran(X: Tensor) -> Array:
    """A Fortran-ordered copy that BLAS may overwrite."""
    return np.array(X.numpy(), order="F", copy=True)
