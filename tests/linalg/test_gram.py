"""The Gram matrix that solvers share: every solver gets the same bits, and no weight waits for that of another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kasa_cli.linalg import gram as module
from kasa_cli.linalg.frame import frame_of
from kasa_cli.linalg.gram import Gram
from kasa_cli.pipeline.measuring.facts import Facts, HashedMatrix
from tests.builders.matrices import gaussian


@pytest.mark.parametrize("shape", [(1, 1), (40, 97), (97, 40), (300, 300)])
def test_it_is_lent_again_as_it_was(shape):
    W = gaussian(*shape)
    lent = Gram(frame_of(W))
    M = lent.frame.dense()
    first = torch.tril(lent.lend()).clone()
    assert torch.allclose(first, torch.tril(M @ M.T), atol=1e-12)
    for spend in (torch.Tensor.zero_, torch.Tensor.exp_):
        G = lent.lend()
        lower = torch.ones_like(G).tril().bool()
        G[lower] = spend(G[lower].clone())
        assert torch.equal(torch.tril(lent.lend()), first)
    assert lent.trace == pytest.approx(float(M.square().sum()))
    assert torch.equal(lent.diagonal, first.diagonal())


@pytest.mark.parametrize("asked", [lambda g: g.lend(), lambda g: g.trace, lambda g: g.leading])
def test_two_are_summed_at_the_same_time(asked, monkeypatch):
    """Each sum waits until the other has started; a lock between them would make the wait time out."""
    both, real = threading.Barrier(2, timeout=20), module.gram

    def summed(M):
        both.wait()
        return real(M)

    monkeypatch.setattr(module, "gram", summed)
    grams = [Gram(frame_of(gaussian(30, 40, seed=seed))) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(asked, grams))) == 2


def test_two_weights_are_read_at_the_same_time():
    both = threading.Barrier(2, timeout=20)

    def read():
        both.wait()
        return gaussian(30, 40)

    facts = Facts(None, {})
    benches = [facts.bench(HashedMatrix("w", str(n) * 64, (30, 40), "F64", "", read)) for n in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(lambda bench: bench.extremes(), benches))) == 2
