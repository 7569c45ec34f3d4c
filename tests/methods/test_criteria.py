"""Criteria against numpy, an independent implementation of Spectrum's published formula, and PEFT's rule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kasa_cli.errors import NumericalError
from kasa_cli.methods.criteria import CRITERIA, RULES, Score, Spectrum, expected
from tests.builders.matrices import SHAPES, deficient, gaussian, linear, log, with_spectrum

WEIGHTS = {
    **{name: gaussian(*shape) for name, shape in SHAPES.items()},
    "spiked": gaussian(60, 90) + 3 * gaussian(60, 4) @ gaussian(4, 90),
    "log": with_spectrum(50, 70, log(50, 1e4)),
    "deficient": with_spectrum(50, 70, deficient(50, 9)),
    "flat": with_spectrum(24, 24, linear(24, 1.001)),
    "row": gaussian(1, 20),
    "thin": gaussian(300, 3),
}


def measured(W: Tensor, dtype: torch.dtype = torch.float64) -> Spectrum:
    shape = (W.shape[0], W.shape[1])
    values = torch.linalg.svdvals(W.to(dtype))
    return Spectrum(shape, float(values[0]), float(values[-1]), float(np.linalg.norm(W.numpy())), values)


def of_values(*values: float, shape: tuple[int, int] | None = None) -> Spectrum:
    S = torch.tensor(values, dtype=torch.float64)
    return Spectrum(shape or (len(S), len(S)), float(S[0]), float(S[-1]), float(S.norm()), S)


@pytest.mark.parametrize("W", WEIGHTS.values(), ids=WEIGHTS)
def test_scores_that_need_no_spectrum_are_numpys(W: Tensor) -> None:
    whole = measured(W)
    ends = Spectrum(whole.shape, whole.sigma_max, whole.sigma_min, whole.frobenius)
    A = W.numpy()
    if np.linalg.cond(A) < 1e12:
        assert CRITERIA["kappa"].score(ends) == pytest.approx(np.linalg.cond(A), rel=1e-9)
    stable = (np.linalg.norm(A) / np.linalg.norm(A, 2)) ** 2
    assert CRITERIA["stable-rank"].score(ends) == pytest.approx(stable, rel=1e-9)


def test_kappa_by_pefts_rule_adds_an_absolute_epsilon() -> None:
    peft = RULES["peft"]
    assert peft(of_values(2e-6, 1e-6)) == pytest.approx(2e-6 / 1.01e-6)
    assert peft(of_values(1.0, 1.0)) == pytest.approx(0.99999999, abs=1e-12)
    assert peft(of_values(3.0, 0.0)) == pytest.approx(3e8)
    assert peft(of_values(0.0, 0.0)) == 0


def test_kappa_by_the_strict_rule_is_infinite_for_a_singular_and_a_zero_weight() -> None:
    strict = RULES["strict"]
    assert strict(of_values(2e-6, 1e-6)) == 2
    assert strict(of_values(3.0, 0.0)) == strict(of_values(0.0, 0.0)) == math.inf
    assert CRITERIA["kappa"].score is strict


def published(S: np.ndarray, shape: tuple[int, int]) -> float:
    """Spectrum's formula, implemented from its description in numpy and in the dtype of the values."""
    q25, q75 = (np.quantile(S, q, method="linear") for q in (0.25, 0.75))
    beta = min(shape) / max(shape)
    threshold = (q75 - q25) / S.dtype.type(1.349) * S.dtype.type(1 + np.sqrt(beta))
    is_noise = np.less_equal(S, threshold)
    signal, noise = S[~is_noise].sum(), S[is_noise].sum() if is_noise.any() else S.dtype.type(1)
    return float(signal / noise / S[0]) if noise else math.inf


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=str)
@pytest.mark.parametrize("W", WEIGHTS.values(), ids=WEIGHTS)
def test_snr_is_spectrums(W: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    spectrum = measured(W, dtype)
    assert spectrum.values is not None
    right = published(spectrum.values.numpy(), spectrum.shape)
    assert CRITERIA["snr"].score(spectrum) == pytest.approx(right, rel=tolerance)


@pytest.mark.parametrize("W", WEIGHTS.values(), ids=WEIGHTS)
def test_snr_of_float32_values_is_the_scanners_to_the_last_bit(W: Tensor) -> None:
    """The same steps in the scanner's order, each rounded to float32: its numpy factor does not widen a tensor."""
    spectrum = measured(W, torch.float32)
    S = spectrum.values
    assert S is not None
    sigma = (S.quantile(0.75) - S.quantile(0.25)) / 1.349
    cut = sigma * np.sqrt((1 + np.sqrt(min(W.shape) / max(W.shape))) ** 2)
    loud, quiet = S[S.gt(cut)], S[S.le(cut)]
    ratio = loud.sum() / (quiet.sum() if len(quiet) else torch.tensor(1.0))
    assert CRITERIA["snr"].score(spectrum) == (ratio / S[0]).item()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.integers(0, 50))
def test_snr_is_spectrums_on_any_spectrum(values: list[float], longer: int) -> None:
    S = sorted(values, reverse=True)
    spectrum = of_values(*S, shape=(len(S) + longer, len(S)))
    assert CRITERIA["snr"].score(spectrum) == pytest.approx(published(np.array(S), spectrum.shape), rel=1e-9)


def test_snr_counts_the_threshold_itself_as_noise() -> None:
    """Quartiles 1.349 apart: the threshold of a square weight is 2 exactly, one of its values."""
    spectrum = of_values(3.0, 2.0, 1.349, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    assert CRITERIA["snr"].score(spectrum) == pytest.approx(3 / (2 + 1.349 + 3) / 3, rel=1e-12)


def test_snr_takes_no_noise_for_one_and_a_noise_of_zeros_for_nothing() -> None:
    assert CRITERIA["snr"].score(of_values(4.0, 4.0, 4.0)) == pytest.approx((4 + 4 + 4) / 1.0 / 4)
    assert CRITERIA["snr"].score(of_values(0.0, 0.0)) == math.inf


def test_snr_against_the_marchenko_pastur_edge_finds_no_signal_in_noise() -> None:
    score = CRITERIA["snr-mp"].score
    assert score(measured(gaussian(100, 300, seed=1))) == 0
    assert score(of_values(0.0, 0.0, 0.0)) == 0
    assert score(measured(with_spectrum(9, 9, torch.ones(9, dtype=torch.float64)))) == 0
    assert score(of_values(3.0, 0.0, 0.0)) == math.inf


def test_snr_against_the_marchenko_pastur_edge_is_the_spikes_over_the_rest() -> None:
    spikes = torch.cat([torch.tensor([90.0, 80, 70]), torch.zeros(97)]).to(torch.float64)
    spectrum = measured(gaussian(100, 300, seed=1) + with_spectrum(100, 300, spikes))
    assert spectrum.values is not None
    S = spectrum.values.numpy()
    assert CRITERIA["snr-mp"].score(spectrum) == pytest.approx(S[:3].sum() / S[3:].sum() / S[0], rel=1e-12)


def test_a_zero_weight_has_no_rank() -> None:
    for name in ("stable-rank", "effective-rank"):
        assert CRITERIA[name].score(of_values(0.0, 0.0)) == 0


def test_soft_ranks_prefer_the_flat_and_alpha_the_light_tail() -> None:
    flat, steep = measured(WEIGHTS["flat"]), measured(with_spectrum(24, 24, log(24, 1e4)))
    for name in ("kappa", "stable-rank", "effective-rank", "alpha"):
        criterion = CRITERIA[name]
        sign = 1 if criterion.prefer == "low" else -1
        assert sign * criterion.score(flat) < sign * criterion.score(steep)


def test_alpha_is_the_exponent_of_a_sampled_law_and_not_a_number_without_a_tail() -> None:
    eigenvalues = np.sort(np.random.default_rng(0).random(3000) ** (-1 / 1.5))[::-1]
    values = torch.from_numpy(np.sqrt(eigenvalues))
    assert CRITERIA["alpha"].score(of_values(*values.tolist())) == pytest.approx(2.5, rel=0.05)
    assert math.isnan(CRITERIA["alpha"].score(of_values(3.0, 2.0, 1.0)))


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_says_truly_whether_it_needs_the_spectrum(name: str) -> None:
    criterion, whole = CRITERIA[name], measured(WEIGHTS["spiked"])
    ends = Spectrum(whole.shape, whole.sigma_max, whole.sigma_min, whole.frobenius)
    assert criterion.prefer in ("low", "high")
    assert "\n" not in criterion.about
    if criterion.needs_values:
        with pytest.raises(NumericalError, match="needs all singular values"):
            criterion.score(ends)
    else:
        assert criterion.score(ends) == criterion.score(whole)


@pytest.mark.parametrize("name", CRITERIA)
def test_float32_values_do(name: str) -> None:
    W = WEIGHTS["spiked"]
    single, double = measured(W, torch.float32), measured(W)
    assert CRITERIA[name].score(single) == pytest.approx(CRITERIA[name].score(double), rel=2e-3)


@pytest.mark.parametrize(
    ("score", "tolerance"),
    [
        (RULES["strict"], 0.06),
        (RULES["peft"], 0.06),
        (CRITERIA["stable-rank"].score, 0.06),
        (CRITERIA["effective-rank"].score, 0.01),
        (CRITERIA["snr"].score, 0.06),
    ],
    ids=["strict", "peft", "stable-rank", "effective-rank", "snr"],
)
@pytest.mark.parametrize("shape", [(60, 240), (240, 60)], ids=str)
def test_a_random_matrix_scores_as_expected_of_its_shape(
    score: Score, tolerance: float, shape: tuple[int, int]
) -> None:
    sampled = [score(measured(gaussian(*shape, seed=seed))) for seed in range(31)]
    assert np.median(sampled) == pytest.approx(expected(score, shape), rel=tolerance)


def test_noise_is_expected_to_hold_no_signal() -> None:
    assert expected(CRITERIA["snr-mp"].score, (50, 80)) == 0
