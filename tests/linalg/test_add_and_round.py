"""Sums of a weight and a low-rank term, block by block, and the measured errors, against numpy in float64."""

import numpy as np
import pytest
import torch

from kasa_cli.linalg.add_and_round import Sum
from kasa_cli.linalg.rounding import on_the_way, rounded, rounded_to_odd

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    W = (scale * torch.randn(50, 24, generator=generator)).to(dtype)
    L, R = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, 3), (3, 24)))
    return W, 0.1 * scale * L, R


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_blocks_make_the_rounded_sum_and_its_figures(stored, dtype, scale):
    if torch.float16 in (stored, dtype):
        scale = 2.0 ** (np.log2(scale) / 12)  # beyond the range of float16
    W, L, R = problem(stored, scale)
    total = Sum(L, R, dtype, 16)
    Q = torch.cat([total.block(W[start : start + 16], start).clone() for start in range(0, 50, 16)])
    T = W.double().numpy() + L.numpy() @ R.numpy()
    stored_numbers = Q.double().numpy()
    assert torch.equal(Q, rounded(torch.from_numpy(T), dtype)) or dtype == torch.float32
    off, whole = np.square(stored_numbers - T).sum(), np.square(T).sum()
    figures = (total.whole**0.5, total.off**0.5)
    np.testing.assert_allclose(figures, (whole**0.5, off**0.5), rtol=1e-4)
    change = np.abs(stored_numbers - W.double().numpy()).max()
    assert total.max_abs_change == pytest.approx(change, rel=1e-6)


def test_without_a_term_only_the_dtype_changes():
    W, nothing = problem(torch.float32)[0], torch.empty(0, 24, dtype=torch.float64)
    total = Sum(nothing.T, nothing, torch.bfloat16, 50)
    assert torch.equal(total.block(W, 0), W.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_does_not_fit_shows_in_the_error(dtype):
    W, L, R = problem(torch.float32, 1e38 if dtype == torch.bfloat16 else 1e5)
    total = Sum(100 * L, R, dtype, 50)
    total.block(W, 0)
    assert not np.isfinite(total.off)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 1024), (4, 4096), (0, 8), (1,)])
def test_a_look_at_the_few_that_are_halfway_is_as_good_as_rounding_all_to_odd(shape):
    """Numbers at and next to the midpoint of two neighbours, and arbitrary ones."""
    generator = torch.Generator().manual_seed(11)
    X = torch.randn(*shape, generator=generator, dtype=torch.float64)
    low = X.to(torch.float32).view(torch.int32) & ~0xFFFF
    middle = (low | 0x8000).view(torch.float32).double()
    for T in (X, middle, middle * (1 + 2.0**-50), middle * (1 - 2.0**-50), -middle):
        odd = rounded_to_odd(T, T.to(torch.float32)).to(torch.bfloat16)
        assert torch.equal(on_the_way(T, torch.bfloat16).to(torch.bfloat16), odd)
        assert torch.equal(rounded(T, torch.bfloat16), odd)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_transposed_view_is_rounded_like_its_copy(dtype):
    T = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).T
    assert torch.equal(rounded(T, dtype), rounded(T.contiguous(), dtype))
