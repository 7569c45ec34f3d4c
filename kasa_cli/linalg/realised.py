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


def outcome(
    stored: StoredRows, target: ExactSum, V: Float64[Tensor, "i t"], S: Float64[Tensor, " t"]
) -> Outcome:
    """Measure the stored tensor in float64, a block of rows at a time."""
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
    norm = math.sqrt(whole) or 1.0
    return Outcome(
        realised=1 - math.sqrt(left) / dropped if dropped else 1.0,
        changed_fraction=changed / max(target.W.numel(), 1),
        relative_error=math.sqrt(moved) / norm,
        rounding_error=math.sqrt(off) / norm,
    )


def _squares(A: Float64[Tensor, "a b"]) -> Tensor:
    flat = A.reshape(-1)
    return torch.dot(flat, flat)
