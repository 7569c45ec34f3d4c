"""Figures of a truncation, measured on the tensor as stored.

Shapes: o = out_features, i = in_features, t = components dropped, j = rows of a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.linalg.rounding import ExactSum, blocks

StoredRows = Callable[[int, int], Float[Tensor, "j i"]]
"""Rows [start, stop) of the stored tensor."""


@dataclass(frozen=True)
class Outcome:
    """Figures of one stored tensor Q against the original W and the exact sum T.

    `realised` is 1 - ‖Q V_d‖_F / ‖S_d‖₂ over the non-zero dropped components: 1 for a complete truncation, 0 for
    none; 1 when there is nothing to drop. `changed_fraction` counts the entries whose value differs from W's.
    `relative_error` is ‖Q - W‖_F / ‖W‖_F, `rounding_error` ‖Q - T‖_F / ‖W‖_F, both 0 for a zero weight.
    """

    realised: float
    changed_fraction: float
    relative_error: float
    rounding_error: float


@dataclass(frozen=True)
class Sums:
    """Sums over some rows of a stored tensor, from which `Outcome` follows; those of parts add up.

    Squares of what is left in the dropped directions, of the change, of the rounding error and of the original, the
    entries that changed and all of them; `dropped` is ‖S_d‖₂ of the whole.
    """

    left: float
    moved: float
    off: float
    whole: float
    changed: float
    num_entries: int
    dropped: float

    def __add__(self, other: "Sums") -> "Sums":
        """The sums over the rows of both."""
        return Sums(
            self.left + other.left,
            self.moved + other.moved,
            self.off + other.off,
            self.whole + other.whole,
            self.changed + other.changed,
            self.num_entries + other.num_entries,
            self.dropped,
        )

    @property
    def outcome(self) -> Outcome:
        """The figures."""
        norm = math.sqrt(self.whole) or 1.0
        return Outcome(
            realised=1 - math.sqrt(self.left) / self.dropped if self.dropped else 1.0,
            changed_fraction=self.changed / max(self.num_entries, 1),
            relative_error=math.sqrt(self.moved) / norm,
            rounding_error=math.sqrt(self.off) / norm,
        )


def outcome(
    stored: StoredRows, target: ExactSum, V: Float64[Tensor, "i t"], S: Float64[Tensor, " t"]
) -> Outcome:
    """Measure the stored tensor."""
    return measured_sums(stored, target, V, S).outcome


def measured_sums(
    stored: StoredRows, target: ExactSum, V: Float64[Tensor, "i t"], S: Float64[Tensor, " t"]
) -> Sums:
    """Measure stored rows in float64, a block at a time. `target` holds the same rows."""
    live = V[:, S > 0]
    sums = V.new_zeros(5)
    for start, stop in blocks(*target.W.shape):
        Q, W = stored(start, stop), target.W[start:stop]
        sums[4] += torch.count_nonzero(Q != W)
        Q, W = Q.to(torch.float64), W.to(torch.float64)
        sums[0] += _squares(Q @ live)
        sums[3] += _squares(W)
        difference = Q - W
        sums[1] += _squares(difference)
        sums[2] += _squares(difference.addmm_(target.L[start:stop], target.R, alpha=-1))
    left, moved, off, whole, changed = (float(value) for value in sums)
    dropped = float(torch.linalg.vector_norm(S))
    return Sums(left, moved, off, whole, changed, target.W.numel(), dropped)


def _squares(A: Float64[Tensor, "a b"]) -> Tensor:
    flat = A.reshape(-1)
    return torch.dot(flat, flat)
