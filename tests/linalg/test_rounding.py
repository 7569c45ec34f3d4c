"""Rounding against tables of every representable number, and the bound of `preserve` on dropped directions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_cli.linalg import rounding
from kasa_cli.linalg.bottom import ends
from kasa_cli.linalg.rounding import ROUNDINGS, ExactSum, nearest, other_neighbour, preserve, rounded
from kasa_cli.methods import kasa
from tests.builders.matrices import gaussian, orthonormal, same_bytes

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HALVES = (BF16, FP16)


def table(dtype: torch.dtype) -> np.ndarray:
    """Every finite number of a 16-bit dtype, once, in order."""
    bits = np.arange(2**16, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        values = (bits << 16).view(np.float32) if dtype == BF16 else bits.astype(np.uint16).view(np.float16)
        return np.unique(values[np.isfinite(values)].astype(np.float64))


TABLES = {dtype: table(dtype) for dtype in HALVES}


def neighbours(T: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The largest representable number at most T and the smallest at least T."""
    if dtype in TABLES:
        numbers = TABLES[dtype]
        above = np.searchsorted(numbers, T).clip(max=len(numbers) - 1)
        exact = numbers[above] == T
        return numbers[np.where(exact, above, above - 1)], numbers[above]
    near = T.astype(np.float32)
    wide = near.astype(np.float64)
    low = np.where(wide > T, np.nextafter(near, np.float32(-np.inf)), near).astype(np.float64)
    high = np.where(wide < T, np.nextafter(near, np.float32(np.inf)), near).astype(np.float64)
    return low, high


def exact(W: torch.Tensor, t: int = 0) -> ExactSum:
    """A target that is W itself, whatever the directions."""
    return ExactSum(W, torch.zeros(len(W), t, dtype=FP64), torch.zeros(t, W.shape[1], dtype=FP64))


def left(Q: torch.Tensor, T: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """The component of each row of Q in the directions V."""
    return torch.linalg.vector_norm((Q.to(FP64) - T) @ V, dim=1)


LARGEST = {BF16: 3.3e38, FP16: 65504.0, FP32: 3.4e38}


@st.composite
def problems(draw):
    """A target, directions and a dtype: numbers of every magnitude, also representable ones, zeros and midpoints."""
    dtype = draw(st.sampled_from([BF16, FP16, FP32]))
    o, i = draw(st.integers(1, 5)), draw(st.integers(2, 24))
    t = draw(st.integers(0, min(4, i)))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    span = draw(st.sampled_from([0.1, 3.0, 12.0]))
    centre = draw(st.sampled_from([1e-45, 1e-38, 1e-5, 1.0, 100.0, LARGEST[dtype]]))
    T = rng.normal(size=(o, i)) * centre * np.exp(span * rng.normal(size=(o, i)))
    T = T.clip(-LARGEST[dtype], LARGEST[dtype])
    low, high = neighbours(T, dtype)
    kind = rng.integers(0, draw(st.sampled_from([1, 8])), size=T.shape)
    T = np.choose(kind.clip(max=4), [T, low, (low + high) / 2, np.zeros_like(T), high])
    return torch.from_numpy(T), orthonormal(i, t, seed % 1000) if t else torch.zeros(i, 0, dtype=FP64), dtype


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(sorted(ROUNDINGS)))
def test_every_entry_goes_to_one_of_its_two_neighbours(problem, name):
    T, V, dtype = problem
    Q = ROUNDINGS[name](exact(T, V.shape[1]), V, dtype)
    assert Q.dtype == dtype
    assert torch.isfinite(Q).all()
    stored = Q.to(FP64).numpy()
    low, high = neighbours(T.numpy(), dtype)
    assert ((stored == low) | (stored == high)).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_nearest_is_nearest(problem):
    T, V, dtype = problem
    Q = nearest(exact(T), V, dtype).to(FP64).numpy()
    low, high = neighbours(T.numpy(), dtype)
    best = np.minimum(T.numpy() - low, high - T.numpy())
    doubt = 2.0**-24 * np.abs(T.numpy()) if dtype in HALVES else 0.0  # the conversion goes through float32
    assert (np.abs(Q - T.numpy()) <= best + doubt).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_no_row_is_worse_than_nearest_in_the_dropped_directions(problem):
    T, V, dtype = problem
    target = exact(T, V.shape[1])
    kept, plain = (left(rounding(target, V, dtype), T, V) for rounding in (preserve, nearest))
    assert (kept <= plain * (1 + 1e-9) + 1e-12 * T.abs().max()).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems())
def test_the_negative_is_rounded_to_the_negative(problem):
    T, V, dtype = problem
    assert torch.equal(-preserve(exact(T, V.shape[1]), V, dtype), preserve(exact(-T, V.shape[1]), V, dtype))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems())
def test_the_other_neighbour_is_the_one_that_was_not_taken(problem):
    T, _, dtype = problem
    low, high = (torch.from_numpy(side) for side in neighbours(T.numpy(), dtype))
    assert torch.equal(other_neighbour(low.to(dtype), T).to(FP64), high)
    assert torch.equal(other_neighbour(high.to(dtype), T).to(FP64), low)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_other_neighbour_of_every_number_there_is(dtype):
    numbers = torch.from_numpy(TABLES[dtype])
    Q = numbers.to(dtype)
    assert torch.equal(other_neighbour(Q, numbers), Q)
    between = (numbers[1:] + numbers[:-1]) / 2
    assert torch.equal(other_neighbour(Q[:-1], between).to(FP64), numbers[1:])
    assert torch.equal(other_neighbour(Q[1:], between).to(FP64), numbers[:-1])
    beyond = torch.tensor([math.inf, -math.inf]).to(FP64)
    assert torch.equal(other_neighbour(Q[[-1, 0]], beyond).to(FP64), numbers[[-1, 0]])


NEIGHBOURS = {
    "up from 1": (BF16, 1.0, 1.001, 1.0078125),
    "down from 1, a smaller step": (BF16, 1.0, 0.999, 0.99609375),
    "up from -1, a smaller step": (BF16, -1.0, -0.999, -0.99609375),
    "exact": (BF16, 1.5, 1.5, 1.5),
    "above zero": (FP16, 0.0, 1e-9, 2.0**-24),
    "below zero": (FP16, 0.0, -1e-9, -(2.0**-24)),
    "below a negative zero": (FP16, -0.0, -1e-9, -(2.0**-24)),
    "from the smallest to zero": (FP16, 2.0**-24, 4e-8, 0.0),
    "into the subnormals": (FP16, 2.0**-14, 2.0**-14 - 1e-9, 2.0**-14 - 2.0**-24),
    "never to infinity": (FP16, 65504.0, 65510.0, 65504.0),
    "never back from infinity": (FP16, math.inf, 1e6, math.inf),
    "float32": (FP32, 1.0, 1 + 1e-9, 1 + 2.0**-23),
    "float64": (FP64, 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize(("dtype", "Q", "T", "other"), NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_the_other_neighbour(dtype, Q, T, other):
    assert other_neighbour(torch.tensor([Q], dtype=dtype), torch.tensor([T], dtype=FP64)).tolist() == [other]


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_what_can_be_stored_is_stored(dtype, name):
    W = gaussian(40, 60, dtype)
    assert torch.equal(ROUNDINGS[name](exact(W, 8), orthonormal(60, 8), dtype), W)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_in_float64_nothing_is_rounded(name):
    target = ExactSum(gaussian(30, 40), gaussian(30, 4), gaussian(4, 40))
    stored = ROUNDINGS[name](target, orthonormal(40, 4), FP64)
    assert torch.allclose(stored, target.W + target.L @ target.R, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("seed", range(4))
def test_what_does_not_fit_stays_infinite_and_can_be_refused(name, seed):
    W = gaussian(6, 20, seed=seed)
    W[:, 7], W[2, 11] = 1e6, -70000.0
    Q = ROUNDINGS[name](exact(W, 3), orthonormal(20, 3, seed), FP16)
    assert (Q[:, 7] == math.inf).all()
    assert Q[2, 11] == -math.inf


def truncation(o, i, dtype, t=8):
    W = gaussian(o, i, dtype)
    found = ends(W, t)
    L, R = kasa.truncation(found)
    return ExactSum(W, L, R), found


@pytest.mark.parametrize("shape", [(70, 50), (50, 70), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_cut_is_rounded_to_neighbours_of_the_exact_sum(shape, dtype):
    target, found = truncation(*shape, dtype)
    T = (target.W.to(FP64) + target.L @ target.R).numpy()
    low, high = neighbours(T, dtype)
    for rounding_ in ROUNDINGS.values():
        stored = rounding_(target, found.V, dtype).to(FP64).numpy()
        assert ((stored == low) | (stored == high)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_preserve_keeps_the_cut_at_the_price_of_less_than_a_third_more_error(dtype):
    target, found = truncation(512, 512, dtype)
    T = target.rows(0, 512)
    kept, plain = (rounding(target, found.V, dtype) for rounding in (preserve, nearest))
    assert 5 * left(kept, T, found.V).norm() <= left(plain, T, found.V).norm()
    assert (kept.to(FP64) - T).norm() < 4 / 3 * (plain.to(FP64) - T).norm()


@pytest.mark.parametrize("shape", [(20, 300), (300, 20), (90, 90)], ids=str)
def test_the_carried_error_passes_from_block_to_block(shape, monkeypatch):
    target, found = truncation(*shape, BF16, 4)
    whole = preserve(target, found.V, BF16)
    monkeypatch.setattr(rounding, "BLOCK_BYTES", 1)
    pieces = preserve(target, found.V, BF16)
    assert len(list(rounding.blocks(*shape))) > 1
    assert (whole != pieces).sum() <= 2  # where the order of the summation decides
    T = target.rows(0, shape[0])
    assert left(pieces, T, found.V).norm() <= 1.1 * left(whole, T, found.V).norm()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounding_touches_neither_the_weight_nor_the_factors(name):
    target, found = truncation(40, 40, BF16)
    before = [X.clone() for X in (target.W, target.L, target.R, found.V)]
    first, second = (ROUNDINGS[name](target, found.V, BF16) for _ in range(2))
    assert same_bytes(first, second)
    assert all(map(same_bytes, before, (target.W, target.L, target.R, found.V)))


def test_rows_and_columns_of_a_target_are_of_the_same_sum():
    target, _ = truncation(40, 60, BF16)
    T = target.W.to(FP64) + target.L @ target.R
    assert torch.allclose(target.rows(3, 17), T[3:17], atol=1e-14)
    assert torch.allclose(target.columns(5, 60), T[:, 5:], atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_just_beyond_a_tie_is_rounded_once(dtype, sign):
    half_step = torch.finfo(dtype).eps / 2
    T = sign * torch.tensor(
        [1 + half_step + 2.0**-40, 1 + half_step, 1 + half_step - 2.0**-40], dtype=torch.float64
    )
    up, even, down = rounded(T, dtype).to(torch.float64).tolist()
    assert (up, even, down) == (sign * (1 + 2 * half_step), sign, sign)
