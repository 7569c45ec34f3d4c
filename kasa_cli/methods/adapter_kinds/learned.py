"""The learned parts of an adapter for one weight: scaling, two factors, the diagonal between them, the update.

Shapes: o = out_features, i = in_features, r = adapter rank, p = min(r, o, i), e = number of experts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kasa_cli.linalg import svd_of_product
from kasa_cli.methods.adapter_kinds.change import Change, factors, row_blocks, rows
from kasa_cli.methods.adapter_kinds.kind import Kind

NEAR_ZERO = 0.01
"""An entry of a diagonal below this share of the largest counts as near zero."""
DENSE = "not a sum of low-rank terms: only its norm is known"

Tensors = Mapping[str, Tensor]
Factors = tuple[Float64[Tensor, "r i"], Float64[Tensor, "o r"]]
Svd = tuple[Float64[Tensor, "o p"], Float64[Tensor, " p"], Float64[Tensor, "i p"]]


@dataclass(frozen=True)
class Update:
    """W' - W: its norm and, for a sum of low-rank terms, its SVD; `why` is the reason if there is none."""

    norm: float
    svd: Svd | None = None
    why: str | None = None


def update(change: Change, W: Float[Tensor, "o i"] | None, shape: tuple[int, int]) -> Update:
    """The update of a weight by a change. The weight is needed if the change is a map of it.

    Terms are decomposed from their factors; other changes are measured some rows at a time.
    """
    if change.of_weight is not None and W is not None:
        change = Change(terms=(change.of_weight(W),))
    term = factors([change])
    if term is not None:
        U, S, V = svd_of_product(term.L, term.R)
        return Update(float(torch.linalg.vector_norm(S)), (U, S, V))
    W = torch.zeros(1).expand(shape) if W is None else W
    squares = 0.0
    for start, stop in row_blocks(shape, [change]):
        moved = rows(W, [change], start, stop) - W[start:stop].to(torch.float64)
        squares += float(moved.square().sum())
    return Update(math.sqrt(squares), why=DENSE)


def scaling(kind: Kind, tensors: Tensors, settings: Mapping[str, Any]) -> float | None:
    """The factor before the product as it is applied, or as learned. None if the kind has none."""
    length = kind.tensor(kind.learned_scaling, tensors)
    if length is not None:
        return float(length.reshape(())) / int(settings["r"])
    value = settings.get("scaling")
    return None if value is None else float(value)


def pair(kind: Kind, tensors: Tensors, shape: tuple[int, int] | None) -> Factors | None:
    """The two factors of a kind that has two; of shared ones the part that a weight of this shape uses."""
    if kind.factors is None:
        return None
    A, B = (kind.tensor(letter, tensors) for letter in kind.factors)
    if A is None or B is None or A.ndim != 2 or B.ndim != 2:
        return None
    if kind.shared and shape is None:
        return None
    if kind.shared and shape is not None:
        A, B = A[:, : shape[1]], B[: shape[0]]
    return A.to(torch.float64), B.to(torch.float64)


def expert_pairs(A: Float[Tensor, "n i"], B: Float[Tensor, "o n"], num_experts: int) -> Iterator[Factors]:
    """The factors of each expert in turn: A holds one expert after another, B one rank after another."""
    rank = len(A) // num_experts
    left, right = A.reshape(num_experts, rank, -1), B.reshape(len(B), rank, num_experts)
    for k in range(num_experts):
        yield left[k].to(torch.float64), right[:, :, k].to(torch.float64)


def diagonal(kind: Kind, tensors: Tensors) -> Tensor | None:
    """The diagonal that a kind learns, as a vector; the dense r x r core of the first KaSA files as it is."""
    d = kind.tensor(kind.diagonal, tensors)
    if d is None:
        return None
    is_column = kind.tensors[kind.diagonal].shape == "n 1"
    return d.to(torch.float64)[:, 0] if is_column else d.to(torch.float64)


def signs(d: Sequence[float]) -> dict[str, int]:
    """How many entries are positive, negative, or near zero beside the largest.

    >>> signs([2.0, -1.0, 0.001]), signs([0.0])
    ({'positive': 1, 'negative': 1, 'near_zero': 1}, {'positive': 0, 'negative': 0, 'near_zero': 1})
    """
    least = NEAR_ZERO * max(map(abs, d), default=0.0)
    positive, negative = (sum(sign * x > least for x in d) for sign in (1, -1))
    return {"positive": positive, "negative": negative, "near_zero": len(d) - positive - negative}
