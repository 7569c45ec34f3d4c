"""Singular values that random-matrix theory expects of a matrix of independent entries of variance 1.

The law of Marchenko and Pastur (1967), in closed form. With q = √(k/l) and an angle θ from 0 to π, a singular
value is √l s(θ),  s² = 1 + q² - 2 q cos θ, and its share of smaller ones is

    F(θ) = (θ + q sin θ - (1 - q²)(φ - q sin θ)/q²) / π,    tan φ = q sin θ / (1 - q cos θ)

(the integral of the density (2/π) sin²θ / s², term by term of its Fourier series). At q = 1 it is the
quarter-circle law, which has no gap at zero: F = (θ + sin θ)/π, s = 2 sin(θ/2).

Shapes: o = out_features, i = in_features, k = min(o, i), l = max(o, i), p = shares asked for.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float64
from torch import Tensor

BISECTIONS = 60
"""From π down to the spacing of float64 at the smallest angle asked for."""


def quantiles(shape: tuple[int, int], shares: Float64[Tensor, " p"]) -> Float64[Tensor, " p"]:
    """The singular values below which these shares of all lie: √l s(θ) with F(θ) = share."""
    q = math.sqrt(min(shape) / max(shape))
    theta = _angles(shares, q)
    return math.sqrt(max(shape)) * ((1 - q) ** 2 + 4 * q * (theta / 2).sin().square()).sqrt()


@lru_cache(maxsize=64)
def expected_spectrum(shape: tuple[int, int]) -> Float64[Tensor, " k"]:
    """The k quantiles of the law at (j - ½)/k, descending: a random matrix of this shape without its randomness.

    Within a few percent of the values of any one Gaussian matrix, but for the last few of a square one. Its very
    smallest fluctuates by its own size (Edelman 1988: the median is 0.545/√k); the quantile is π/(4√k), 1.44 times
    that, so that the median condition number of a square Gaussian matrix is 1.44 times the expected one. The answer
    is shared between calls.

    >>> [round(float(s), 3) for s in expected_spectrum((3, 12))]
    [4.329, 3.315, 2.392]
    """
    k = min(shape)
    return quantiles(shape, (torch.arange(k, 0, -1, dtype=torch.float64) - 0.5) / k)


def _angles(shares: Tensor, q: float) -> Tensor:
    """F inverted, by bisection: it is increasing, and flat at the ends where Newton's steps would not be safe."""
    low, high = torch.zeros_like(shares), torch.full_like(shares, math.pi)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_below = _share(middle, q) < shares
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


def _share(theta: Tensor, q: float) -> Tensor:
    """F(θ) of the module's heading."""
    sine = q * theta.sin()
    phi = torch.atan2(sine, 1 - q * theta.cos())
    return (theta + sine - (1 - q * q) / (q * q) * (phi - sine)) / math.pi
