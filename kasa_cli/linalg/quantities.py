"""Quantities of one spectrum: norms, soft ranks, the edge of its noise, the exponent of its tail.

Shapes: o = out_features, i = in_features, k = min(o, i), l = max(o, i). S holds all k singular values, descending.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.linalg.noise import quantiles

EPS = torch.finfo(torch.float64).eps
SAME = 1e-12
"""Eigenvalues this close, relatively, count as one multiple eigenvalue: their difference is roundoff."""
CHUNK = 64
"""Thresholds tried at once: each costs a row as long as the spectrum."""


@dataclass(frozen=True)
class Edge:
    """Noise in a spectrum: the std of its entries, the edges σ(√l ± √k) of its bulk, the values above the upper."""

    sigma: float
    lower: float
    upper: float
    above: int


@dataclass(frozen=True)
class PowerLaw:
    """The density λ^-alpha of the eigenvalues λ ≥ xmin: how many those are, and how far from them the fit is.

    `distance` is that of Kolmogorov and Smirnov: the largest difference of the two distribution functions.
    """

    alpha: float
    xmin: float
    tail: int
    distance: float


def frobenius(S: Float64[Tensor, " k"]) -> float:
    """‖W‖_F = √Σσ²."""
    return float(S[0]) * math.sqrt(stable_rank(S))


def nuclear(S: Float64[Tensor, " k"]) -> float:
    """‖W‖_* = Σσ."""
    return float(S.sum())


def stable_rank(S: Float64[Tensor, " k"]) -> float:
    """‖W‖_F² / ‖W‖₂² (Rudelson and Vershynin 2007); 0 for a zero weight.

    >>> stable_rank(torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    1.5
    """
    return float((S / S[0]).square().sum()) if S[0] > 0 else 0.0


def entropy(S: Float64[Tensor, " k"]) -> float:
    """Shannon's entropy -Σ p ln p of p = σ/Σσ, in nats, with 0 ln 0 = 0; 0 for a zero weight."""
    p = S / S.sum() if S[0] > 0 else S
    return abs(float(torch.special.entr(p).sum()))


def effective_rank(S: Float64[Tensor, " k"]) -> float:
    """exp of the entropy (Roy and Vetterli 2007): from 1 to k; 0 for a zero weight.

    >>> round(effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0], dtype=torch.float64)), 12)
    3.0
    """
    return math.exp(entropy(S)) if S[0] > 0 else 0.0


def energy(S: Float64[Tensor, " k"], rank: int) -> float:
    """The share of Σσ² in the `rank` largest; 1 for a zero weight, which loses nothing.

    >>> energy(torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64), 2)
    0.8333333333333334
    """
    squares = (S / S[0]).square() if S[0] > 0 else torch.ones_like(S[:rank])
    return float(squares[:rank].sum() / squares.sum())


def rank_of_energy(S: Float64[Tensor, " k"], share: float) -> int:
    """How many of the largest hold this share of Σσ²; none of a zero weight.

    >>> [rank_of_energy(torch.tensor([2.0, 1.0, 1.0]).double(), share) for share in (0.5, 0.8, 1.0)]
    [1, 2, 3]
    """
    if not S[0] > 0:
        return 0
    squares = (S / S[0]).square()
    return min(int((squares.cumsum(0) < share * squares.sum()).sum()) + 1, len(S))


def numerical_rank(S: Float64[Tensor, " k"], shape: tuple[int, int], eps: float = EPS) -> int:
    """How many values exceed σ_max · max(o, i) · eps: the convention of LAPACK's users, numpy's and MATLAB's.

    eps is the roundoff in the entries of the matrix. The default, float64's, takes the stored weight as exact,
    whatever its dtype, since its values are computed in float64. The eps of the stored dtype counts instead the
    values that rounding to that dtype cannot have caused.
    """
    return int((S[0] * max(shape) * eps < S).sum())


def marchenko_pastur(S: Float64[Tensor, " k"], shape: tuple[int, int]) -> Edge:
    """The Marchenko-Pastur law fitted to the bulk, by its median (Gavish and Donoho 2014), which spikes barely move.

    The fit has one parameter, the std of the entries of the noise. The r values above the upper edge count as signal,
    the rest as the spectrum of noise of shape (k - r) x (l - r) (Kritchman and Nadler 2008), and the median of the
    rest is fitted again, until no more values lie above the edge. Valid while less than half of the values are
    signal. The largest value of pure noise varies around the edge by a relative k^(-2/3) (Tracy and Widom), so one
    value just above it can be chance.
    """
    k, long = min(shape), max(shape)
    above, sigma = 0, _noise_std(S, k, long)
    while (risen := _above(S, _upper(sigma, k, long))) > above:
        above, sigma = risen, _noise_std(S[risen:], k - risen, long - risen)
    return Edge(sigma, sigma * (math.sqrt(long) - math.sqrt(k)), _upper(sigma, k, long), risen)


def power_law(S: Float64[Tensor, " k"]) -> PowerLaw | None:
    """Clauset, Shalizi and Newman 2009, continuous, on the eigenvalues λ = σ²: alpha = 1 + n / Σ ln(λ/xmin).

    xmin is the eigenvalue whose tail of n lies nearest to its fit by Kolmogorov and Smirnov's distance, the
    smallest of equals. None when fewer than four differ.

    The conventions are those of WeightWatcher and of the package `powerlaw` (Alstott 2014): the empirical
    distribution is the share strictly below a value, and the two largest are no candidates for xmin. Unlike
    `powerlaw` 2, which by default drops every fit above 3, alpha is not bounded: trained weights lie between 2 and 6.
    Values that roundoff explains are left out, and those it alone tells apart count as equal.
    """
    S = S[S[0] * len(S) * EPS < S]
    logs = SAME * (2 * (S / S[:1]).log() / SAME).round().flip(0)
    values, counts = torch.unique_consecutive(logs, return_counts=True)
    if len(values) < 4:
        return None
    sizes = _suffix_sums(counts.to(torch.float64))
    excess = _suffix_sums(values * counts) / sizes - values
    distances = _distances(values, sizes, 1 / excess[:-2])
    best = int(distances.numpy().argmin())
    tail = int(sizes[best])
    return PowerLaw(1 + 1 / float(excess[best]), float(S[tail - 1].square()), tail, float(distances[best]))


def _suffix_sums(x: Tensor) -> Tensor:
    return x.flip(0).cumsum(0).flip(0)


def _distances(values: Tensor, sizes: Tensor, slopes: Tensor) -> Tensor:
    """Kolmogorov and Smirnov's distance of each candidate's tail to its power law; slopes are alpha - 1.

    values are logarithms, ascending; sizes how many are as large or larger. Tails nest, so that the share of a
    tail below a value is one less the ratio of two sizes.
    """
    chunks = [
        _chunk_distances(values[start:], sizes[start:], slopes[start : start + CHUNK])
        for start in range(0, len(slopes), CHUNK)
    ]
    return torch.cat(chunks)


def _chunk_distances(values: Tensor, sizes: Tensor, slopes: Tensor) -> Tensor:
    """The distances of the first candidates, one a row against all values from the first of them on."""
    n = len(slopes)
    excess = (values - values[:n, None]).clamp_min(0)
    difference = sizes / sizes[:n, None] - torch.exp(-slopes[:, None] * excess)
    return difference.abs().triu().amax(dim=1)


def _noise_std(S: Tensor, k: int, long: int) -> float:
    """The std of entries whose singular values have this median."""
    half = torch.tensor([0.5], dtype=torch.float64)
    return float(S.quantile(0.5) / quantiles((k, long), half))


def _upper(sigma: float, k: int, long: int) -> float:
    return sigma * (math.sqrt(long) + math.sqrt(k))


def _above(S: Tensor, edge: float) -> int:
    return int((edge < S).sum())
