"""A measurement of a weight has the same bits, whatever was measured, stored or lost before."""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kasa_cli.errors import NumericalError
from kasa_cli.files.store import Store
from kasa_cli.linalg.bottom import Ends, ends, level
from kasa_cli.linalg.spectrum import Values
from kasa_cli.pipeline.measuring import facts as asking
from kasa_cli.pipeline.measuring.facts import (
    Bench,
    Extremes,
    Facts,
    HashedMatrix,
    content_hash,
    header,
    pack,
    unpack,
)
from kasa_cli.pipeline.workers import blas_threads
from tests.builders.matrices import gaussian, log, with_spectrum

ENVIRONMENT = {"kasa": "1", "safetensors": "1", "threads_per_worker": 1, "torch": "2"}
NAME = "model.layers.0.self_attn.q_proj.weight"
SIDES = (1, 2, 17, 40)
SHAPES = {"tall": lambda k: (k + 57, k), "wide": lambda k: (k, k + 57), "square": lambda k: (k, k)}
LARGE = {"tall": (704, 600), "wide": (600, 704), "square": (600, 600)}
SOME = (0, 8, 16, 17, 80)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with blas_threads(1):
        yield


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return Facts(Store(tmp_path / "STORE"), ENVIRONMENT)


def weight(W: Tensor, name: str = NAME) -> HashedMatrix:
    shape = (W.shape[0], W.shape[1])
    digest = hashlib.sha256(W.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    content = content_hash(str(W.dtype), shape, digest, is_transposed=False)
    return HashedMatrix(name, content, shape, str(W.dtype), digest, lambda: W)


def unread(known: HashedMatrix) -> HashedMatrix:
    """The same weight; reading it fails the test."""

    def read() -> Tensor:
        raise AssertionError("a known weight was read")

    return HashedMatrix(known.name, known.content, known.shape, known.dtype, known.digest, read)


def alone(known: HashedMatrix) -> Bench:
    """A new bench without a store."""
    return Facts(None, ENVIRONMENT).bench(known)


def bits(fact: Extremes | Ends | Values) -> bytes:
    return pack(fact, {})


def stored(facts: Facts) -> list[str]:
    assert facts.store
    return [question for entry in facts.store.entries() for question in entry.questions]


QUESTIONS: dict[str, Callable[[Bench], bytes]] = {
    "extremes": lambda bench: bits(bench.extremes()),
    "values": lambda bench: bits(bench.values()),
    "bottom 3": lambda bench: bits(bench.bottom(3)),
    "bottom 16": lambda bench: bits(bench.bottom(16)),
    "bottom 30": lambda bench: bits(bench.bottom(30)),
    "top 5": lambda bench: bits(bench.top(5)),
    "top 30": lambda bench: bits(bench.top(30)),
}


# --- one answer ---


@pytest.mark.parametrize("k", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_of_components_has_one_answer(facts: Facts, k: int, shape: str) -> None:
    """Measured alone, with an empty, a poorer and a richer store, and by one bench in any order."""
    known = weight(gaussian(*SHAPES[shape](k), dtype=torch.float32))
    expected = [bits(alone(known).bottom(t)) for t in range(k)]
    assert [bits(facts.bench(known).bottom(t)) for t in range(k)] == expected
    assert [bits(facts.bench(unread(known)).bottom(t)) for t in range(k)] == expected
    forward, backward = alone(known), alone(known)
    assert [bits(forward.bottom(t)) for t in range(k)] == expected
    assert [bits(backward.bottom(t)) for t in reversed(range(k))] == expected[::-1]
    assert [len(unpack(Ends, one).S) for one in expected] == list(range(k))


@pytest.mark.parametrize("shape", LARGE)
def test_every_number_of_components_of_a_large_weight_has_one_answer(facts: Facts, shape: str) -> None:
    """A size at which Lanczos runs: its bytes depend on the number of requested components."""
    known = weight(gaussian(*LARGE[shape]).to(torch.bfloat16))
    richest = facts.bench(known)
    richest.bottom(max(SOME))
    poorer_first = alone(known)
    for t in SOME:
        found = bits(alone(known).bottom(t))
        assert bits(facts.bench(unread(known)).bottom(t)) == found
        assert bits(poorer_first.bottom(t)) == found
    assert sorted(stored(facts)) == ["ends-16", "ends-256", "ends-64", "extremes"]


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_those_of_the_level_and_true(shape: str) -> None:
    W = gaussian(*SHAPES[shape](40))
    S = torch.linalg.svdvals(W)
    for t in range(40):
        found = alone(weight(W)).bottom(t)
        assert bits(found) == bits(ends(W, level(40, t)).cut(t))
        torch.testing.assert_close(found.S, S[40 - t :], rtol=1e-9, atol=0)
        torch.testing.assert_close(W @ found.V, found.U * found.S, rtol=0, atol=1e-9)
        assert found.sigma_next == pytest.approx(float(S[39 - t]), rel=1e-9)


@pytest.mark.parametrize("first", QUESTIONS)
@pytest.mark.parametrize("second", QUESTIONS)
def test_no_answer_depends_on_the_question_before(facts: Facts, first: str, second: str) -> None:
    known = weight(gaussian(40, 97, dtype=torch.float32))
    expected = QUESTIONS[second](alone(known))
    bench = alone(known)
    QUESTIONS[first](bench)
    assert QUESTIONS[second](bench) == expected
    QUESTIONS[first](facts.bench(known))
    assert QUESTIONS[second](facts.bench(known)) == expected
    assert QUESTIONS[second](facts.bench(unread(known))) == expected


@pytest.mark.parametrize("lost", ["extremes", "ends-16", "ends-39", "values"])
def test_no_answer_depends_on_a_fact_that_was_lost(facts: Facts, lost: str) -> None:
    known = weight(gaussian(40, 97, dtype=torch.float32))
    for question in QUESTIONS.values():
        question(facts.bench(known))
    assert facts.store
    for path in facts.store.root.rglob(f"{lost}.*"):
        path.unlink()
    for question in QUESTIONS.values():
        assert question(facts.bench(known)) == question(alone(known))
    assert lost in stored(facts)


def test_a_store_pruned_between_two_questions_changes_no_answer(facts: Facts) -> None:
    known = weight(gaussian(40, 97))
    assert facts.store
    for question in QUESTIONS.values():
        bench = facts.bench(known)
        bench.bottom(30)
        facts.store.remove(known.content)
        assert question(bench) == question(alone(known))


def near_tie() -> Tensor:
    """The eighth and ninth smallest values are so close that only a separate decomposition is accurate."""
    S = log(40, 1e4)
    S[31] = S[32] * (1 + 2e-5)
    return with_spectrum(40, 97, S)


def test_a_cut_that_its_level_leaves_blunt_is_made_alone_and_always_so(facts: Facts) -> None:
    known = weight(near_tie())
    expected = alone(known).bottom(8)
    inside = alone(known).bottom(16).cut(8)
    assert inside.angle > asking.ANGLE_TOLERANCE > expected.angle
    assert expected.solver != inside.solver
    facts.bench(known).bottom(30)
    first, second = facts.bench(known), facts.bench(unread(known))
    assert bits(first.bottom(8)) == bits(second.bottom(8)) == bits(expected)
    assert (first.is_new, second.is_new) == (True, False)
    assert bits(facts.bench(unread(known)).bottom(16)) == bits(alone(known).bottom(16))
    assert "ends-8" in stored(facts)


# --- one condition number ---


@pytest.mark.parametrize("k", [*SIDES, 600])
@pytest.mark.parametrize("shape", SHAPES)
def test_extremes_are_the_same_in_every_fact(k: int, shape: str) -> None:
    W = gaussian(*(LARGE[shape] if k == 600 else SHAPES[shape](k)), dtype=torch.float32)
    bench = alone(weight(W))
    extremes, S = bench.extremes(), bench.values().S
    assert (float(S[0]), float(S[-1])) == (extremes.sigma_max, extremes.sigma_min)
    assert extremes.kappa == float(S[0]) / float(S[-1])
    assert len(S) == k and bool((S[:-1] >= S[1:]).all())
    for t in {0, 1, min(20, k - 1)} & set(range(k)):
        found = bench.bottom(t)
        assert found.frobenius == extremes.frobenius
        assert found.sigma_max == pytest.approx(extremes.sigma_max, rel=1e-10)
        assert found.sigma_min == pytest.approx(extremes.sigma_min, rel=1e-10)
    assert extremes.frobenius == pytest.approx(float(torch.linalg.matrix_norm(W.double())), rel=1e-12)
    assert extremes.sigma_max == pytest.approx(float(torch.linalg.matrix_norm(W.double(), 2)), rel=1e-9)


def test_a_singular_weight_has_an_infinite_kappa_before_and_after_it_is_kept(facts: Facts) -> None:
    W = gaussian(30, 40)
    W[7] = W[3]
    for known in (weight(W), weight(torch.zeros(6, 5))):
        for bench in (facts.bench(known), facts.bench(unread(known))):
            assert (bench.extremes().sigma_min, bench.extremes().kappa) == (0.0, math.inf)
            assert bench.values().S[-1] == 0


# --- the large end ---


@pytest.mark.parametrize("k", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_components_have_one_answer_and_all_are_the_most(
    facts: Facts, k: int, shape: str
) -> None:
    W = gaussian(*SHAPES[shape](k))
    known = weight(W)
    S = torch.linalg.svdvals(W)
    facts.bench(known).top(k + 5)
    for t in (*range(k + 1), k + 5):
        found = alone(known).top(t)
        assert bits(found) == bits(facts.bench(unread(known)).top(t))
        assert found.U.shape == (W.shape[0], min(t, k)) and found.V.shape == (W.shape[1], min(t, k))
        torch.testing.assert_close(found.S, S[:t], rtol=1e-9, atol=0)
        torch.testing.assert_close(W @ found.V, found.U * found.S, rtol=0, atol=1e-9)


# --- what is new ---


@pytest.mark.parametrize(
    ("before", "question", "is_new"),
    [
        ((), "extremes", True),
        ((), "top 5", True),
        (("extremes",), "bottom 3", False),
        (("extremes",), "bottom 16", False),
        (("bottom 3",), "extremes", False),
        (("bottom 3",), "bottom 30", True),
        (("bottom 30",), "bottom 3", False),
        (("bottom 30",), "bottom 16", False),
        (("bottom 30",), "values", True),
        (("values",), "extremes", False),
        (("values",), "bottom 16", False),
        (("values",), "bottom 30", True),
        (("values",), "top 5", True),
        (("top 30",), "top 5", False),
        (("top 5",), "top 30", True),
        (("top 30",), "extremes", True),
        (("values", "bottom 30", "top 30"), "values", False),
    ],
)
def test_a_decomposition_counts_exactly_when_it_is_made(
    facts: Facts, before: tuple[str, ...], question: str, is_new: bool
) -> None:
    known = weight(gaussian(40, 97))
    for name in before:
        QUESTIONS[name](facts.bench(known))
    bench = facts.bench(known if is_new else unread(known))
    assert not bench.is_new
    QUESTIONS[question](bench)
    assert bench.is_new == is_new
    again = facts.bench(unread(known))
    QUESTIONS[question](again)
    assert not again.is_new


def test_without_a_store_every_bench_decomposes_and_once_for_all_its_questions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_read = []
    W = gaussian(40, 97)
    known = weight(W)
    counted = HashedMatrix(
        known.name, known.content, known.shape, known.dtype, known.digest, lambda: num_read.append(1) or W
    )
    for expected in (1, 2):
        bench = alone(counted)
        for question in QUESTIONS.values():
            question(bench)
        assert bench.is_new and len(num_read) == expected


# --- weights that cannot be measured ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_weight_that_is_not_finite_is_named_and_nothing_of_it_is_kept(
    facts: Facts, bad: float, question: str
) -> None:
    W = gaussian(40, 97, dtype=torch.float32)
    W[3, 4] = bad
    with pytest.raises(NumericalError, match=rf"{NAME}") as caught:
        QUESTIONS[question](facts.bench(weight(W)))
    assert str(caught.value).count(NAME) == 1
    assert stored(facts) == []


def test_a_solver_that_gives_up_is_reported_with_the_weight(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_solver(*_: object) -> Ends:
        raise NumericalError("no solver reached", "", "try a prayer")

    monkeypatch.setattr(asking, "ends_of", no_solver)
    with pytest.raises(NumericalError) as caught:
        facts.bench(weight(gaussian(20, 20))).bottom(3)
    assert str(caught.value) == f"no solver reached: {NAME}: try a prayer"
    assert stored(facts) == []


@pytest.mark.parametrize(("k", "t"), [(1, 1), (5, 5), (5, 6), (40, 400), (5, -1)])
def test_more_components_than_there_are_cannot_be_dropped(facts: Facts, k: int, t: int) -> None:
    known = weight(gaussian(k, 57))
    facts.bench(known).extremes()
    with pytest.raises(NumericalError, match=f"cannot drop {t} of {k} components: {NAME}"):
        facts.bench(known).bottom(t)


# --- facts that are not used ---


@pytest.mark.parametrize(
    ("change", "is_taken_up"),
    [
        ({}, True),
        ({"kasa": "2"}, True),
        ({"safetensors": "2"}, True),
        ({"threads_per_worker": 2}, False),
        ({"torch": "3"}, False),
        ({"device": "cuda"}, False),
    ],
)
def test_facts_of_another_numerical_environment_are_not_taken_up(
    facts: Facts, change: dict[str, object], is_taken_up: bool
) -> None:
    known = weight(gaussian(20, 30))
    facts.bench(known).values()
    bench = Facts(facts.store, ENVIRONMENT | change).bench(known)
    bench.values()
    assert bench.is_new != is_taken_up
    own = facts.bench(unread(known))
    own.values()
    assert not own.is_new


def test_facts_of_another_edition_of_the_solvers_are_not_taken_up(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = weight(gaussian(20, 30))
    facts.bench(known).values()
    monkeypatch.setattr(asking, "SOLVER_EDITION", asking.SOLVER_EDITION + 1)
    bench = Facts(facts.store, ENVIRONMENT).bench(known)
    bench.values()
    assert bench.is_new


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"\xff" * 100,
        b"\2\0\0\0\0\0\0\0{}",
        (4).to_bytes(8, "little") + b"null",
        pack(Values(torch.ones(3, dtype=torch.float64), "none"), {})[:-1],
        pack(Values(torch.ones(3, dtype=torch.float64), "none"), {}),
    ],
    ids=["empty", "short", "noise", "no metadata", "null", "cut", "another fact"],
)
def test_a_whole_file_that_is_no_such_fact_is_measured_again(facts: Facts, payload: bytes) -> None:
    known = weight(gaussian(20, 30))
    facts.put(known, "extremes", payload)
    facts.put(known, "ends-16", payload)
    bench = facts.bench(known)
    assert bits(bench.bottom(8)) == bits(alone(known).bottom(8))
    assert bench.is_new


# --- keys ---


def test_the_key_tells_apart_whatever_is_read_in_another_way() -> None:
    digest = hashlib.sha256(b"").hexdigest()
    other = hashlib.sha256(b"x").hexdigest()
    given: list[tuple[str, tuple[int, ...], str, bool]] = [
        (dtype, shape, sha256, is_transposed)
        for dtype in ("F32", "BF16", "F16")
        for shape in ((16, 1), (1, 16), (4, 4), (11, 6), (1, 16, 1))
        for sha256 in (digest, other)
        for is_transposed in (False, True)
    ]
    keys = {content_hash(dtype, shape, sha, is_transposed=turned) for dtype, shape, sha, turned in given}
    assert len(keys) == len(given)


def test_a_fact_tells_what_it_is_about_and_its_bytes_are_the_same_each_time(facts: Facts) -> None:
    known = weight(gaussian(20, 30, dtype=torch.float32))
    facts.bench(known).values()
    assert facts.store
    files = {path: path.read_bytes() for path in facts.store.root.rglob("*.*.*")}
    assert {path.name.split(".")[0] for path in files} == {"ends-16", "extremes", "values"}
    for payload in files.values():
        assert header(payload)["about"] == {"dtype": "torch.float32", "name": NAME, "shape": [20, 30]}
    facts.store.remove(known.content)
    facts.bench(known).values()
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_fact_comes_back_to_the_last_bit(shape: str) -> None:
    bench = alone(weight(gaussian(*SHAPES[shape](17)) * 1e-30))
    for fact in (bench.extremes(), bench.bottom(0), bench.bottom(1), bench.bottom(16), bench.values()):
        again = unpack(type(fact), bits(fact))
        assert bits(again) == bits(fact)
        assert {name: type(value) for name, value in vars(again).items()} == {
            name: type(value) for name, value in vars(fact).items()
        }
