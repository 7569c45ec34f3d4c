"""Block Lanczos with full reorthogonalisation: the dominant end of a symmetric operator.

Golub and Underwood, "The block Lanczos method for computing eigenvalues", 1977.
Shapes: k = size of the operator, b = block, m = basis (a multiple of b), p = Ritz pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

START_SEED = 20260
"""The start block is the same for every matrix of a size: same input, same bytes."""

FIRST_LOOK = 3


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs, dominant first, each with the norm of its residual."""

    values: Float[Tensor, " m"]
    vectors: Float[Tensor, "k p"]
    residuals: Float[Tensor, " m"]
    has_settled: bool


Operator = Callable[[Tensor], Tensor]
Doubt = Callable[[Tensor, Tensor], float]
"""(values, residuals) → how far the wanted pairs are from settled; at most 1 when they are."""


def dominant(
    operator: Operator, start: Float[Tensor, "k b"], num_pairs: int, num_steps: int, doubt: Doubt
) -> Ritz:
    """The pairs of largest eigenvalue, by Rayleigh and Ritz over the block Krylov basis of `start`.

    Stops as soon as `doubt` is at most 1, or after `num_steps` blocks with `has_settled` False.
    """
    k, b = start.shape
    basis = start.new_empty((num_steps + 1) * b, k)
    basis[:b] = torch.linalg.qr(start)[0].T
    projected = start.new_zeros(num_steps * b, num_steps * b)
    look = FIRST_LOOK
    past: tuple[int, float] | None = None
    for step in range(1, num_steps + 1):
        m = step * b
        Q, R, coefficients = _orthogonalise(operator(basis[m - b : m].T), basis[:m])
        projected[:m, m - b : m] = coefficients
        if step >= look or step == num_steps:
            values, S = _eigh(projected[:m, :m])
            residuals = torch.linalg.vector_norm(R @ S[-b:], dim=0)
            worry = doubt(values, residuals)
            if worry <= 1 or step == num_steps:
                return Ritz(values, basis[:m].T @ S[:, :num_pairs], residuals, worry <= 1)
            look, past = step + _wait(step, worry, past), (step, worry)
        basis[m : m + b] = Q.T
    raise AssertionError("unreachable: the last step returns")


def start_block(k: int, b: int, like: Tensor) -> Float[Tensor, "k b"]:
    """The fixed random block that every run starts from."""
    generator = torch.Generator().manual_seed(START_SEED)
    return torch.randn(k, b, generator=generator, dtype=torch.float64).to(like)


def _orthogonalise(Z: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z = basis.T @ coefficients + Q R, with Q orthonormal and orthogonal to the basis.

    Twice is enough (Kahan and Parlett), if normalised in between: at an invariant subspace the first remainder is
    nothing but roundoff.
    """
    first = basis @ Z
    Q1, R1 = torch.linalg.qr(Z - basis.T @ first)
    second = basis @ Q1
    Q2, R2 = torch.linalg.qr(Q1 - basis.T @ second)
    return Q2, R2 @ R1, first + second @ R1


def _eigh(projected: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of the projected operator (upper triangle given), largest first."""
    values, S = torch.linalg.eigh(projected, UPLO="U")
    return values.flip(0), S.flip(1)


def _wait(step: int, worry: float, past: tuple[int, float] | None) -> int:
    """Steps until the next look, from the rate since the last one: a look costs more than a step."""
    if past is None or worry >= past[1] or not math.isfinite(worry):
        return 3
    rate = math.log(past[1] / worry) / (step - past[0])
    return max(1, min(8, math.ceil(math.log(worry) / rate)))
