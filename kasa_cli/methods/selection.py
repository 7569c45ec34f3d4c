"""Selects among scored modules: the order, the amount, and the comparison of two orders."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kasa_cli.errors import NumericalError

SIGNS = {"low": 1.0, "high": -1.0}


@dataclass(frozen=True)
class Amount:
    """The amount to select; exactly one of the fields is given."""

    top_p: float | None = None
    num_modules: int | None = None
    threshold: float | None = None


def order(scores: Sequence[float], prefer: str) -> list[int]:
    """Indices, best score first; equal ones stay in the order given, whichever end is preferred.

    >>> order([2.0, 1.0, 2.0], "low"), order([2.0, 1.0, 2.0], "high")
    ([1, 0, 2], [0, 2, 1])

    Raises:
        NumericalError: a score is not a number.
    """
    _refuse_nan(scores)
    return sorted(range(len(scores)), key=lambda index: SIGNS[prefer] * scores[index])


def choose(
    scores: Sequence[float], prefer: str, amount: Amount, groups: Sequence[str] | None = None
) -> list[int]:
    """Indices of the selection, best first.

    With groups the amount applies to each group, and the groups follow each other in the order of first appearance.

    Raises:
        NumericalError: a score is not a number.
    """
    ranked = order(scores, prefer)
    labels = groups if groups is not None else [""] * len(scores)
    members = {
        label: [index for index in ranked if labels[index] == label] for label in dict.fromkeys(labels)
    }
    return [index for indices in members.values() for index in _best(indices, scores, prefer, amount)]


def overlap(a: Collection[str], b: Collection[str]) -> float:
    """Jaccard's index |a ∩ b| / |a ∪ b|; 1 for two empty selections.

    >>> overlap(["q", "k"], ["k", "v"])
    0.3333333333333333
    """
    union = {*a, *b}
    return len({*a} & {*b}) / len(union) if union else 1.0


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's: the linear correlation of the ranks, ties at their mean; infinities rank as the largest.

    None where it is undefined: fewer than two scores, or a constant list.

    Raises:
        NumericalError: a score is not a number.
    """
    from scipy.stats import pearsonr, rankdata

    _refuse_nan([*x, *y])
    if len({*x}) < 2 or len({*y}) < 2:
        return None
    return float(pearsonr(rankdata(x), rankdata(y)).statistic)


def matched_rank(
    rank: int, all_shapes: Sequence[tuple[int, int, int]], chosen: Sequence[tuple[int, int, int]]
) -> int:
    """The rank at which the selection trains no more than rank R on all: ⌊R Σ_all n(o+i) / Σ_chosen n(o+i)⌋.

    A shape is (n, o, i), n the number of matrices (the experts of a fused parameter). At least 1.

    >>> matched_rank(8, [(1, 64, 64), (1, 256, 64)], [(1, 64, 64)])
    28

    Raises:
        NumericalError: none is chosen.
    """
    if not chosen:
        raise NumericalError("no rank matches the budget of an empty choice")
    return max(1, rank * _budget(all_shapes) // _budget(chosen))


def _budget(shapes: Sequence[tuple[int, int, int]]) -> int:
    """Number of parameters for each unit of rank."""
    return sum(n * (o + i) for n, o, i in shapes)


def _best(indices: list[int], scores: Sequence[float], prefer: str, amount: Amount) -> list[int]:
    """The head of a ranking; the fraction is rounded down, but to 1 at least, as in PEFT's selector."""
    if amount.threshold is not None:
        sign = SIGNS[prefer]
        return [index for index in indices if sign * scores[index] <= sign * amount.threshold]
    if amount.num_modules is not None:
        return indices[: amount.num_modules]
    return indices[: max(1, int(len(indices) * (amount.top_p or 0.0)))]


def _refuse_nan(scores: Sequence[float]) -> None:
    if any(math.isnan(score) for score in scores):
        raise NumericalError("a score is not a number")
