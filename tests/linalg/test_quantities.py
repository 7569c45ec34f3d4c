"""Quantities of a spectrum against numpy, closed forms, sampled noise and the package `powerlaw`."""

import math
import warnings

import numpy as np
import powerlaw
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kasa_cli.linalg import quantities
from kasa_cli.linalg.noise import expected_spectrum
from kasa_cli.linalg.quantities import (
    effective_rank,
    energy,
    entropy,
    frobenius,
    marchenko_pastur,
    nuclear,
    numerical_rank,
    power_law,
    stable_rank,
)
from tests.builders.matrices import SHAPES, deficient, gaussian, log, with_spectrum

WEIGHTS = {
    **{name: gaussian(*shape) for name, shape in SHAPES.items()},
    "deficient": with_spectrum(30, 50, deficient(30, 7)),
    "row": gaussian(1, 20),
    "column": gaussian(20, 1),
    "one": gaussian(1, 1),
    "tiny": gaussian(12, 20) * 1e-180,
    "huge": gaussian(12, 20) * 1e180,
}


def spectrum(W: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.svd(W.numpy(), compute_uv=False).copy())


@pytest.mark.parametrize("W", WEIGHTS.values(), ids=WEIGHTS)
def test_norms_and_soft_ranks_are_numpys(W: Tensor) -> None:
    S, A = spectrum(W), W.numpy() / np.abs(W.numpy()).max()
    scale = float(W.abs().max())
    assert frobenius(S) == pytest.approx(np.linalg.norm(A) * scale, rel=1e-12)
    assert nuclear(S) == pytest.approx(np.linalg.norm(A, "nuc") * scale, rel=1e-12)
    assert stable_rank(S) == pytest.approx((np.linalg.norm(A) / np.linalg.norm(A, 2)) ** 2, rel=1e-12)


@pytest.mark.parametrize("W", WEIGHTS.values(), ids=WEIGHTS)
def test_entropy_and_effective_rank_are_scipys(W: Tensor) -> None:
    from scipy.stats import entropy as scipys

    S = spectrum(W)
    assert entropy(S) == pytest.approx(scipys(S.numpy()), abs=1e-12)
    assert effective_rank(S) == pytest.approx(math.exp(scipys(S.numpy())), rel=1e-12)


def test_a_flat_spectrum_has_every_rank_and_a_single_value_has_one() -> None:
    flat, single = torch.ones(7, dtype=torch.float64) * 3, deficient(7, 6)
    for soft_rank in (stable_rank, effective_rank):
        assert soft_rank(flat) == pytest.approx(7)
        assert soft_rank(single) == pytest.approx(1)
    assert entropy(flat) == pytest.approx(math.log(7))
    assert entropy(single) == 0
    assert energy(flat, 3) == pytest.approx(3 / 7)


def test_a_zero_weight_has_no_rank_and_loses_nothing() -> None:
    S = torch.zeros(4, dtype=torch.float64)
    ranks = frobenius(S), nuclear(S), entropy(S), stable_rank(S), effective_rank(S), numerical_rank(S, (4, 9))
    assert ranks == (0, 0, 0, 0, 0, 0)
    assert energy(S, 2) == energy(S, 9) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.integers(1, 25), st.floats(1e-150, 1e150))
def test_soft_ranks_and_energy_lie_in_their_bounds_at_any_scale(
    values: list[float], rank: int, scale: float
) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert 1 - 1e-12 <= stable_rank(S) <= effective_rank(S) ** 2 + 1e-9
    assert 1 - 1e-12 <= effective_rank(S) <= len(S) * (1 + 1e-12)
    squares = np.square(S.numpy())
    assert energy(S * scale, rank) == pytest.approx(squares[:rank].sum() / squares.sum(), rel=1e-12)
    assert stable_rank(S * scale) == pytest.approx(squares.sum() / squares[0], rel=1e-12)
    assert effective_rank(S * scale) == pytest.approx(effective_rank(S), rel=1e-9)


@pytest.mark.parametrize("W", WEIGHTS.values(), ids=WEIGHTS)
def test_numerical_rank_is_numpys(W: Tensor) -> None:
    assert numerical_rank(spectrum(W), tuple(W.shape)) == np.linalg.matrix_rank(W.numpy())


def test_numerical_rank_is_strict_takes_the_longer_side_and_the_eps_given() -> None:
    S = torch.tensor([1.0, 64 * 2.0**-8, 64 * 2.0**-8 + 1e-9, 1e-3], dtype=torch.float64).sort(
        descending=True
    )[0]
    assert numerical_rank(S, (4, 64), eps=2.0**-8) == numerical_rank(S, (64, 4), eps=2.0**-8) == 2
    assert numerical_rank(S, (4, 64)) == 4


NOISE = [(256, 256), (100, 1000), (1000, 100), (300, 310), (64, 512), (40, 41)]


@pytest.mark.parametrize("shape", NOISE, ids=str)
@pytest.mark.parametrize("std", [1.0, 0.02])
def test_pure_noise_is_recognised_with_its_std(shape: tuple[int, int], std: float) -> None:
    edges = [marchenko_pastur(spectrum(std * gaussian(*shape, seed=seed)), shape) for seed in range(5)]
    assert np.median([edge.sigma for edge in edges]) == pytest.approx(std, rel=0.02)
    assert max(edge.above for edge in edges) <= 1
    k, long = min(shape), max(shape)
    for edge in edges:
        assert edge.upper == pytest.approx(edge.sigma * (math.sqrt(long) + math.sqrt(k)))
        assert edge.lower == pytest.approx(edge.sigma * (math.sqrt(long) - math.sqrt(k)))


@pytest.mark.parametrize("shape", [(150, 150), (110, 300), (300, 110)], ids=str)
@pytest.mark.parametrize("num_spikes", [1, 5, 30, 50])
def test_spikes_above_noise_are_counted_and_leave_its_std_alone(
    shape: tuple[int, int], num_spikes: int
) -> None:
    """The largest value of pure noise is above the edge in one of six samples, and the median count is 0."""
    k = min(shape)
    signal = torch.cat([torch.linspace(9, 4, num_spikes), torch.zeros(k - num_spikes)]).to(torch.float64)
    spikes = math.sqrt(max(shape)) * with_spectrum(*shape, signal)
    edges = [marchenko_pastur(spectrum(gaussian(*shape, seed=s) + spikes), shape) for s in range(10, 17)]
    assert np.median([edge.above for edge in edges]) == num_spikes
    assert all(num_spikes <= edge.above <= num_spikes + 1 for edge in edges)
    assert np.median([edge.sigma for edge in edges]) == pytest.approx(1, rel=0.015)


def test_a_median_that_the_spikes_have_moved_is_matched_anew_without_them() -> None:
    """The noise is the exact quantiles, so that only the fit contributes an error."""
    shape, num_spikes = (200, 300), 40
    noise = expected_spectrum((200 - num_spikes, 300 - num_spikes))
    S = torch.cat([torch.full([num_spikes], 200, dtype=torch.float64), noise])
    edge = marchenko_pastur(S, shape)
    assert edge.above == num_spikes
    assert edge.sigma == pytest.approx(1, rel=1e-3)
    assert float(S.median() / expected_spectrum(shape).median()) > 1.03


def test_degenerate_spectra_have_an_edge_too() -> None:
    zero = marchenko_pastur(torch.zeros(5, dtype=torch.float64), (5, 8))
    assert (zero.sigma, zero.lower, zero.upper, zero.above) == (0, 0, 0, 0)
    low_rank = marchenko_pastur(deficient(9, 6), (9, 12))
    assert (low_rank.sigma, low_rank.above) == (0, 3)
    identity = marchenko_pastur(torch.ones(9, dtype=torch.float64), (9, 9))
    assert identity.above == 0
    assert identity.upper > 1 > identity.lower
    for shape in [(1, 1), (1, 50), (50, 1)]:
        single = marchenko_pastur(torch.tensor([3.0], dtype=torch.float64), shape)
        assert single.above == 0
        assert single.lower < 3 < single.upper


def fitted(S: Tensor, **options: object) -> powerlaw.Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return powerlaw.Fit(S.numpy() ** 2, verbose=False, **options)


def pareto(alpha: float, n: int) -> Tensor:
    """Singular values whose squares are samples of the power law, by inversion."""
    uniform = np.random.default_rng(int(alpha * 10)).random(n)
    return torch.from_numpy(np.sort((1 - uniform) ** (-0.5 / (alpha - 1)))[::-1].copy())


HEAVY = torch.from_numpy(np.random.default_rng(1).standard_t(1.5, (150, 200)))
TAILS = {
    **{f"pareto {alpha}": pareto(alpha, 300) for alpha in (1.7, 2.2, 2.8, 4.0, 6.0)},
    "square noise": spectrum(gaussian(150, 150)),
    "wide noise": spectrum(gaussian(100, 400)),
    "low rank in noise": spectrum(gaussian(120, 200) + gaussian(120, 10) @ gaussian(10, 200)),
    "heavy": spectrum(HEAVY),
    "every value three times": spectrum(HEAVY)[:60].repeat_interleave(3),
    "log": log(80, 1e4),
    "with zeros": torch.cat([pareto(2.2, 90), torch.zeros(30, dtype=torch.float64)]),
    "more than a chunk": pareto(2.2, quantities.CHUNK + 90),
    "a tail of two would fit best": torch.tensor([30.0, 29, 20, 1], dtype=torch.float64),
    "four": torch.tensor([4.0, 3, 2, 1], dtype=torch.float64),
}


@pytest.mark.parametrize("S", TAILS.values(), ids=TAILS)
def test_the_tail_is_the_packages(S: Tensor) -> None:
    """Beyond 3 the package fits numerically, to 1e-4 at worst, and only if its default bound is lifted."""
    fit, theirs = power_law(S), fitted(S, parameter_ranges={"alpha": [1, 1000]})
    assert fit is not None
    assert fit.alpha == pytest.approx(theirs.alpha, rel=1e-4)
    assert fit.xmin == pytest.approx(theirs.xmin, rel=1e-12)
    assert fit.distance == pytest.approx(theirs.D, abs=1e-6)
    assert fit.tail == theirs.n_tail


@pytest.mark.parametrize("name", ["pareto 1.7", "pareto 2.2", "low rank in noise", "heavy"])
def test_the_tail_is_the_packages_to_roundoff_where_it_needs_no_numerical_fit(name: str) -> None:
    fit, theirs = power_law(TAILS[name]), fitted(TAILS[name])
    assert fit is not None
    assert 1.5 < fit.alpha < 3
    assert (fit.alpha, fit.distance) == pytest.approx((theirs.alpha, theirs.D), rel=1e-10)


def test_alpha_is_that_of_the_law_sampled_and_the_scale_is_nothing_to_it() -> None:
    for alpha in (2.0, 3.5):
        S = pareto(alpha, 4000)
        fit, scaled = power_law(S), power_law(S * 1e-30)
        assert fit is not None
        assert scaled is not None
        assert fit.alpha == pytest.approx(alpha, rel=0.06)
        assert scaled.alpha == pytest.approx(fit.alpha, rel=1e-9)
        assert scaled.xmin == pytest.approx(fit.xmin * 1e-60, rel=1e-9)


@pytest.mark.parametrize(
    "S",
    [
        torch.zeros(9, dtype=torch.float64),
        torch.ones(9, dtype=torch.float64),
        1 + 1e-15 * torch.arange(9, 0, -1, dtype=torch.float64),
        deficient(9, 6),
        torch.cat([log(3, 10), 1e-17 * log(30, 10)]),
        torch.tensor([5.0], dtype=torch.float64),
    ],
    ids=["zero", "identity", "identity to roundoff", "three values", "three and roundoff", "one"],
)
def test_no_tail_is_read_into_fewer_than_four_values(S: Tensor) -> None:
    assert power_law(S) is None
