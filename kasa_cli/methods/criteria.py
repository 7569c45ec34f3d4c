"""Criteria for selecting modules to train; each is one row of `CRITERIA`.

A score is a number computed from one spectrum. NaN means that the criterion does not apply; infinity is a score.

Shapes: o = out_features, i = in_features, k = min(o, i).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kasa_cli.errors import NumericalError
from kasa_cli.linalg import expected_spectrum, quantities

PEFT_EPSILON = 1e-8
IQR_OF_NORMAL = 1.349
"""The interquartile range of a normal distribution of variance 1, in Spectrum's rounding."""


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a weight: its extremes, the norm and, for criteria that need them, all values, descending."""

    shape: tuple[int, int]
    sigma_max: float
    sigma_min: float
    frobenius: float
    values: Float[Tensor, " k"] | None = None


Score = Callable[[Spectrum], float]


@dataclass(frozen=True)
class Criterion:
    """A score, its end that is worth training, and whether it needs the whole spectrum."""

    score: Score
    prefer: str
    needs_values: bool
    about: str


def kappa_peft(spectrum: Spectrum) -> float:
    """σ_1 / (σ_k + 1e-8): the 1e-8 is absolute, so that a zero weight scores 0 and a singular one 1e8 σ_1.

    >>> kappa_peft(Spectrum((2, 2), 2e-6, 1e-6, 0.0))
    1.9801980198019804
    """
    return spectrum.sigma_max / (spectrum.sigma_min + PEFT_EPSILON)


def kappa_strict(spectrum: Spectrum) -> float:
    """σ_1 / σ_k, infinite for a singular weight and for a zero one."""
    return spectrum.sigma_max / spectrum.sigma_min if spectrum.sigma_min > 0 else math.inf


RULES: dict[str, Score] = {"peft": kappa_peft, "strict": kappa_strict}
"""Rules of kappa: PEFT's `find_kappa_target_modules`, and the condition number itself."""


def snr(spectrum: Spectrum) -> float:
    """Spectrum (Hartford et al. 2024, arXiv 2406.06623) as its scanner computes it: Σ{σ > ε} / Σ{σ ≤ ε} / σ_1.

    ε = s (1 + √β) with s the interquartile range of the values over 1.349 and β = min(o, i) / max(o, i). Not the
    Marchenko-Pastur edge that it is named after: s is the spread of the singular values, not of the entries, and
    √max(o, i) is missing. Where nothing lies under ε the noise counts as 1; where only zeros do, the score is
    infinite, that of a zero weight too. In the dtype of the values: the scanner's is that of the checkpoint's load.
    """
    S = _values(spectrum)
    spread = (torch.quantile(S, 0.75) - torch.quantile(S, 0.25)) / IQR_OF_NORMAL
    beta = min(spectrum.shape) / max(spectrum.shape)
    is_signal = spread * math.sqrt((1 + math.sqrt(beta)) ** 2) < S
    noise = S[~is_signal].sum() if not is_signal.all() else torch.ones_like(S[0])
    return float(S[is_signal].sum() / noise / S[0]) if noise != 0 else math.inf


def snr_mp(spectrum: Spectrum) -> float:
    """Σ{σ > ε} / Σ{σ ≤ ε} / σ_1 with ε the upper edge of the Marchenko-Pastur law fitted to the bulk.

    0 for pure noise and for a zero weight; infinite for a weight of low rank and no noise.
    """
    S = _values(spectrum).to(torch.float64)
    above = quantities.marchenko_pastur(S, spectrum.shape).above
    signal, noise = float(S[:above].sum()), float(S[above:].sum())
    if signal == 0:
        return 0.0
    return signal / noise / spectrum.sigma_max if noise > 0 else math.inf


def stable_rank(spectrum: Spectrum) -> float:
    """‖W‖_F² / σ_1²; 0 for a zero weight."""
    return (spectrum.frobenius / spectrum.sigma_max) ** 2 if spectrum.sigma_max > 0 else 0.0


def effective_rank(spectrum: Spectrum) -> float:
    """exp of the entropy of the values, `quantities.effective_rank`."""
    return quantities.effective_rank(_values(spectrum).to(torch.float64))


def alpha(spectrum: Spectrum) -> float:
    """The exponent of the tail, `quantities.power_law`; NaN where too few values differ for one."""
    fit = quantities.power_law(_values(spectrum).to(torch.float64))
    return fit.alpha if fit else math.nan


CRITERIA: dict[str, Criterion] = {
    "kappa": Criterion(
        kappa_strict,
        "low",
        False,
        "condition number; low: every direction in use, little to forget (KappaTune)",
    ),
    "snr": Criterion(
        snr, "high", True, "signal over noise exactly as Spectrum computes it; high: more to build on"
    ),
    "snr-mp": Criterion(
        snr_mp,
        "high",
        True,
        "the same ratio against the fitted Marchenko-Pastur edge; high: more to build on",
    ),
    "stable-rank": Criterion(
        stable_rank,
        "high",
        False,
        "squared Frobenius over squared spectral norm; high: flat, as low kappa is",
    ),
    "effective-rank": Criterion(
        effective_rank, "high", True, "exp of the entropy of the singular values; high: flat, as low kappa is"
    ),
    # WeightWatcher reads a small alpha (2 to 4) as a heavy tail, well trained; what is left to train is where it is
    # large, and AlphaLoRA (Qing et al. 2024, arXiv 2410.10054) spends its adapters there.
    "alpha": Criterion(
        alpha,
        "high",
        True,
        "power-law exponent of the eigenvalues' tail (WeightWatcher); high: trained the least",
    ),
}


def expected(score: Score, shape: tuple[int, int], frobenius: float = 0.0) -> float:
    """The score of the expected spectrum of a random matrix of this shape.

    Its norm is `frobenius`, since some scores depend on the scale; without it its entries have variance 1.
    """
    S = expected_spectrum(shape)
    norm = quantities.frobenius(S)
    if frobenius > 0:
        S, norm = S * (frobenius / norm), frobenius
    return score(Spectrum(shape, float(S[0]), float(S[-1]), norm, S))


def _values(spectrum: Spectrum) -> Tensor:
    if spectrum.values is None:
        raise NumericalError("this criterion needs all singular values, and only some were measured")
    return spectrum.values
