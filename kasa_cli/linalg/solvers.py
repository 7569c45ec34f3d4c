"""Solvers for the subspaces of the smallest and the largest singular vectors of a frame.

Shapes: k, l = short and long side of the frame, t = wanted components, p ≥ t = with padding, b = block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import scipy.linalg
import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import NumericalError
from kasa_cli.linalg import kernels
from kasa_cli.linalg.gram import LAPACK_LIMIT, TOP_BLOCK, Gram
from kasa_cli.linalg.lanczos import Doubt, Operator, dominant, start_block

PADDING = 8
"""Directions kept beyond the wanted ones: the last Rayleigh-Ritz step inside them removes most of the angle."""
DENSE_SIDE = 512
"""Up to this short side a full eigendecomposition of the Gram matrix is the cheapest."""
DENSE_EDGE = 1.2
"""From this ratio of sides the small singular values of a random weight lie away from zero, and close together."""
LONG = 2
"""From this ratio of sides the triangle of a QR decomposition takes less memory than the frame, workspace
included."""
SCOUT_STEPS = 7
BOTTOM_STEPS = 48
SUBSPACE_TOLERANCE = 1e-8
NEXT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Directions:
    """Orthonormal bases of both ends of the short side, and the name of their solver.

    `is_squared`: the solver saw squared singular values, so its angle is bound by the squared gap.
    """

    bottom: Float64[Tensor, "k p"]
    top: Float64[Tensor, "k b"]
    frobenius: float
    solver: str
    is_squared: bool


Solver = Callable[[Gram, int], Directions | None]
"""Returns None if it cannot handle the matrix; the next solver of the ladder follows."""


def gram_eigh(gram: Gram, t: int) -> Directions:
    """Eigenvectors of the Gram matrix by LAPACK: all of a small matrix, the wanted ones of a large one."""
    k = gram.frame.num_short
    p = min(t + PADDING, k)
    if k <= DENSE_SIDE:
        Z = torch.linalg.eigh(gram.lend())[1]
        return Directions(Z[:, :p], Z[:, -TOP_BLOCK:], gram.frobenius, "gram-eigh", is_squared=True)
    top = gram.leading
    Z = kernels.smallest_pairs(gram.lend(), p)[1]
    return Directions(Z, top, gram.frobenius, "gram-eigh", is_squared=True)


def gram_lanczos(gram: Gram, t: int) -> Directions | None:
    """Block Lanczos on the inverse of the Gram matrix, through its Cholesky factor."""
    top, M = gram.leading, gram.frame
    factored = _factored(gram)
    if factored is None:
        return None
    L, diagonal = factored
    has_dense_edge = M.num_long >= DENSE_EDGE * M.num_short
    Z = _at_dense_edge(L, diagonal, t) if has_dense_edge else _smallest(_inverse(L), L, t)
    return None if Z is None else Directions(Z, top, gram.frobenius, "gram-lanczos", is_squared=True)


def cholesky_qr2(gram: Gram, t: int) -> Directions | None:
    """Block Lanczos on (R^T R)^-1 with R from a Cholesky QR done twice: no squared condition number.

    Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, "Roundoff error analysis of the CholeskyQR2 algorithm", 2015.
    """
    top, M = gram.leading, gram.frame
    factored = _factored(gram)
    if factored is None:
        return None
    L, _ = factored
    L2 = kernels.square(M.num_short, M.device)
    for _, panel in M.panels():
        kernels.add_panel(L2, kernels.forward_solve(L, panel))
    if not kernels.factorise(L2):
        return None

    def inverse(X: Tensor) -> Tensor:
        half = kernels.forward_solve(L2, kernels.forward_solve(L, X))
        return kernels.backward_solve(L, kernels.backward_solve(L2, half))

    Z = _smallest(inverse, L, t)
    return None if Z is None else Directions(Z, top, gram.frobenius, "cholesky-qr2", is_squared=False)


def svd(gram: Gram, t: int) -> Directions:
    """The full singular value decomposition in float64: slow, and right for every condition number.

    A long frame is reduced to the triangle of a QR decomposition first, so that it is never held in float64.

    Raises:
        NumericalError: LAPACK does not converge by either of its drivers, or cannot index the matrix.
    """
    M = gram.frame
    k, width = M.num_short, min(M.num_long, LONG * M.num_short)
    if max(k * width, 4 * k * k + 7 * k) > LAPACK_LIMIT:
        raise NumericalError(f"a full decomposition of {k} x {M.num_long} is beyond what LAPACK can index")
    A = M.dense() if M.num_long < LONG * k else M.triangle().T
    U = _left_vectors(A)
    frobenius = float(torch.linalg.matrix_norm(A))
    return Directions(U[:, -min(t + PADDING, k) :], U[:, :TOP_BLOCK], frobenius, "svd", is_squared=False)


SOLVERS: dict[str, Solver] = {
    "gram-eigh": gram_eigh,
    "gram-lanczos": gram_lanczos,
    "cholesky-qr2": cholesky_qr2,
    "svd": svd,
}


def ladder(k: int, t: int) -> tuple[str, ...]:
    """The solvers to try in turn: the cheapest for the shape first, the unconditional one last.

    >>> ladder(384, 16)
    ('gram-eigh', 'svd')
    >>> ladder(4096, 16)
    ('gram-lanczos', 'gram-eigh', 'cholesky-qr2', 'svd')
    """
    if k <= DENSE_SIDE or 8 * (t + PADDING) > k:
        return ("gram-eigh", "svd")
    return ("gram-lanczos", "gram-eigh", "cholesky-qr2", "svd")


def _factored(gram: Gram) -> tuple[Tensor, Tensor] | None:
    """The Cholesky factor of the Gram matrix, and the diagonal of the matrix that was factorised.

    The matrix itself stands above the diagonal of the factor. A singular matrix is shifted, which leaves its
    eigenvectors as they are.
    """
    G, diagonal = gram.lend(), gram.diagonal
    if not kernels.factorise(G):
        diagonal = diagonal + len(G) * torch.finfo(torch.float64).eps * gram.trace
        kernels.restore(G, diagonal)
        if not kernels.factorise(G):
            return None
    return G, diagonal


def _inverse(L: Tensor) -> Operator:
    return lambda X: kernels.backward_solve(L, kernels.forward_solve(L, X))


def _at_dense_edge(L: Tensor, diagonal: Tensor, t: int) -> Tensor | None:
    """The padded bottom directions where the spectrum begins away from zero, and is dense there.

    Inverting at zero then converges slowly. A few steps estimate where the spectrum begins; with a factor shifted to
    just below it, and from the directions of those steps, half as many steps are enough (shift and invert, Ericsson
    and Ruhe, 1980).
    """
    k, b = len(L), t + PADDING
    scout = dominant(_inverse(L), start_block(k, b, L), b, SCOUT_STEPS, subspace_doubt(t))
    shift = 1 / float(scout.values[0] + scout.residuals[0])
    kernels.restore(L, diagonal - shift)
    if kernels.factorise(L):
        return _smallest(_inverse(L), L, t, scout.vectors)
    kernels.restore(L, diagonal)
    return _smallest(_inverse(L), L, t, scout.vectors) if kernels.factorise(L) else None


def _smallest(inverse: Operator, like: Tensor, t: int, start: Tensor | None = None) -> Tensor | None:
    """The padded bottom directions, or None when the Krylov space is exhausted before they converge."""
    k, b = like.shape[0], t + PADDING
    steps = min(BOTTOM_STEPS, 3 * k // (4 * b))
    block = start_block(k, b, like) if start is None else start
    ritz = dominant(inverse, block, b, steps, subspace_doubt(t))
    # One more inverse step shrinks most the components of large σ, which weigh most in a residual.
    return torch.linalg.qr(inverse(ritz.vectors))[0] if ritz.has_settled else None


def subspace_doubt(t: int) -> Doubt:
    """Angle of the wanted subspace to the padded one (Davis and Kahan), in units of the tolerance.

    The first pair kept must have converged too, since its value is part of the result.
    """

    def doubt(values: Tensor, residuals: Tensor) -> float:
        reach = torch.cumsum(residuals.square(), 0).sqrt()[t - 1 : t + PADDING]
        if float(reach[0]) <= 4 * torch.finfo(values.dtype).eps * float(values[0]):
            return 0.0
        gaps = (values[t - 1] - values[t : t + PADDING + 1]).clamp_min(torch.finfo(values.dtype).tiny)
        next_residual = float(residuals[t] / values[t])
        return max(float((reach / gaps).min()) / SUBSPACE_TOLERANCE, next_residual / NEXT_TOLERANCE)

    return doubt


def _left_vectors(A: Float64[Tensor, "k l"]) -> Float64[Tensor, "k k"]:
    """Left singular vectors by divide and conquer, or by QR iteration where that does not converge."""
    try:
        U: Tensor = torch.linalg.svd(A, full_matrices=False)[0]
    except torch.linalg.LinAlgError:
        try:
            factors = scipy.linalg.svd(A.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        except scipy.linalg.LinAlgError as error:
            raise NumericalError("LAPACK did not converge") from error
        U = torch.from_numpy(factors[0]).to(A)
    return U
