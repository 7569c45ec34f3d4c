"""The smallest and largest singular values against numpy's in float64: every solver, shape, dtype and scale."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from kasa_cli.errors import NumericalError
from kasa_cli.linalg.bottom import TIE, Ends, ends
from kasa_cli.linalg.solvers import SOLVERS, Directions, ladder
from kasa_cli.pipeline import workers
from tests.builders.matrices import (
    FLOATS,
    SHAPES,
    SPECTRA,
    cliff,
    clustered,
    deficient,
    distance,
    gaussian,
    linear,
    log,
    orthonormal,
    same_bytes,
    truth,
    with_spectrum,
)

VALUE = 1e-12
"""Relative to σ_max. The largest value itself is read in directions computed in float32: TOP."""
TOP = 1e-10
ANGLE = 1e-6


def product(found: Ends) -> torch.Tensor:
    return (found.U * found.S) @ found.V.T


def check(W: torch.Tensor, t: int, found: Ends | None = None) -> Ends:
    """Assert every property of a result; subspaces too, where they are unique."""
    found = found or ends(W, t)
    right, k = truth(W), min(W.shape)
    sigma, cut, following = right.sigma(), k - t, max(k - t - 1, 0) if t else k - 1
    assert found.U.shape == (W.shape[0], t)
    assert found.V.shape == (W.shape[1], t)
    assert np.abs(found.S.numpy() - right.S[cut:]).max(initial=0) <= VALUE * sigma
    assert abs(found.sigma_next - right.S[following]) <= VALUE * sigma
    assert abs(found.sigma_min - right.S[-1]) <= VALUE * sigma
    assert abs(found.sigma_max - right.S[0]) <= TOP * sigma
    assert found.frobenius / sigma == pytest.approx(np.linalg.norm(right.S / sigma), rel=VALUE)
    energy = (right.S[cut:] / sigma) @ (right.S[cut:] / sigma) / ((right.S / sigma) @ (right.S / sigma) or 1)
    assert found.dropped_energy == pytest.approx(energy, rel=1e-6, abs=1e-24)
    for X in (found.U, found.V):
        assert (X.T @ X - torch.eye(t, dtype=X.dtype)).abs().max() <= VALUE if t else True
    rest = torch.linalg.svdvals(W.to(torch.float64) / sigma - product(found) / sigma).numpy()
    assert np.abs(rest - np.append(right.S[:cut] / sigma, np.zeros(t))).max() <= VALUE
    is_unique = t > 0 and right.S[cut - 1] - right.S[cut] > 1e-5 * right.S[cut - 1]
    if is_unique and right.S[cut - 1] > 1e-11 * sigma:
        short, long = (found.U, right.U), (found.V, right.V)
        if W.shape[0] > W.shape[1]:
            short, long = long, short
        assert distance(short[0], short[1][:, cut:]) <= min(max(10 * found.angle, 1e-10), ANGLE)
        if right.S[-1] > 0.9e-8 * sigma:  # the long side is arbitrary at zero and inaccurate near it
            assert distance(long[0], long[1][:, cut:]) <= ANGLE
    return found


def alone(monkeypatch, *names: str) -> None:
    monkeypatch.setattr("kasa_cli.linalg.bottom.ladder", lambda k, t: names)


@pytest.mark.parametrize("t", [0, 1, 8, -1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_dtype_and_spectrum(shape, spectrum, dtype, t):
    k = min(shape)
    check(with_spectrum(*shape, spectrum(k, 1e3), dtype), t % k)


@pytest.mark.parametrize("kappa", [1.5, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (700, 700), (760, 600), (600, 760)], ids=str)
def test_every_condition_number(shape, kappa):
    found = check(with_spectrum(*shape, log(min(shape), kappa)), 8)
    assert found.kappa == pytest.approx(kappa, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 9, 16, 17, 33, 130, 512, 513])
@pytest.mark.parametrize("turn", [False, True], ids=["tall", "wide"])
def test_every_short_side(k, turn):
    W = gaussian(k + 7, k)
    check(W.T if turn else W, min(8, k - 1))


ANSWERS = {
    "small": (lambda: gaussian(90, 60), 8, "gram-eigh"),
    "small, ill-conditioned": (lambda: with_spectrum(90, 60, log(60, 1e8)), 8, "svd"),
    "most of a large one": (lambda: gaussian(600, 600), 100, "gram-eigh"),
    "square": (lambda: gaussian(700, 700), 8, "gram-lanczos"),
    "square, half precision": (lambda: gaussian(700, 700, torch.bfloat16), 8, "gram-lanczos"),
    "wide": (lambda: gaussian(600, 1500), 8, "gram-lanczos"),
    "tall": (lambda: gaussian(1500, 600), 1, "gram-lanczos"),
    "nothing dropped": (lambda: gaussian(600, 640), 0, "gram-lanczos"),
    "zeros to spare": (lambda: with_spectrum(600, 640, deficient(600, 12)), 8, "gram-lanczos"),
    "all zeros dropped": (lambda: with_spectrum(600, 640, deficient(600, 8)), 8, "gram-eigh"),
    "linear": (lambda: with_spectrum(600, 600, linear(600, 1e8)), 8, "gram-eigh"),
    "zero": (lambda: torch.zeros(600, 640), 8, "gram-eigh"),
    "ill-conditioned": (lambda: with_spectrum(600, 640, log(600, 1e6)), 8, "cholesky-qr2"),
    "a cliff": (lambda: with_spectrum(640, 600, cliff(600, 24, 1e8)), 8, "cholesky-qr2"),
    "clusters": (lambda: with_spectrum(600, 600, clustered(600, 1e3)), 8, "cholesky-qr2"),
    "small values before zeros": (lambda: with_spectrum(600, 640, deficient(600, 8, 1e7)), 8, "svd"),
}


@pytest.mark.parametrize(("build", "t", "solver"), ANSWERS.values(), ids=ANSWERS)
def test_the_solver_that_suits_answers(build, t, solver):
    assert check(build(), t).solver == solver


SIZES = {"gram-eigh": 60, "gram-lanczos": 560, "cholesky-qr2": 560, "svd": 60}


@pytest.mark.parametrize("kappa", [1e2, 1e3, 1e5, 1e8])
@pytest.mark.parametrize(
    "spectrum", [log, linear, lambda k, kappa: cliff(k, 24, kappa)], ids=["log", "linear", "cliff"]
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_alone_is_right_or_refuses(solver, spectrum, kappa, monkeypatch):
    alone(monkeypatch, solver)
    k = SIZES[solver]
    W = with_spectrum(k + 9, k, spectrum(k, kappa))
    try:
        found = ends(W, 8)
    except NumericalError:
        assert solver != "svd"
        assert kappa > 1e3
    else:
        assert check(W, 8, found).solver == solver


@pytest.mark.parametrize("t", [0, 1, 8])
@pytest.mark.parametrize("shape", [(600, 560), (560, 600)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_answers_for_every_shape(solver, shape, t, monkeypatch):
    alone(monkeypatch, solver)
    assert check(gaussian(*shape), t).solver == solver


def test_solvers_agree(monkeypatch):
    W, products = gaussian(600, 600), []
    for solver in SOLVERS:
        alone(monkeypatch, solver)
        products.append(product(ends(W, 8)))
    assert max(float((one - products[0]).abs().max()) for one in products) <= 1e-10


def refuse(gram, t):
    return None


def fail(error):
    def solver(gram, t):
        raise error

    return solver


@pytest.mark.parametrize(
    "first",
    [refuse, fail(scipy.linalg.LinAlgError("dsyevr")), fail(torch.linalg.LinAlgError("linalg.eigh"))],
    ids=["gives up", "scipy fails", "torch fails"],
)
def test_a_solver_that_cannot_makes_room_for_the_next(first, monkeypatch):
    monkeypatch.setitem(SOLVERS, "gram-eigh", first)
    assert check(gaussian(40, 30), 8).solver == "svd"


@pytest.mark.parametrize("is_squared", [True, False])
def test_a_wrong_answer_is_noticed(is_squared, monkeypatch):
    def wrong(gram, t):
        Q = orthonormal(gram.frame.num_short, gram.frame.num_short)
        return Directions(Q[:, : t + 8], Q[:, -8:], 1.0, "wrong", is_squared)

    monkeypatch.setitem(SOLVERS, "gram-eigh", wrong)
    assert check(gaussian(40, 30), 8).solver == "svd"


def test_one_failing_lapack_driver_is_survived_and_two_are_an_error(monkeypatch):
    real, asked = scipy.linalg.svd, []

    def counted(*args, lapack_driver, **kwargs):
        asked.append(lapack_driver)
        return real(*args, lapack_driver=lapack_driver, **kwargs)

    alone(monkeypatch, "svd")
    W = gaussian(40, 30)
    monkeypatch.setattr(torch.linalg, "svd", once_then_right(torch.linalg.svd))
    monkeypatch.setattr(scipy.linalg, "svd", counted)
    check(W, 8)
    assert asked == ["gesvd"]
    monkeypatch.setattr(torch.linalg, "svd", never_right(torch.linalg.LinAlgError))
    monkeypatch.setattr(scipy.linalg, "svd", never_right(scipy.linalg.LinAlgError))
    with pytest.raises(NumericalError, match="did not converge"):
        ends(W, 8)


def never_right(error):
    def svd(*args, **kwargs):
        raise error("no convergence")

    return svd


def once_then_right(real):
    """A divide-and-conquer driver that does not converge at its first call."""
    asked = []

    def svd(*args, **kwargs):
        asked.append(args)
        if len(asked) == 1:
            raise torch.linalg.LinAlgError("no convergence")
        return real(*args, **kwargs)

    return svd


def test_beyond_what_lapack_can_index_is_refused_before_it_is_called(monkeypatch):
    monkeypatch.setattr("kasa_cli.linalg.solvers.LAPACK_LIMIT", 1000)
    monkeypatch.setattr("kasa_cli.linalg.gram.LAPACK_LIMIT", 1000)
    with pytest.raises(NumericalError, match="a side of 40 is beyond"):
        ends(gaussian(40, 50), 8)
    alone(monkeypatch, "svd")
    with pytest.raises(NumericalError, match="a full decomposition of 15 x 300 is beyond"):
        ends(gaussian(300, 15), 8)


def test_no_solver_left_is_an_error(monkeypatch):
    alone(monkeypatch, "gram-eigh")
    with pytest.raises(NumericalError, match="no solver reached"):
        ends(with_spectrum(60, 60, log(60, 1e9)), 8)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("t", "zeros"), [(1, 8), (8, 8), (8, 5), (12, 8)], ids=str)
def test_zeros_dropped_are_exactly_zero(shape, t, zeros):
    W = with_spectrum(*shape, deficient(min(shape), zeros))
    found = check(W, t)
    assert (found.S == 0).sum() == min(t, zeros)
    assert (found.sigma_min, found.kappa) == (0.0, math.inf)
    assert (found.sigma_next == 0) == (t < zeros)
    assert not found.is_tied


@pytest.mark.parametrize("shape", [(97, 40), (64, 64), (600, 560)], ids=str)
def test_the_kept_space_of_a_deficient_weight_is_its_row_space(shape):
    W = with_spectrum(*shape, deficient(min(shape), 8))
    found = ends(W, 8)
    left = W @ found.V if shape[0] > shape[1] else W.T @ found.U
    assert left.abs().max() <= 1e-12


def test_the_angle_to_a_null_space_counts_the_gap_above_it():
    found = check(with_spectrum(64, 64, deficient(64, 8, 1e4)), 8)
    assert found.solver == "gram-eigh"
    assert found.angle == pytest.approx(found.residual / found.sigma_next**2)


@pytest.mark.parametrize("k", [64, 700])
@pytest.mark.parametrize("num_twins", [4, 8, 30])
def test_twin_rows_in_half_precision_are_zeros_and_not_noise(k, num_twins):
    W = with_spectrum(k - num_twins, k, log(k - num_twins, 1e3), torch.bfloat16)
    found = check(torch.cat([W, W[:num_twins]]), 8)
    assert (found.S == 0).sum() == min(8, num_twins)


@pytest.mark.parametrize("k", [40, 600])
@pytest.mark.parametrize("smallest", [1e-6, 1e-9, 1e-11])
def test_a_small_value_is_not_taken_for_zero(k, smallest):
    S = linear(k, 1e3)
    S[-2:] = torch.tensor([2 * smallest, smallest])
    found = check(with_spectrum(k, k, S), 2)
    assert found.S.tolist() == pytest.approx(S[-2:].tolist(), abs=VALUE)
    assert found.sigma_min > 0


DEGENERATE = {
    "zero": torch.zeros(12, 20),
    "one entry": torch.zeros(12, 20).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(-2.0)),
    "ones": torch.ones(9, 30),
    "dead rows": gaussian(30, 20) * (torch.arange(30) % 3 > 0).to(torch.float64)[:, None],
    "dead columns": gaussian(30, 20) * (torch.arange(20) % 3 > 0).to(torch.float64),
    "all rows but one dead": gaussian(20, 20) * (torch.arange(20) == 7).to(torch.float64)[:, None],
    "twin rows": gaussian(10, 40).repeat(2, 1),
}


@pytest.mark.parametrize("W", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("t", [0, 1, 3, 8])
def test_degenerate_weights_are_cut_and_finite(W, t):
    found = check(W, t)
    assert all(torch.isfinite(X).all() for X in (found.U, found.S, found.V))
    assert all(map(math.isfinite, (found.residual, found.angle, found.dropped_energy)))


@pytest.mark.parametrize("side", [12, 600])
def test_a_zero_weight_is_all_zero(side):
    found = ends(torch.zeros(side, 2 * side, dtype=torch.bfloat16), 4)
    assert found.S.tolist() == [0.0] * 4
    assert (found.sigma_max, found.sigma_next, found.frobenius, found.dropped_energy) == (0, 0, 0, 0)
    assert (found.kappa, found.is_tied, found.residual) == (math.inf, False, 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)], ids=str)
def test_a_vector_has_one_singular_value_and_none_to_drop(shape):
    W = gaussian(*shape)
    found = check(W, 0)
    assert found.sigma_max == found.sigma_min == found.sigma_next == pytest.approx(float(W.norm()))
    with pytest.raises(NumericalError, match="cannot drop 1 of 1 components"):
        ends(W, 1)


@pytest.mark.parametrize(
    ("shape", "t"), [((5, 9), 5), ((9, 5), 6), ((5, 9), -1), ((0, 3), 0), ((3, 0), 0)], ids=str
)
def test_at_least_one_component_stays(shape, t):
    with pytest.raises(NumericalError, match=f"cannot drop {t} of {min(shape)} components"):
        ends(torch.ones(shape), t)


TIED = {
    "identity": lambda k: torch.eye(k, dtype=torch.float64),
    "orthogonal": lambda k: orthonormal(k, k),
    "orthonormal columns": lambda k: orthonormal(k + 40, k),
    "scaled identity, bf16": lambda k: 3 * torch.eye(k, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("k", [24, 560])
@pytest.mark.parametrize("build", TIED.values(), ids=TIED)
def test_a_tie_is_told_and_the_product_is_still_a_best_one(build, k):
    found = check(build(k), 8)
    assert found.is_tied
    assert found.kappa == pytest.approx(1)
    assert found.dropped_energy == pytest.approx(8 / k)


@pytest.mark.parametrize(("gap", "is_tied"), [(0.5 * TIE, True), (2 * TIE, False)])
@pytest.mark.parametrize("k", [40, 600])
def test_a_tie_begins_at_six_digits(gap, is_tied, k):
    S = linear(k, 10)
    S[-8:] = S[-9] * (1 - gap)
    assert check(with_spectrum(k, k, S), 8).is_tied == is_tied


def test_a_tie_among_the_dropped_is_none():
    S = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert not check(with_spectrum(5, 7, S), 3).is_tied


def test_nothing_dropped_has_no_cut_and_no_tie():
    found = ends(torch.eye(5), 0)
    assert (found.sigma_cut, found.is_tied, found.dropped_energy) == (None, False, 0.0)


def test_the_figures_of_a_diagonal_are_its_entries():
    found = ends(torch.diag(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])), 2)
    figures = (found.sigma_max, found.sigma_next, found.sigma_cut, found.sigma_min)
    assert figures == pytest.approx((5, 3, 2, 1), abs=1e-14)
    assert (found.kappa, found.frobenius**2, found.dropped_energy) == pytest.approx((5, 55, 5 / 55))


EXTREME = {
    "near the end of fp32": (gaussian(40, 60) * 6e37).to(torch.float32),
    "denormal in fp32": (gaussian(40, 60) * 2e-44).to(torch.float32),
    "near the end of bf16": (gaussian(60, 40) * 6e37).to(torch.bfloat16),
    "near the end of fp16": (gaussian(60, 40) * 1.5e4).to(torch.float16),
    "denormal in fp16": (gaussian(60, 40) * 1e-6).to(torch.float16),
    "fp64, squares overflow": gaussian(40, 60) * 1e250,
    "fp64, squares underflow": gaussian(40, 60) * 1e-250,
    "of both ends": torch.diag(torch.logspace(38, -38, 20, dtype=torch.float64)).to(torch.float32),
}


@pytest.mark.parametrize("W", EXTREME.values(), ids=EXTREME)
def test_extreme_scales_keep_every_digit(W):
    assert torch.isfinite(W).all()
    check(W, 8)


def test_a_scale_that_leaves_no_room_for_sums_is_refused():
    with pytest.raises(NumericalError, match=r"1\.7e\+308 is too large to sum squares"):
        ends(torch.full((8, 9), 1.7e308, dtype=torch.float64), 3)


@pytest.mark.parametrize("exponent", [-90, -7, 90])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (600, 600)], ids=str)
def test_a_power_of_two_scales_the_values_and_nothing_else(shape, exponent):
    W, scale = gaussian(*shape, torch.float32), math.ldexp(1.0, exponent)
    plain, scaled = ends(W, 8), ends(W * scale, 8)
    assert same_bytes(plain.U, scaled.U)
    assert same_bytes(plain.V, scaled.V)
    assert same_bytes(plain.S * scale, scaled.S)
    for name in ("sigma_max", "sigma_min", "sigma_next", "frobenius"):
        assert getattr(plain, name) * scale == getattr(scaled, name)
    assert (plain.residual, plain.angle, plain.solver) == (scaled.residual, scaled.angle, scaled.solver)


@pytest.mark.parametrize("shape", [(40, 97), (64, 64), (600, 560)], ids=str)
def test_transposing_swaps_the_sides(shape):
    W = gaussian(*shape)
    one, other = ends(W, 8), ends(W.T.contiguous(), 8)
    assert one.solver == other.solver
    assert torch.allclose(product(one), product(other).T, atol=1e-12)
    assert distance(one.U, other.V) <= 1e-10
    assert distance(one.V, other.U) <= 1e-10


STRIDED = {
    "every other row": lambda: gaussian(80, 50)[::2],
    "every other column": lambda: gaussian(50, 80)[:, ::2],
    "a transposed view": lambda: gaussian(50, 80).T,
    "a block": lambda: gaussian(80, 80)[5:45, 9:69],
    "stride 0": lambda: gaussian(1, 60).expand(30, 60),
    "a large transposed view": lambda: gaussian(560, 600, torch.bfloat16).T,
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strides_do_not_matter(view):
    assert fingerprint(ends(view(), 8)) == fingerprint(ends(view().contiguous(), 8))


@pytest.mark.parametrize("shape", [(64, 40), (40, 64), (600, 600)], ids=str)
def test_the_largest_entry_of_a_left_vector_is_positive(shape):
    for W in (gaussian(*shape), -gaussian(*shape)):
        U = ends(W, 8).U
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("k", [30, 560])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_weight_is_not_touched(dtype, k):
    W = gaussian(k, k, dtype)
    before = W.clone()
    ends(W, 3)
    assert same_bytes(W, before)


@pytest.mark.parametrize(("entry", "said"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("turn", [False, True], ids=["tall", "wide"])
def test_an_entry_that_is_no_number_is_named(entry, said, dtype, turn):
    W = torch.ones(9, 5, dtype=dtype)
    W[7, 2] = W[8, 1] = entry
    W, place = (W.T, r"\[1, 8\]") if turn else (W, r"\[7, 2\]")
    with pytest.raises(NumericalError, match=f"entry {place} is {said}$"):
        ends(W, 2)


def test_the_cheapest_solver_comes_first_and_the_surest_last():
    for k in range(1, 1500, 7):
        for t in (1, 16, 64):
            assert ladder(k, t)[-1] == "svd"
            assert ("gram-lanczos" in ladder(k, t)) == (k > 512 and 8 * (t + 8) <= k)


def fingerprint(found: Ends) -> tuple[object, ...]:
    tensors = (found.U, found.S, found.V)
    scalars = (value for value in vars(found).values() if not isinstance(value, torch.Tensor))
    return (*(X.numpy().tobytes() for X in tensors), *scalars)


MANY = [
    gaussian(60, 90),
    with_spectrum(90, 60, log(60, 1e8)),
    gaussian(600, 600),
    gaussian(600, 640, torch.bfloat16),
    gaussian(1200, 560),
    with_spectrum(600, 600, log(600, 1e6)),
]


@pytest.fixture(scope="module")
def expected():
    with workers.blas_threads(1):
        return [fingerprint(ends(W, 8)) for W in MANY]


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_bytes_do_not_depend_on_the_workers(num_workers, expected):
    with workers.blas_threads(1):
        found = workers.run(lambda W: fingerprint(ends(W, 8)), MANY, num_workers, lambda W: None)
    assert found == expected
