"""The dense kernels, in place on one symmetric float64 (or float32) matrix.

On a CPU they are BLAS and LAPACK on Fortran-ordered memory, because torch has no rank-k update (half the work of a
product) and no in-place Cholesky factorisation (half the memory); elsewhere torch does the same.

Shapes: k = short side, w = panel width, b = block, n = eigenpairs. Only the lower triangle of a symmetric matrix is
kept.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.linalg import blas

STRIPE = 256


def square(k: int, device: torch.device) -> Float64[Tensor, "k k"]:
    """A zero matrix in Fortran order, the order that BLAS updates in place."""
    return torch.zeros(k, k, dtype=torch.float64, device=device).T


def add_panel(G: Float64[Tensor, "k k"], panel: Float64[Tensor, "k w"]) -> None:
    """Add panel @ panel.T to the lower triangle of G, in place (BLAS `syrk`)."""
    if G.is_cpu:
        blas.syrk(G, panel)
    else:
        G.addmm_(panel, panel.T)


def factorise(G: Float64[Tensor, "k k"]) -> bool:
    """Overwrite the lower triangle of G by its Cholesky factor; False when G is not positive definite.

    The part above the diagonal stays.
    """
    if G.is_cpu:
        return blas.potrf(G) == 0
    L, info = torch.linalg.cholesky_ex(G)
    G.copy_(torch.tril(L) + torch.triu(G, 1))
    return int(info) == 0


def keep(G: Float64[Tensor, "k k"]) -> Float64[Tensor, " k"]:
    """Copy the lower triangle above the diagonal, where a factorisation leaves it; the diagonal."""
    for start in range(0, len(G), STRIPE):
        here, after = slice(start, start + STRIPE), slice(start + STRIPE, None)
        corner = torch.tril(G[here, here])
        G[here, here] = corner + torch.tril(corner, -1).T
        G[here, after] = G[after, here].T
    return G.diagonal().clone()


def restore(G: Float64[Tensor, "k k"], diagonal: Float64[Tensor, " k"]) -> None:
    """Put back the lower triangle that `keep` saved, with this diagonal."""
    for start in range(0, len(G), STRIPE):
        here, after = slice(start, start + STRIPE), slice(start + STRIPE, None)
        corner = torch.triu(G[here, here])
        G[here, here] = corner + torch.triu(corner, 1).T
        G[after, here] = G[here, after].T
    G.diagonal().copy_(diagonal)


def forward_solve(L: Float64[Tensor, "k k"], X: Float64[Tensor, "k w"]) -> Float64[Tensor, "k w"]:
    """L^-1 X for a lower triangular L."""
    if not L.is_cpu:
        below: Tensor = torch.linalg.solve_triangular(L, X, upper=False)
        return below
    Y = blas.fortran(X)
    blas.trsm(L, Y, transposed=False)
    return Y


def backward_solve(L: Float64[Tensor, "k k"], X: Float64[Tensor, "k w"]) -> Float64[Tensor, "k w"]:
    """L^-T X for a lower triangular L."""
    if not L.is_cpu:
        above: Tensor = torch.linalg.solve_triangular(L.T, X, upper=True)
        return above
    Y = blas.fortran(X)
    blas.trsm(L, Y, transposed=True)
    return Y


def symmetric_product(G: Float[Tensor, "k k"], X: Float[Tensor, "k b"]) -> Float[Tensor, "k b"]:
    """G X, reading the lower triangle of G only (BLAS `symm`), in the precision of both."""
    if not G.is_cpu:
        full = torch.tril(G) + torch.tril(G, -1).T
        return full @ X
    X = blas.fortran(X)
    Y = torch.empty_like(X)
    blas.symm(G, X, Y)
    return Y


def eigenvalues(G: Float64[Tensor, "k k"]) -> Float64[Tensor, " k"]:
    """All eigenvalues, ascending, from the lower triangle of G, which is spent."""
    return blas.syevd(G, b"L") if G.is_cpu else torch.linalg.eigvalsh(G)


def top_pairs(G: Float64[Tensor, "k k"], n: int) -> tuple[Float64[Tensor, " n"], Float64[Tensor, "k n"]]:
    """The n largest eigenvalues, ascending, and their vectors, from the lower triangle of G, which is spent."""
    if not G.is_cpu:
        values, Z = torch.linalg.eigh(G)
        return values[-n:], Z[:, -n:]
    return blas.syevr(G, b"L", len(G) - n, len(G) - 1)


def smallest_pairs(G: Float64[Tensor, "k k"], n: int) -> tuple[Float64[Tensor, " n"], Float64[Tensor, "k n"]]:
    """The n smallest eigenvalues, ascending, and their vectors, from the lower triangle of G, which is spent."""
    if not G.is_cpu:
        values, Z = torch.linalg.eigh(G)
        return values[:n], Z[:, :n]
    return blas.syevr(G, b"L", 0, n - 1)


def largest_pairs(A: Float[Tensor, "k k"], n: int) -> tuple[Float[Tensor, " n"], Float[Tensor, "k n"]]:
    """The n largest eigenvalues, descending, and their vectors, from the upper triangle of A."""
    values, Z = _some_pairs(A, n) if A.is_cpu else torch.linalg.eigh(A, UPLO="U")
    return values[-n:].flip(0), Z[:, -n:].flip(1)


def _some_pairs(A: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest pairs, ascending; or all, where bisection for some does not converge (many equal values)."""
    try:
        return blas.syevr(blas.fortran(A), b"U", len(A) - n, len(A) - 1)
    except torch.linalg.LinAlgError:
        values, Z = torch.linalg.eigh(A, UPLO="U")
        return values, Z
