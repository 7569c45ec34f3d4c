"""The expected spectrum against sampled Gaussian matrices, the density itself and its limits."""

import math

import numpy as np
import pytest
import torch

from kasa_cli.linalg.noise import expected_spectrum, quantiles
from tests.builders.matrices import gaussian

SHAPES = [(128, 128), (60, 240), (240, 60), (96, 100), (30, 600), (2, 2), (1, 9), (1, 1)]


def medians(shape: tuple[int, int], num: int = 31) -> tuple[np.ndarray, float]:
    """Mean of each singular value and median of the condition number over samples."""
    samples = np.stack([gaussian(*shape, seed=seed).numpy() for seed in range(num)])
    S = np.linalg.svd(samples, compute_uv=False)
    return np.median(S, axis=0), float(np.median(S[:, 0] / S[:, -1]))


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_samples_have_the_expected_spectrum(shape: tuple[int, int]) -> None:
    sampled, kappa = medians(shape)
    S = expected_spectrum(shape).numpy()
    bulk = len(S) * 9 // 10
    assert np.abs(sampled[:bulk] / S[:bulk] - 1).max() < 0.03
    assert 0.6 <= sampled[-1] / S[-1] <= 1.05
    assert 0.95 <= kappa / (S[0] / S[-1]) <= (1.06 if 2 * min(shape) <= max(shape) else 1.75)


def test_the_smallest_of_a_square_matrix_is_of_the_order_of_edelmans_median() -> None:
    """P(σ_min √k ≤ x) = 1 - exp(-x²/2 - x) in the limit: a median of 0.545 where the quantile is π/4."""
    for k in (64, 1024, 8192):
        smallest = float(expected_spectrum((k, k))[-1]) * math.sqrt(k)
        assert smallest == pytest.approx(math.pi / 4, rel=1e-3)
        assert smallest / (math.sqrt(1 + 2 * math.log(2)) - 1) == pytest.approx(1.44, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_spectrum_is_positive_descending_and_between_the_edges(shape: tuple[int, int]) -> None:
    k, long = min(shape), max(shape)
    S = expected_spectrum(shape)
    assert S.shape == (k,)
    assert bool((S[1:] < S[:-1]).all())
    assert float(S[-1]) > math.sqrt(long) - math.sqrt(k)
    assert float(S[0]) < math.sqrt(long) + math.sqrt(k)
    assert torch.equal(S, expected_spectrum(shape[::-1]))


@pytest.mark.parametrize("shape", [(300, 300), (200, 900), (500, 520)], ids=str)
def test_the_quantiles_have_the_moments_of_the_law(shape: tuple[int, int]) -> None:
    """E x = 1 and E x² = 1 + β of the eigenvalues x over l; and ‖W‖_F² = o i."""
    x = expected_spectrum(shape).square() / max(shape)
    beta = min(shape) / max(shape)
    assert float(x.mean()) == pytest.approx(1, rel=1e-3)
    assert float(x.square().mean()) == pytest.approx(1 + beta, rel=2e-3)


@pytest.mark.parametrize("beta", [1.0, 0.9, 0.5, 0.01])
def test_quantiles_invert_the_integral_of_the_density(beta: float) -> None:
    """√((b - x)(x - a)) / (2πβx) on the eigenvalues, integrated by scipy."""
    from scipy.integrate import quad

    a, b = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    long = 10_000
    shares = torch.tensor([0.01, 0.25, 0.5, 0.9, 0.999], dtype=torch.float64)
    for share, value in zip(shares, quantiles((long, round(long * beta)), shares), strict=True):
        middle = float(value) ** 2 / long
        below, _ = quad(
            lambda x: math.sqrt((b - x) * (x - a)) / (2 * math.pi * beta * x), a, middle, limit=200
        )
        assert below == pytest.approx(float(share), abs=1e-6)


def test_a_square_spectrum_is_that_of_the_quarter_circle() -> None:
    """F(s) = (s √(4 - s²) / 2 + 2 asin(s/2)) / π of s = σ/√k, in closed form."""
    s = expected_spectrum((500, 500)).flip(0) / math.sqrt(500)
    shares = (s * (4 - s * s).sqrt() / 2 + 2 * (s / 2).asin()) / math.pi
    assert torch.allclose(shares, (torch.arange(500, dtype=torch.float64) + 0.5) / 500, atol=1e-12)
