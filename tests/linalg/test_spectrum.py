"""All singular values against numpy's in float64: every shape, dtype, condition number and scale."""

import numpy as np
import pytest
import torch

from kasa_cli.linalg.bottom import Ends, ends_of, level
from kasa_cli.linalg.frame import frame_of
from kasa_cli.linalg.gram import Gram
from kasa_cli.linalg.spectrum import Values, values_of
from kasa_cli.linalg.top import tops_of
from tests.builders.matrices import (
    FLOATS,
    SHAPES,
    cliff,
    clustered,
    deficient,
    gaussian,
    linear,
    log,
    truth,
    with_spectrum,
)

ABSOLUTE = 1e-11
"""Relative to σ_max, for all values except σ_max itself, which is read in directions computed in float32: TOP."""
TOP = 1e-10
RELATIVE = 1e-6
"""Relative to the value itself, for values above RESOLVED."""
RESOLVED = 1e-8
SIDES = {
    **SHAPES,
    "wider than 512": (560, 600),
    "taller than 512": (760, 600),
    "square above 512": (600, 600),
}


def measured(W: torch.Tensor) -> tuple[Values, Ends]:
    gram = Gram(frame_of(W))
    found = ends_of(gram, level(min(W.shape), 0))
    return values_of(gram, found), found


def check(W: torch.Tensor) -> Values:
    """Assert every property of a result."""
    values, found = measured(W)
    S, right = values.S.numpy(), truth(W).S
    sigma = float(right[0]) or 1.0
    assert S.shape == right.shape
    assert values.S.dtype == torch.float64
    assert np.abs(S - right)[1:].max(initial=0) <= ABSOLUTE * sigma
    assert abs(S[0] - right[0]) <= TOP * sigma
    resolved = right > RESOLVED * sigma
    assert (np.abs(S - right)[resolved] / right[resolved]).max(initial=0) <= RELATIVE
    assert (np.diff(S) <= 0).all()
    assert S.min() >= 0
    assert S[0] == found.sigma_max
    if len(S) > 1:  # the one value of a vector is the largest
        assert S[-1] == found.sigma_min
    return values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spectrum", [log, linear, clustered])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_dtype_and_spectrum(shape, spectrum, dtype):
    check(with_spectrum(*shape, spectrum(min(shape), 1e3), dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_noise_of_every_shape_and_dtype(shape, dtype):
    check(gaussian(*shape, dtype))


@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e13])
@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_every_condition_number(shape, kappa):
    check(with_spectrum(*shape, log(min(shape), kappa)))


@pytest.mark.parametrize("k", [1, 2, 3, 16, 17, 18, 130, 511, 512, 513])
@pytest.mark.parametrize("turn", [False, True], ids=["tall", "wide"])
def test_every_short_side(k, turn):
    W = gaussian(k + 7, k)
    check(W.T if turn else W)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)], ids=str)
def test_the_one_value_of_a_vector_is_its_length(shape):
    W = gaussian(*shape)
    assert check(W).S.tolist() == pytest.approx([float(W.square().sum().sqrt())], rel=1e-14)


@pytest.mark.parametrize("num_zeros", [1, 8, 16, 17, 30])
@pytest.mark.parametrize("shape", [(97, 40), (64, 64)], ids=str)
def test_zeros_are_zero(shape, num_zeros):
    S = check(with_spectrum(*shape, deficient(min(shape), num_zeros))).S
    assert (S == 0).sum() == num_zeros


@pytest.mark.parametrize("num_zeros", [1, 8, 100, 400])
def test_zeros_of_a_large_weight_are_zero(num_zeros):
    S = check(with_spectrum(600, 640, deficient(600, num_zeros))).S
    assert (S == 0).sum() == num_zeros


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_a_zero_weight_has_none_but_zeros(shape):
    assert (check(torch.zeros(*shape)).S == 0).all()


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_an_identity_has_none_but_ones(shape):
    S = check(3 * torch.eye(*shape)).S
    assert torch.allclose(S, torch.full_like(S, 3.0), rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e280])
@pytest.mark.parametrize("k", [40, 560])
@pytest.mark.parametrize("kappa", [1e3, 1e9])
def test_every_scale(scale, k, kappa):
    check(scale * with_spectrum(k + 57, k, log(k, kappa)))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_scale_of_narrow_dtypes(scale, dtype):
    check((scale * gaussian(60, 90)).to(dtype))


SOLVERS = {
    "well-conditioned": (lambda: gaussian(90, 60), "gram-eigh + gram-eigh"),
    "large": (lambda: gaussian(600, 600), "gram-eigh + gram-lanczos"),
    "few small": (lambda: with_spectrum(90, 60, cliff(60, 10, 1e7)), "gram-eigh + gram-eigh"),
    "more small than the ends": (lambda: with_spectrum(90, 60, cliff(60, 24, 1e7)), "gram-eigh + gram-eigh"),
    "small": (lambda: with_spectrum(90, 60, log(60, 1e8)), "gram-eigh + gram-eigh"),
    "before zeros": (lambda: with_spectrum(600, 640, deficient(600, 8, 1e6)), "gram-eigh + svd"),
    "many small": (lambda: with_spectrum(640, 600, log(600, 1e13)), "qr-svd"),
}


@pytest.mark.parametrize(("build", "solver"), SOLVERS.values(), ids=SOLVERS)
def test_the_solver_is_named(build, solver):
    assert check(build()).solver == solver


def test_as_many_small_values_as_there_are_but_one_take_the_triangle():
    W = with_spectrum(18, 18, torch.cat([torch.ones(1), torch.full((17,), 1e-6)]).to(torch.float64))
    check(W)
    check(torch.cat([W, W]))


ROADS = {
    "eigenvalues": lambda: gaussian(90, 60),
    "eigenvalues of a large one": lambda: gaussian(600, 560, torch.bfloat16),
    "small ones by a solver": lambda: with_spectrum(640, 600, cliff(600, 40, 1e8)),
    "triangle": lambda: with_spectrum(640, 600, log(600, 1e13)),
}


@pytest.mark.parametrize("build", ROADS.values(), ids=ROADS)
def test_what_was_asked_before_changes_no_bit(build):
    W = build()
    alone, found = measured(W)
    gram = Gram(frame_of(W))
    tops_of(gram, 5)
    for t in (64, 3):
        ends_of(gram, min(t, min(W.shape) - 1))
    tops_of(gram, 20)
    again = ends_of(gram, level(min(W.shape), 0))
    late = values_of(gram, again)
    assert late.solver == alone.solver
    assert torch.equal(late.S, alone.S)
    assert torch.equal(values_of(gram, again).S, alone.S)
    for name in ("U", "S", "V", "residuals"):
        assert torch.equal(getattr(again, name), getattr(found, name))


def test_values_leave_the_next_question_as_it_was():
    W = gaussian(600, 560)
    gram = Gram(frame_of(W))
    found = ends_of(gram, 16)
    values_of(gram, found)
    after = ends_of(gram, 16)
    assert torch.equal(after.S, found.S)
    assert torch.equal(after.U, found.U)


@pytest.mark.parametrize("build", ROADS.values(), ids=ROADS)
def test_on_a_device_torch_finds_the_same_values(build, monkeypatch):
    W = build()
    by_lapack, _ = measured(W)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    by_torch = check(W)
    assert by_torch.solver == by_lapack.solver
    assert torch.allclose(by_torch.S, by_lapack.S, rtol=1e-6, atol=1e-11 * float(by_lapack.S[0]))
