"""Block Lanczos with full reorthogonalisation: the dominant end of a symmetric operator.

Golub and Underwood, "The block Lanczos method for computing eigenvalues", 1977.
Shapes: k = size of the operator, b = block, m = basis (a multiple of b), p = Ritz pairs, n ≥ p.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kasa_cli.linalg import kernels

START_SEED = 20260
"""The initial block is the same for every matrix of a size, so that the same input gives the same bytes."""

FIRST_LOOK = 3
MOST_PASSES = 4
MUCH_IS_LEFT = 0.7


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs, dominant first, each with the norm of its residual."""

    values: Float[Tensor, " n"]
    vectors: Float[Tensor, "k p"]
    residuals: Float[Tensor, " n"]
    has_settled: bool


Operator = Callable[[Tensor], Tensor]
Doubt = Callable[[Tensor, Tensor], float]
"""(values, residuals) → how far the wanted pairs are from convergence; at most 1 once they have converged."""


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
        Q, R, coefficients = _orthogonalise(operator(basis[m - b : m].T), basis[:m], 2 * b)
        projected[:m, m - b : m] = coefficients
        if step >= look or step == num_steps:
            values, S = kernels.largest_pairs(projected[:m, :m], min(b + 1, m))
            residuals = torch.linalg.vector_norm(R @ S[-b:], dim=0)
            worry = doubt(values, residuals)
            if worry <= 1 or step == num_steps:
                return Ritz(values, basis[:m].T @ S[:, :num_pairs], residuals, worry <= 1)
            look, past = step + _wait(step, worry, past), (step, worry)
        basis[m : m + b] = Q.T
    raise AssertionError("unreachable: the last step returns")


def start_block(k: int, b: int, like: Tensor) -> Float[Tensor, "k b"]:
    """The fixed random block from which every run starts."""
    generator = torch.Generator().manual_seed(START_SEED)
    return torch.randn(k, b, generator=generator, dtype=torch.float64).to(like)


def _orthogonalise(Z: Tensor, basis: Tensor, recent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Z = basis.T @ coefficients + Q R, with Q orthonormal and orthogonal to the basis.

    First against the last two blocks, which suffices in exact arithmetic (three-term recurrence); then, normalised,
    against all blocks. The second step repeats where it removed much (Daniel, Gragg, Kaufman and Stewart): at an
    invariant subspace the first remainder is pure roundoff.
    """
    near = basis[-recent:]
    first = near @ Z
    Q, R = torch.linalg.qr(Z - near.T @ first)
    coefficients = Z.new_zeros(len(basis), Z.shape[1])
    coefficients[-recent:] = first
    for _ in range(MOST_PASSES):
        part = basis @ Q
        coefficients += part @ R
        Q, left = torch.linalg.qr(Q - basis.T @ part)
        R = left @ R
        if float(left.diagonal().abs().min()) > MUCH_IS_LEFT:
            break
    return Q, R, coefficients


def _wait(step: int, worry: float, past: tuple[int, float] | None) -> int:
    """Steps until the next check, from the rate of convergence since the last: a check costs more than a step."""
    if past is None or worry >= past[1] or not math.isfinite(worry):
        return 3
    rate = math.log(past[1] / worry) / (step - past[0])
    return max(1, min(8, math.ceil(math.log(worry) / rate)))
