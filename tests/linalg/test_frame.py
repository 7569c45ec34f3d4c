"""A weight that is read by rows gives the same results as in memory, to the last bit."""

import math

import numpy as np
import pytest
import torch

from kasa_cli.errors import NumericalError
from kasa_cli.linalg import frame as frames
from kasa_cli.linalg.bottom import ends, ends_of, level
from kasa_cli.linalg.frame import StreamedWeight, frame_of, largest_entry
from kasa_cli.linalg.gram import Gram
from kasa_cli.linalg.spectrum import values_of
from kasa_cli.linalg.top import tops_of
from tests.builders.matrices import FLOATS, cliff, gaussian, linear, log, same_bytes, with_spectrum


def by_rows(W: torch.Tensor, asked: list[tuple[int, int]] | None = None) -> StreamedWeight:
    """A weight that returns copies of its rows and notes which rows are read."""

    def read(start: int, stop: int) -> torch.Tensor:
        if asked is not None:
            asked.append((start, stop))
        return W[start:stop].clone()

    return StreamedWeight((W.shape[0], W.shape[1]), read, W.device)


WEIGHTS = {
    "small": lambda: gaussian(900, 60),
    "half precision": lambda: gaussian(1300, 130, torch.bfloat16),
    "float16": lambda: gaussian(700, 130, torch.float16),
    "nearly square": lambda: gaussian(561, 560, torch.float32),
    "large": lambda: gaussian(1800, 560, torch.bfloat16),
    "no gap": lambda: with_spectrum(1100, 600, linear(600, 1.001)),
    "few small values": lambda: with_spectrum(1100, 600, cliff(600, 24, 1e8)),
    "many small values": lambda: with_spectrum(1100, 600, log(600, 1e13)),
    "small, ill-conditioned": lambda: with_spectrum(900, 60, log(60, 1e13)),
    "tiny": lambda: 1e-300 * gaussian(900, 60),
    "zero": lambda: torch.zeros(900, 60),
}


@pytest.mark.parametrize("build", WEIGHTS.values(), ids=WEIGHTS)
def test_every_answer_is_that_of_the_same_weight_in_memory(build, monkeypatch):
    monkeypatch.setattr(frames, "BLOCK_ENTRIES", 1 << 14)
    W = build()
    k = W.shape[1]
    held, read = Gram(frame_of(W)), Gram(frame_of(by_rows(W)))
    for t in (level(k, 0), 3):
        one, other = ends_of(held, t), ends_of(read, t)
        for name in ("U", "S", "V", "residuals"):
            assert same_bytes(getattr(other, name), getattr(one, name)), name
        for name in ("sigma_max", "sigma_min", "sigma_next", "frobenius", "solver", "is_squared"):
            assert getattr(other, name) == getattr(one, name), name
    one, other = (values_of(gram, ends_of(gram, level(k, 0))) for gram in (held, read))
    assert same_bytes(other.S, one.S)
    assert other.solver == one.solver
    one, other = tops_of(held, 5), tops_of(read, 5)
    for name in ("U", "S", "V"):
        assert same_bytes(getattr(other, name), getattr(one, name)), name


def test_rows_are_asked_for_some_at_a_time(monkeypatch):
    monkeypatch.setattr(frames, "BLOCK_ENTRIES", 1 << 14)
    asked: list[tuple[int, int]] = []
    W = gaussian(60_000, 20, torch.bfloat16)
    gram = Gram(frame_of(by_rows(W, asked)))
    values_of(gram, ends_of(gram, 16))
    widest = max(frames.PANEL_BYTES // (8 * 20), frames.BLOCK_ENTRIES // 20)
    assert max(stop - start for start, stop in asked) <= widest < 60_000
    assert all(0 <= start < stop <= 60_000 for start, stop in asked)


@pytest.mark.parametrize("shape", [(3, 4), (1, 9), (60, 900), (1, 1), (60, 60)], ids=str)
def test_a_weight_that_is_not_tall_is_not_measured_by_rows(shape):
    with pytest.raises(NumericalError, match="only a tall weight"):
        frame_of(by_rows(gaussian(*shape)))


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_blocks_are_all_rows_once_and_in_order(step, monkeypatch):
    monkeypatch.setattr(frames, "BLOCK_ENTRIES", step * 5)
    W = gaussian(23, 5)
    blocks = list(by_rows(W).blocks())
    assert torch.equal(torch.cat(blocks), W)
    assert {len(block) for block in blocks[:-1]} <= {step}


@pytest.mark.parametrize("columns", [3, 10**9])
def test_a_row_longer_than_a_block_is_a_block(columns):
    asked = []
    rows = StreamedWeight((3, columns), lambda *bounds: asked.append(bounds), torch.device("cpu"))
    list(rows.blocks())
    assert asked == ([(0, 3)] if columns == 3 else [(0, 1), (1, 2), (2, 3)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(97, 40), (40, 97), (64, 64), (1500, 70), (70, 1500)], ids=str)
@pytest.mark.parametrize("is_read", [False, True], ids=["in memory", "by rows"])
def test_the_triangle_has_the_singular_values_and_the_left_vectors_of_the_frame(shape, dtype, is_read):
    if is_read and shape[0] <= shape[1]:
        return
    W = gaussian(*shape, dtype)
    M = frame_of(by_rows(W) if is_read else W)
    R = M.triangle()
    A = M.dense().numpy()
    assert R.shape == (M.num_short, M.num_short)
    assert torch.equal(R, torch.triu(R))
    right = np.linalg.svd(A, compute_uv=False)
    assert np.abs(np.linalg.svd(R.numpy(), compute_uv=False) - right).max() <= 1e-13 * right[0]
    assert np.abs(R.numpy().T @ R.numpy() - A @ A.T).max() <= 1e-13 * right[0] ** 2


def test_a_triangle_keeps_small_values_that_a_square_loses():
    S = log(60, 1e12)
    R = frame_of(with_spectrum(900, 60, S)).triangle()
    assert torch.allclose(torch.linalg.svdvals(R) * frame_of(with_spectrum(900, 60, S)).scale, S, atol=1e-15)


@pytest.mark.parametrize("shape", [(97, 40), (40, 97), (1500, 70)], ids=str)
def test_panels_products_and_the_dense_frame_agree(shape):
    W = gaussian(*shape)
    M = frame_of(W)
    A = (W.T if shape[0] > shape[1] else W) / M.scale
    assert torch.equal(M.dense(), A)
    assert torch.equal(torch.cat([panel.clone() for _, panel in M.panels()], dim=1), A)
    Z, X = gaussian(M.num_short, 3), gaussian(M.num_long, 3)
    assert torch.allclose(M.transposed_product(Z), A.T @ Z, atol=1e-12)
    assert torch.allclose(M.product(X), A @ X, atol=1e-12)


@pytest.mark.parametrize("entry", [-7.0, 7.0])
def test_the_largest_entry_may_lie_in_any_block(entry, monkeypatch):
    monkeypatch.setattr(frames, "BLOCK_ENTRIES", 50)
    for row in (0, 19, 20, 22):
        W = torch.ones(23, 5)
        W[row, 3] = entry
        assert largest_entry(by_rows(W)) == largest_entry(W) == 7.0


@pytest.mark.parametrize(("entry", "said"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("row", [0, 9, 10, 22])
def test_an_entry_that_is_no_number_is_named_in_any_block(row, entry, said, monkeypatch):
    monkeypatch.setattr(frames, "BLOCK_ENTRIES", 50)
    W = torch.ones(23, 5, dtype=torch.bfloat16)
    W[row, 3] = W[22, 4] = entry
    for given in (W, by_rows(W)):
        with pytest.raises(NumericalError, match=rf"^entry \[{row}, 3\] is {said}$"):
            ends(given, 2)


def test_what_leaves_no_room_to_sum_is_refused():
    W = torch.ones(9, 5, dtype=torch.float64)
    W[8, 4] = 1e300
    for given in (W, by_rows(W)):
        with pytest.raises(NumericalError, match=r"an entry of 1e\+300 is too large to sum squares"):
            frame_of(given)


@pytest.mark.parametrize("largest", [1e-320, 1e-30, 0.75, 1.0, 3e38, 1e280])
def test_the_scale_is_the_power_of_two_above_the_largest_entry(largest):
    M = frame_of(torch.tensor([[largest, 0.0, 0.0], [0.0, -largest / 2, 0.0]], dtype=torch.float64))
    assert math.frexp(M.scale)[0] == 0.5
    assert largest < M.scale
    assert M.scale <= 2 * largest or M.exponent == -1000
    assert frame_of(torch.zeros(2, 3)).scale == 1.0
