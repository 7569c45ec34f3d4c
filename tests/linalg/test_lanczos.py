"""Block Lanczos on operators whose eigenvalues are known."""

import pytest
import torch

from kasa_cli.linalg.lanczos import Ritz, dominant, start_block
from tests.builders.matrices import distance, gaussian, orthonormal, same_bytes

K, B, PAIRS = 120, 6, 4


def operator(values, seed=3):
    """A symmetric operator with these eigenvalues, and its eigenvectors."""
    Q = orthonormal(K, K, seed)
    return lambda X: Q @ (values[:, None] * (Q.T @ X)), Q


def worst(tolerance):
    return lambda values, residuals: float(residuals[:PAIRS].max() / values[0]) / tolerance


def run(values, tolerance=1e-10, num_steps=20) -> Ritz:
    A, _ = operator(values)
    return dominant(A, start_block(K, B, values), PAIRS, num_steps, worst(tolerance))


SPECTRA = {
    "geometric": 0.8 ** torch.arange(K, dtype=torch.float64),
    "linear": torch.linspace(1, 0, K, dtype=torch.float64),
    "a gap": torch.cat([torch.full((PAIRS,), 9.0), torch.linspace(1, 0, K - PAIRS)]).to(torch.float64),
    "multiple, within a block": torch.tensor([5.0, 5, 5, 4] + [1.0] * (K - 4), dtype=torch.float64),
    "multiple, more than a block": torch.tensor([5.0] * 20 + [1.0] * (K - 20), dtype=torch.float64),
    "rank 2": torch.tensor([3.0, 1] + [0.0] * (K - 2), dtype=torch.float64),
    "negative tail": torch.linspace(1, -0.5, K, dtype=torch.float64),
    "inverse of a small value": torch.tensor([1e14, 1e3] + [1.0] * (K - 2), dtype=torch.float64),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_the_dominant_pairs_are_found(values):
    found, (A, _) = run(values), operator(values)
    assert found.has_settled
    assert torch.allclose(found.values[:PAIRS], values[:PAIRS], rtol=1e-9, atol=1e-9 * float(values[0]))
    V = found.vectors
    assert (V.T @ V - torch.eye(PAIRS)).abs().max() <= 1e-12
    assert torch.linalg.matrix_norm(A(V) - V * found.values[:PAIRS]) <= 1e-8 * values[0]


def test_the_space_of_separated_values_is_the_true_one():
    values = SPECTRA["a gap"]
    assert distance(run(values).vectors, operator(values)[1][:, :PAIRS]) <= 1e-8


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_residuals_are_what_they_say(values):
    found, (A, _) = run(values, num_steps=4), operator(values)
    V = found.vectors
    measured = torch.linalg.vector_norm(A(V) - V * found.values[:PAIRS], dim=0)
    assert torch.allclose(measured, found.residuals[:PAIRS], atol=1e-11 * float(values[0]), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.0])
def test_a_basis_that_breaks_down_stays_orthonormal(scale):
    found = dominant(
        lambda X: scale * X, start_block(K, B, torch.ones(1, dtype=torch.float64)), PAIRS, 9, worst(1e300)
    )
    assert torch.allclose(found.values, torch.full_like(found.values, scale), atol=1e-13)
    assert (found.vectors.T @ found.vectors - torch.eye(PAIRS)).abs().max() <= 1e-12
    assert found.residuals.max() <= 1e-13


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_all_of_the_space_is_reached_without_harm(values):
    found = dominant(operator(values)[0], start_block(K, B, values), PAIRS, K // B, lambda *_: 2.0)
    assert not found.has_settled
    assert torch.allclose(found.values, values[: len(found.values)], atol=1e-12 * float(values[0]))
    assert (found.vectors.T @ found.vectors - torch.eye(PAIRS)).abs().max() <= 1e-12


def test_too_few_steps_are_told():
    assert not run(SPECTRA["linear"], num_steps=2).has_settled


@pytest.mark.parametrize("worry", [float("inf"), float("nan"), 1e30, 3.0])
def test_looks_are_rarer_than_steps_and_the_last_step_is_looked_at(worry):
    steps, looks = [], []
    A, _ = operator(SPECTRA["linear"])

    def counted(X):
        steps.append(len(steps) + 1)
        return A(X)

    def doubt(values, residuals):
        looks.append(len(steps))
        return worry

    dominant(counted, start_block(K, B, torch.ones(1, dtype=torch.float64)), PAIRS, 16, doubt)
    assert steps == list(range(1, 17))
    assert (looks[0], looks[-1]) == (3, 16)
    assert len(looks) <= 6


def test_it_works_in_float32():
    values = SPECTRA["geometric"].to(torch.float32)
    Q = orthonormal(K, K, 3).to(torch.float32)
    A = lambda X: Q @ (values[:, None] * (Q.T @ X))  # noqa: E731
    found = dominant(A, start_block(K, B, values), PAIRS, 15, worst(1e-5))
    assert found.vectors.dtype == torch.float32
    assert torch.allclose(found.values[:PAIRS], values[:PAIRS], rtol=1e-5)


def test_the_start_does_not_depend_on_the_state_of_torch():
    like = torch.ones(1, dtype=torch.float64)
    first = start_block(K, B, like)
    torch.rand(3)
    assert same_bytes(first, start_block(K, B, like))
    assert torch.linalg.matrix_rank(first) == B
    assert start_block(K, B, like.to(torch.float32)).dtype == torch.float32


def test_the_same_operator_gives_the_same_bytes():
    A = gaussian(K, K)
    A = A + A.T
    runs = [dominant(lambda X: A @ X, start_block(K, B, A), PAIRS, 18, worst(1e-9)) for _ in range(2)]
    assert same_bytes(runs[0].vectors, runs[1].vectors)
