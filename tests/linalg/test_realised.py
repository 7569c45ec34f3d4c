"""The realised truncation, in cases where it is known in closed form."""

import pytest
import torch

from kasa_cli.linalg import rounding
from kasa_cli.linalg.bottom import Ends, ends
from kasa_cli.linalg.realised import Outcome, outcome
from kasa_cli.linalg.rounding import ExactSum, nearest, preserve
from kasa_cli.methods import kasa
from tests.builders.matrices import SHAPES, deficient, gaussian, linear, log, with_spectrum

T = 8


def measure(Q: torch.Tensor, W: torch.Tensor, found: Ends) -> Outcome:
    L, R = kasa.truncation(found)
    return outcome(lambda start, stop: Q[start:stop], ExactSum(W, L, R), found.V, found.S)


def part(found: Ends, share: float) -> torch.Tensor:
    L, R = kasa.truncation(found)
    return share * (L @ R)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("share", "realised"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (1.5, 0.5), (2.0, 0.0), (3.0, -1.0)]
)
def test_a_share_of_the_cut_realises_that_share(shape, share, realised):
    W = with_spectrum(*shape, linear(min(shape), 20))
    found = ends(W, T)
    measured = measure(W + part(found, share), W, found)
    dropped = float(found.S.norm() / W.norm())
    assert measured.realised == pytest.approx(realised, abs=1e-12)
    assert measured.relative_error == pytest.approx(share * dropped, abs=1e-14)
    assert measured.rounding_error == pytest.approx(abs(1 - share) * dropped, abs=1e-14)
    assert measured.changed_fraction == (1.0 if share else 0.0)


NOTHING = {
    "t = 0": (gaussian(30, 20), 0),
    "zeros": (with_spectrum(30, 40, deficient(30, T)), T),
    "a zero weight": (torch.zeros(30, 40), T),
}


@pytest.mark.parametrize(("W", "t"), NOTHING.values(), ids=NOTHING)
def test_where_there_was_nothing_to_drop_the_cut_is_complete(W, t):
    measured = measure(W, W, ends(W, t))
    assert (measured.realised, measured.changed_fraction, measured.relative_error) == (1.0, 0.0, 0.0)
    assert measured.rounding_error <= 1e-15


def test_only_what_is_not_zero_already_counts():
    W = with_spectrum(30, 40, deficient(30, T - 2))
    found = ends(W, T)
    measured = measure((W + part(found, 1)).to(torch.float32), W, found)
    assert measured.realised == pytest.approx(1, abs=1e-3)


def test_an_entry_counts_as_changed_by_its_value():
    W = torch.zeros(2, 3)
    found = ends(W, 0)
    Q = torch.tensor([[-0.0, 0.0, 1e-45], [0.0, 2.0, 0.0]])
    assert measure(Q, W, found).changed_fraction == pytest.approx(2 / 6)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 33, 80])
def test_rows_are_read_in_order_each_once(num_rows, monkeypatch):
    monkeypatch.setattr(rounding, "BLOCK_BYTES", 1)
    W, seen = gaussian(num_rows, 50), []

    def stored(start, stop):
        seen.extend(range(start, stop))
        return W[start:stop]

    found = ends(W, 0)
    measured = outcome(stored, ExactSum(W, *kasa.truncation(found)), found.V, found.S)
    assert seen == list(range(num_rows))
    assert measured == Outcome(1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_undoes_a_cut_that_preserve_keeps(dtype):
    W = with_spectrum(256, 256, log(256, 1e3), dtype)
    found = ends(W, T)
    target = ExactSum(W, *kasa.truncation(found))
    by = {f.__name__: measure(f(target, found.V, dtype), W, found) for f in (nearest, preserve)}
    assert by["nearest"].realised <= by["preserve"].realised
    assert (by["nearest"].realised < 0.7) == (dtype == torch.bfloat16)
    assert 1 - by["preserve"].realised <= (1 - by["nearest"].realised) / 3
    assert by["nearest"].rounding_error <= by["preserve"].rounding_error
