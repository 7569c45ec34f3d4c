"""BLAS by address: other threads run meanwhile, and only the passed memory is written."""

import threading
import time

import pytest
import torch

from kasa_cli.linalg import blas
from tests.builders.matrices import gaussian, positive


def in_fortran_order(k: int, dtype=torch.float64) -> torch.Tensor:
    return blas.fortran(positive(k).to(dtype))


def counted_meanwhile(call) -> int:
    """How often another thread got the interpreter while the call ran."""
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(1)
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.01)
    before = len(ticks)
    call()
    seen = len(ticks) - before
    done.set()
    thread.join()
    return seen


CALLS = {
    "syrk": lambda A, X: blas.syrk(A, A.contiguous()),
    "potrf": lambda A, X: blas.potrf(A),
    "trsm": lambda A, X: [blas.trsm(A, X, transposed=False) for _ in range(30)],
    "symm": lambda A, X: [blas.symm(A, X, torch.empty_like(X)) for _ in range(30)],
    "syevr": lambda A, X: blas.syevr(A, b"L", 0, 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_threads_run_meanwhile(name):
    A, X = in_fortran_order(900), blas.fortran(gaussian(900, 64))
    assert counted_meanwhile(lambda: CALLS[name](A, X)) >= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eigenpairs_of_a_range_are_those_of_the_whole(dtype):
    A = in_fortran_order(40, dtype)
    values, Z = torch.linalg.eigh(A)
    some, vectors = blas.syevr(blas.fortran(torch.triu(A)), b"U", 37, 39)
    assert torch.allclose(some, values[37:], rtol=1e-5)
    assert torch.allclose((vectors.T @ Z[:, 37:]).abs(), torch.eye(3, dtype=dtype), atol=1e-4)


def test_a_copy_in_fortran_order_is_a_copy():
    X = gaussian(5, 3)
    Y = blas.fortran(X)
    assert torch.equal(X, Y)
    assert Y.T.is_contiguous()
    assert Y.data_ptr() != X.data_ptr()
