"""Matrices of known spectra, and reference results by an independent method (numpy, float64)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"tall": (97, 40), "wide": (40, 97), "square": (64, 64)}


def gaussian(o: int, i: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(n, k, seed=seed))[0]


def with_spectrum(o: int, i: int, S: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A matrix with exactly these singular values, up to the rounding to `dtype`."""
    k = min(o, i)
    assert len(S) == k
    return ((orthonormal(o, k, seed) * S) @ orthonormal(i, k, seed + 1).T).to(dtype)


def log(k: int, kappa: float) -> Tensor:
    """From 1 down to 1/kappa, each the same fraction of the one before."""
    return torch.logspace(0, -math.log10(kappa), k, dtype=torch.float64)


def linear(k: int, kappa: float) -> Tensor:
    return torch.linspace(1, 1 / kappa, k, dtype=torch.float64)


def clustered(k: int, kappa: float) -> Tensor:
    """Three values, each many times over: ties everywhere but at the two steps."""
    return torch.tensor([1.0, kappa**-0.5, 1 / kappa], dtype=torch.float64).repeat_interleave(k // 3 + 1)[:k]


def deficient(k: int, num_zeros: int, kappa: float = 1e3) -> Tensor:
    """A full spectrum that ends in exact zeros."""
    return torch.cat([log(k - num_zeros, kappa), torch.zeros(num_zeros, dtype=torch.float64)])


def cliff(k: int, num_small: int, kappa: float) -> Tensor:
    """All near 1 but for a few, spread out from 1e4/kappa down to 1/kappa."""
    small = torch.logspace(-math.log10(kappa) + min(4, math.log10(kappa) / 2), -math.log10(kappa), num_small)
    return torch.cat([linear(k - num_small, 2), small.to(torch.float64)])


SPECTRA = {"log": log, "linear": linear, "clustered": clustered}


@dataclass(frozen=True)
class Truth:
    """The full decomposition by numpy; tolerances are relative to σ_max."""

    U: np.ndarray
    S: np.ndarray
    V: np.ndarray

    def sigma(self) -> float:
        return float(self.S[0]) or 1.0


def truth(W: Tensor) -> Truth:
    """Scaled before, scaled back after: entries near 1e38 and denormals keep their digits."""
    A = W.to(torch.float64).numpy()
    scale = 2.0 ** np.floor(np.log2(np.abs(A).max() or 1.0))
    U, S, Vh = np.linalg.svd(A / scale, full_matrices=False)
    return Truth(U, S * scale, Vh.T)


def distance(X: Tensor | np.ndarray, Y: Tensor | np.ndarray) -> float:
    """The sine of the largest angle between two spaces, given by orthonormal columns."""
    X, Y = np.asarray(X), np.asarray(Y)
    return float(np.linalg.norm(Y - X @ (X.T @ Y), 2)) if X.size else 0.0


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def kept(W: torch.Tensor, components: int) -> np.ndarray:
    """The sum of the largest components, by numpy's SVD in float64."""
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return (U[:, :components] * S[:components]) @ Vh[:components]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    """Compare with a tolerance relative to the largest entry."""
    assert float((ours.to(theirs.dtype) - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def positive(k: int) -> Tensor:
    """A positive definite matrix."""
    A = gaussian(k, k)
    return A @ A.T + torch.eye(k, dtype=torch.float64)
