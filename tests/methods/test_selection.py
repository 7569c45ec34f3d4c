"""Rankings, selections from them and comparisons, against Python's sort, PEFT's rule and scipy."""

import math
import warnings

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_cli.errors import NumericalError
from kasa_cli.methods.selection import Amount, choose, matched_rank, order, overlap, rank_correlation

SCORES = st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0, 1e300, math.inf]), max_size=25)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SCORES)
def test_orders_are_pythons_and_ties_stay_as_given(scores: list[float]) -> None:
    low = [index for index, _ in sorted(enumerate(scores), key=lambda pair: pair[1])]
    high = [index for index, _ in sorted(enumerate(scores), key=lambda pair: pair[1], reverse=True)]
    assert order(scores, "low") == low
    assert order(scores, "high") == high


def test_a_score_that_is_not_a_number_is_refused() -> None:
    for refused in (
        lambda: order([1.0, math.nan], "low"),
        lambda: choose([math.nan], "high", Amount(threshold=1.0)),
        lambda: rank_correlation([1.0, 2.0], [1.0, math.nan]),
    ):
        with pytest.raises(NumericalError, match="not a number"):
            refused()


@pytest.mark.parametrize("top_p", [0.05, 0.2, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 100, 224])
def test_a_share_is_rounded_as_peft_rounds_it(n: int, top_p: float) -> None:
    scores = [float((7 * index) % n) for index in range(n)]
    expected = sorted(range(n), key=lambda index: scores[index])[: max(1, int(n * top_p))]
    assert choose(scores, "low", Amount(top_p=top_p)) == expected


def test_a_share_of_29_percent_of_100_is_28() -> None:
    assert len(choose([0.0] * 100, "low", Amount(top_p=0.29))) == 28


@pytest.mark.parametrize(("prefer", "chosen"), [("low", [1, 0, 3]), ("high", [2, 0, 3])])
def test_a_threshold_is_inclusive_on_either_side(prefer: str, chosen: list[int]) -> None:
    assert choose([2.0, 1.0, 3.0, 2.0], prefer, Amount(threshold=2.0)) == chosen


def test_a_threshold_of_zero_and_a_number_of_zero_are_given() -> None:
    assert choose([1.0, 0.0, 0.0], "low", Amount(threshold=0.0)) == [1, 2]
    assert choose([1.0, 0.0], "low", Amount(num_modules=0)) == []


@pytest.mark.parametrize(("num", "chosen"), [(1, [2]), (2, [2, 0]), (9, [2, 0, 1])])
def test_a_number_takes_the_first(num: int, chosen: list[int]) -> None:
    assert choose([2.0, 2.0, 1.0], "low", Amount(num_modules=num)) == chosen


@pytest.mark.parametrize("amount", [Amount(top_p=0.5), Amount(num_modules=3), Amount(threshold=1.0)])
def test_nothing_is_chosen_from_nothing(amount: Amount) -> None:
    assert choose([], "low", amount) == choose([], "high", amount, groups=[]) == []


def test_groups_are_cut_apart_and_listed_in_order_of_appearance() -> None:
    scores = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0]
    groups = ["q", "v", "q", "v", "q", "o"]
    assert choose(scores, "low", Amount(num_modules=2), groups) == [4, 2, 1, 3, 5]
    assert choose(scores, "high", Amount(top_p=0.7), groups) == [0, 2, 3, 5]
    assert choose(scores, "low", Amount(threshold=4.0), groups) == [4, 2, 1, 3]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SCORES, st.floats(0.01, 1), st.sampled_from(["low", "high"]), st.integers(1, 4))
def test_each_group_is_chosen_from_as_if_alone(scores: list[float], p: float, prefer: str, num: int) -> None:
    groups = [str(index * index % num) for index in range(len(scores))]
    expected = []
    for group in dict.fromkeys(groups):
        members = [index for index, label in enumerate(groups) if label == group]
        alone = choose([scores[index] for index in members], prefer, Amount(top_p=p))
        expected += [members[index] for index in alone]
    assert choose(scores, prefer, Amount(top_p=p), groups) == expected


def test_overlap_is_the_intersection_over_the_union() -> None:
    assert overlap(["a", "b", "c"], {"b", "c", "d"}) == 0.5
    assert overlap(["a", "a", "b"], ["b"]) == 0.5
    assert overlap(["a"], ["b"]) == overlap([], ["b"]) == 0
    assert overlap([], []) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_scipys_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(value) for value in side] for side in zip(*pairs, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = float(scipy.stats.spearmanr(x, y).statistic)
    found = rank_correlation(x, y)
    assert found is None if math.isnan(right) else found == pytest.approx(right, abs=1e-12)


def test_infinities_rank_as_the_largest() -> None:
    assert rank_correlation([1.0, math.inf, 2.0], [0.0, 9.0, 5.0]) == pytest.approx(1)
    assert rank_correlation([1.0, math.inf, math.inf, 2.0], [1.0, 7.0, 7.0, 3.0]) == pytest.approx(1)
    assert rank_correlation([math.inf, math.inf], [1.0, 2.0]) is None
    assert rank_correlation([1.0], [2.0]) is None
    assert rank_correlation([], []) is None


SHAPES = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=9
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SHAPES, st.integers(1, 256), st.data())
def test_a_matched_rank_spends_the_budget_and_not_more(
    shapes: list[tuple[int, int, int]], rank: int, data: st.DataObject
) -> None:
    chosen = shapes[: data.draw(st.integers(1, len(shapes)))]
    budget = rank * sum(n * o + n * i for n, o, i in shapes)
    matched = matched_rank(rank, shapes, chosen)
    assert matched >= rank
    assert sum(matched * n * o + matched * n * i for n, o, i in chosen) <= budget
    assert sum((matched + 1) * n * o + (matched + 1) * n * i for n, o, i in chosen) > budget


def test_a_matched_rank_counts_experts_and_is_never_zero() -> None:
    assert matched_rank(8, [(4, 10, 20), (1, 20, 10)], [(1, 20, 10)]) == 40
    assert matched_rank(1, [(1, 5, 5)], [(3, 5, 5)]) == 1
    with pytest.raises(NumericalError, match="empty choice"):
        matched_rank(8, [(1, 5, 5)], [])
