"""Both ends of the spectrum of a weight: its smallest singular triplets and its largest singular value.

No full decomposition: a solver of `solvers` finds the subspace of the vectors, one Rayleigh-Ritz step on the weight
itself gives the values to the unit roundoff of float64, and the residual on the weight decides whether the next
solver of the ladder is used.

Shapes: o = out_features, i = in_features, k = min(o, i), l = max(o, i), t = components dropped, p ≥ t.
"""

import math
from dataclasses import dataclass, replace

import scipy.linalg
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.errors import NumericalError
from kasa_cli.linalg.frame import Frame, StreamedWeight, frame_of
from kasa_cli.linalg.gram import Gram
from kasa_cli.linalg.solvers import SOLVERS, Directions, ladder

EPS = torch.finfo(torch.float64).eps
ANGLE_TOLERANCE = 1e-7
RESIDUAL_LIMIT = 1e-12
"""Residual that a solver which does not square must reach: some thousand times float64 roundoff."""
NEXT_LIMIT = 1e-4
"""Relative residual of the first pair kept: its value is in error by the square of it."""
LEVEL = 16
TIE = 1e-6
"""Below this relative gap the truncation is not unique: the product is still optimal, the factors are arbitrary."""


@dataclass(frozen=True)
class Ends:
    """The t smallest singular triplets, largest of them first, and the values around them.

    `residuals` are the norms of the columns of M Mᵀ Z - Z S², over σ_max², measured on the weight in float64 (M: the
    weight or its transpose, whichever is wide; Z: the vectors of its short side); at least one, also for t = 0.
    `is_squared`: the solver saw squared singular values.
    """

    U: Float64[Tensor, "o t"]
    S: Float64[Tensor, " t"]
    V: Float64[Tensor, "i t"]
    sigma_max: float
    sigma_min: float
    sigma_next: float
    frobenius: float
    solver: str
    residuals: Float64[Tensor, " n"]
    is_squared: bool

    def cut(self, t: int) -> "Ends":
        """The t smallest of these triplets."""
        num_left_out = len(self.S) - t
        if not num_left_out:
            return self
        U, S, V = (
            self.U[:, num_left_out:].contiguous(),
            self.S[num_left_out:].clone(),
            self.V[:, num_left_out:].contiguous(),
        )
        sigma_next = float(self.S[max(num_left_out - 1, 0) if t else -1])
        return replace(
            self, U=U, S=S, V=V, sigma_next=sigma_next, residuals=self.residuals[-max(t, 1) :].clone()
        )

    @property
    def residual(self) -> float:
        """‖M Mᵀ Z - Z S²‖_F / σ_max²."""
        return float(torch.linalg.vector_norm(self.residuals))

    @property
    def angle(self) -> float:
        """Estimated sine of the angle between the computed subspace and the true one.

        The residual over the gap of squares (Davis and Kahan) for a solver that squares, float64 roundoff over the
        gap for one that does not. At a tie the gap counts as TIE; where nothing is dropped, as 1.
        """
        sines = self.residual if self.is_squared else 4 * EPS
        if self.sigma_cut is None:
            return sines
        return sines / _relative_gap(self.sigma_next, self.sigma_cut, self.sigma_max, 1 + self.is_squared)

    @property
    def sigma_cut(self) -> float | None:
        """The largest component dropped; None when nothing is."""
        return float(self.S[0]) if len(self.S) else None

    @property
    def kappa(self) -> float:
        """σ_max over σ_min, infinite for a singular weight."""
        return self.sigma_max / self.sigma_min if self.sigma_min > 0 else math.inf

    @property
    def is_tied(self) -> bool:
        """Whether the last component dropped and the first component kept agree to six digits."""
        cut = self.sigma_cut
        return cut is not None and self.sigma_next - cut <= TIE * self.sigma_next and cut > 0

    @property
    def dropped_energy(self) -> float:
        """Sum of the squared dropped values over the sum of all; 0 for a zero weight."""
        return float((self.S / self.frobenius).square().sum()) if self.frobenius else 0.0


def ends(W: Float[Tensor, "o i"] | StreamedWeight, t: int) -> Ends:
    """The t smallest singular triplets of W, and the extremes of its spectrum; see `ends_of`."""
    return ends_of(Gram(frame_of(W)), t)


def level(k: int, t: int) -> int:
    """Number of components to compute when t of k are needed: 16, 64, 256 and so on, below k.

    One decomposition then serves every smaller t, and the result for a t does not depend on earlier ones.

    >>> [level(4096, t) for t in (0, 8, 16, 17, 100)], level(10, 4)
    ([16, 16, 16, 64, 256], 9)
    """
    num_computed = LEVEL
    while num_computed < t:
        num_computed *= 4
    return min(num_computed, k - 1)


def ends_of(gram: Gram, t: int) -> Ends:
    """The t smallest singular triplets of a weight, and the extremes of its spectrum.

    Values are within float64 roundoff of σ_max, and σ_max is to ten digits. Singular values that roundoff alone
    explains are set to zero; their vectors on the long side are then arbitrary orthonormal ones. Signs:
    the largest entry of each left vector is positive.

    Raises:
        NumericalError: W is not finite, t is not below min(o, i), or no solver of the ladder converges.
    """
    M = gram.frame
    if not 0 <= t < M.num_short:
        raise NumericalError(f"cannot drop {t} of {M.num_short} components")
    bottom = None
    for name in ladder(M.num_short, max(t, 1)):
        directions = _attempt(name, gram, max(t, 1))
        if directions is None:
            continue
        bottom, next_residual = _read_off(M, directions, t)
        is_sharp = bottom.angle <= ANGLE_TOLERANCE and next_residual <= NEXT_LIMIT
        if is_sharp if directions.is_squared else bottom.residual <= RESIDUAL_LIMIT:
            return bottom
    raise NumericalError(
        f"no solver reached a residual of {RESIDUAL_LIMIT}; the last: {bottom and bottom.residual}"
    )


def _attempt(name: str, gram: Gram, t: int) -> Directions | None:
    """Directions by one solver; None when it cannot handle the matrix, or LAPACK does not converge."""
    try:
        return SOLVERS[name](gram, t)
    except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError):
        return None


def _read_off(M: Frame, directions: Directions, t: int) -> tuple[Ends, float]:
    """One Rayleigh-Ritz step on the weight itself, within the directions; and the residual of the next pair."""
    p = directions.bottom.shape[1]
    Y = M.transposed_product(torch.cat([directions.bottom, directions.top], dim=1))
    sigma_max = float(torch.linalg.svdvals(Y[:, p:])[0])
    X, S, Rh = torch.linalg.svd(Y[:, :p], full_matrices=False)
    sigma_max = max(sigma_max, float(S[0]))
    Z = directions.bottom @ Rh.T
    residuals = _residuals(M, Z, S, X) / (sigma_max**2 or 1.0)
    noise = _noise(S / (sigma_max or 1.0), residuals, M.num_long, directions.is_squared)
    S = S.where(sigma_max * noise < S, 0.0)
    cut, following = max(p - max(t, 1), 0), max(p - t - 1, 0)
    U, V = oriented(M, Z[:, p - t :], X[:, p - t :])
    bottom = Ends(
        U=U,
        S=S[p - t :] * M.scale,
        V=V,
        sigma_max=sigma_max * M.scale,
        sigma_min=float(S[-1]) * M.scale,
        sigma_next=float(S[following]) * M.scale,
        frobenius=directions.frobenius * M.scale,
        solver=directions.solver,
        residuals=residuals[cut:],
        is_squared=directions.is_squared,
    )
    share = float(S[following] / sigma_max) ** 2 if sigma_max else 0.0
    return bottom, float(residuals[following]) / share if share else 0.0


def _residuals(M: Frame, Z: Tensor, S: Tensor, X: Tensor) -> Tensor:
    """Column norms of M Mᵀ Z - Z S², with Mᵀ Z = X S."""
    norms: Tensor = torch.linalg.vector_norm(M.product(X * S) - Z * S.square(), dim=0)
    return norms


def _noise(S: Tensor, residuals: Tensor, num_long: int, is_squared: bool) -> Tensor:
    """Largest value that roundoff can give each singular value whose true value is zero, in units of σ_max.

    A null vector taken from a Gram matrix is off by the residual over the square of the nearest other value,
    S[0] or above, and that is the value which the weight then gives. Not applied where the two are indistinguishable.
    """
    noise = torch.full_like(S, EPS * num_long)
    if not is_squared:
        return noise
    apparent = 10 * residuals / S[0].clamp_min(torch.finfo(S.dtype).tiny)  # the residual itself is rounded
    return torch.where(residuals <= ANGLE_TOLERANCE * S[0] ** 2, noise.maximum(apparent), noise)


def _relative_gap(sigma_next: float, sigma_cut: float, sigma_max: float, power: int) -> float:
    """Gap at the truncation, of values or of squares, relative to σ_max; TIE at a tie, 1 between zeros."""
    if sigma_next == 0:
        return 1.0
    high, low = (sigma_next / sigma_max) ** power, (sigma_cut / sigma_max) ** power
    return max(high - low, TIE * high)


def oriented(M: Frame, Z: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Short- and long-side vectors as (left, right) of the weight, with canonical signs."""
    U, V = (X, Z) if M.is_transposed else (Z, X)
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U)
    return (U * sign).contiguous(), (V * sign).contiguous()
