"""The largest singular values and vectors, by Lanczos and by LAPACK, against numpy's decomposition in float64."""

import numpy as np
import pytest
import torch

from kasa_cli.errors import NumericalError
from kasa_cli.linalg import top
from kasa_cli.linalg.bottom import ends_of
from kasa_cli.linalg.frame import frame_of
from kasa_cli.linalg.gram import Gram
from kasa_cli.linalg.top import Tops, tops_of
from tests.builders.matrices import (
    FLOATS,
    SHAPES,
    clustered,
    deficient,
    distance,
    gaussian,
    linear,
    log,
    truth,
    with_spectrum,
)

VALUE = 1e-12
"""Relative to σ_max."""
ORTHONORMAL = 1e-12
SPACE = 1e-7


def check(W: torch.Tensor, t: int) -> Tops:
    """Assert every property of a result; subspaces too, where they are unique."""
    found, right = tops_of(Gram(frame_of(W)), t), truth(W)
    sigma = right.sigma()
    assert found.U.shape == (W.shape[0], t)
    assert found.V.shape == (W.shape[1], t)
    assert np.abs(found.S.numpy() - right.S[:t]).max(initial=0) <= VALUE * sigma
    assert (np.diff(found.S.numpy()) <= 0).all()
    for X in (found.U, found.V):
        assert X.is_contiguous()
        assert (X.T @ X - torch.eye(t)).abs().max() <= ORTHONORMAL
    largest = found.U.gather(0, found.U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    product = ((found.U * found.S) @ found.V.T).numpy()
    rest = np.linalg.norm(W.to(torch.float64).numpy() / sigma - product / sigma, 2)
    assert rest <= (right.S[t] / sigma if t < len(right.S) else 0) + 10 * VALUE
    if t == len(right.S) or right.S[t - 1] - right.S[t] > 1e-5 * right.S[t - 1]:
        best = (right.U[:, :t] * right.S[:t]) @ right.V[:, :t].T
        assert np.abs(product - best).max() <= SPACE * sigma
        if right.S[t - 1] > 1e-6 * sigma:
            assert distance(found.U, right.U[:, :t]) <= SPACE
            assert distance(found.V, right.V[:, :t]) <= SPACE
    return found


@pytest.fixture
def roads(monkeypatch):
    """The method that computed each result."""
    taken = []
    real, lapack = top.dominant, top.kernels.top_pairs

    def dominant(*arguments):
        found = real(*arguments)
        taken.append("lanczos" if found.has_settled else "unsettled")
        return found

    def top_pairs(*arguments):
        taken.append("lapack")
        return lapack(*arguments)

    monkeypatch.setattr(top, "dominant", dominant)
    monkeypatch.setattr(top.kernels, "top_pairs", top_pairs)
    return taken


@pytest.mark.parametrize("t", [1, 4, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spectrum", [log, linear, clustered])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_dtype_and_spectrum(shape, spectrum, dtype, t):
    check(with_spectrum(*shape, spectrum(min(shape), 1e3), dtype), t)


@pytest.mark.parametrize("turn", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("k", [1, 2, 7, 40, 512])
def test_all_of_them(k, turn):
    W = gaussian(k + 5, k)
    check(W.T if turn else W, k)


@pytest.mark.parametrize("turn", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("t", [1, 8, 16])
def test_separated_directions_of_a_large_weight_by_lanczos(t, turn, roads):
    W = with_spectrum(700, 600, log(600, 1e30))
    check(W.T if turn else W, t)
    assert roads == ["lanczos"]


@pytest.mark.parametrize(
    ("build", "t", "expected"),
    [
        (lambda: with_spectrum(600, 560, linear(560, 1.001)), 12, ["unsettled", "lapack"]),
        (lambda: with_spectrum(600, 560, log(560, 1e3)), 40, ["lapack"]),
        (lambda: gaussian(560, 600), 560, ["lapack"]),
        (lambda: gaussian(512, 600), 16, []),
    ],
    ids=["no gap", "many", "all", "small"],
)
def test_lapack_where_lanczos_does_not_settle_or_pay(build, t, expected, roads):
    check(build(), t)
    assert roads == expected


def test_both_roads_lead_to_the_same_product(monkeypatch):
    W = with_spectrum(700, 600, log(600, 1e30))
    one = check(W, 8)
    monkeypatch.setattr(top, "STEPS", 1000)
    other = check(W, 8)
    assert torch.allclose(one.S, other.S, rtol=1e-13)
    assert torch.allclose((one.U * one.S) @ one.V.T, (other.U * other.S) @ other.V.T, atol=1e-10)


@pytest.mark.parametrize("shape", [(90, 60), (640, 600)], ids=str)
@pytest.mark.parametrize("t", [1, 8, 25])
def test_a_cut_through_a_tie_is_still_a_best_one(shape, t):
    k = min(shape)
    check(with_spectrum(*shape, torch.cat([torch.full((20,), 2.0), torch.ones(k - 20)]).to(torch.float64)), t)
    check(torch.eye(*shape), t)


@pytest.mark.parametrize("shape", [(90, 60), (640, 600)], ids=str)
def test_a_deficient_weight_and_a_zero_one(shape):
    found = check(with_spectrum(*shape, deficient(min(shape), min(shape) - 3)), 8)
    assert found.S[3:].abs().max() <= VALUE
    assert (check(torch.zeros(*shape), 8).S == 0).all()


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e280])
def test_every_scale(scale):
    W = gaussian(90, 60)
    found, plain = check(scale * W, 4), check(W, 4)
    assert torch.allclose(found.S / scale, plain.S, rtol=1e-13)


@pytest.mark.parametrize("k", [60, 560])
def test_signs_do_not_depend_on_those_of_the_weight(k):
    W = with_spectrum(k + 9, k, log(k, 1e9))
    one, other = check(W, 5), check(-W, 5)
    assert torch.allclose(one.U, other.U, atol=1e-9)
    assert torch.allclose(one.V, -other.V, atol=1e-9)


def test_more_than_there_are_is_refused():
    with pytest.raises(NumericalError, match="6 components of 5"):
        tops_of(Gram(frame_of(gaussian(5, 9))), 6)


@pytest.mark.parametrize("k", [60, 600])
def test_what_was_asked_before_changes_no_bit(k):
    W = gaussian(k + 40, k)
    alone = tops_of(Gram(frame_of(W)), 8)
    gram = Gram(frame_of(W))
    ends_of(gram, 16)
    tops_of(gram, 3)
    late = tops_of(gram, 8)
    for name in ("U", "S", "V"):
        assert torch.equal(getattr(late, name), getattr(alone, name))


@pytest.mark.parametrize("t", [8, 40])
def test_on_a_device_torch_finds_the_same_product(t, monkeypatch):
    W = with_spectrum(640, 600, log(600, 1e9))
    one = tops_of(Gram(frame_of(W)), t)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    other = check(W, t)
    assert torch.allclose((one.U * one.S) @ one.V.T, (other.U * other.S) @ other.V.T, atol=1e-10)
