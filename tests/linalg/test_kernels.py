"""The dense kernels by BLAS and by torch, each against the plain formula."""

import pytest
import torch

from kasa_cli.linalg import kernels
from kasa_cli.linalg.bottom import ends
from kasa_cli.linalg.solvers import SOLVERS
from tests.builders.matrices import cliff, distance, gaussian, log, positive, with_spectrum


@pytest.fixture(params=["scipy", "torch"])
def road(request, monkeypatch):
    """Both branches of every kernel: torch computes when a tensor is not on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    return request.param


SIDES = [(1, 1), (1, 9), (7, 1), (7, 5), (40, 97)]


def fortran(A: torch.Tensor) -> torch.Tensor:
    return A.T.contiguous().T


@pytest.mark.parametrize("k", [1, 2, 30])
def test_a_square_is_zero_and_in_fortran_order(k):
    G = kernels.square(k, torch.device("cpu"))
    assert (G == 0).all()
    assert G.dtype == torch.float64
    assert G.T.is_contiguous()


@pytest.mark.parametrize("order", [torch.Tensor.contiguous, fortran], ids=["C", "Fortran"])
@pytest.mark.parametrize(("k", "w"), SIDES)
def test_a_panel_is_added_to_the_lower_triangle_in_place(k, w, order, road):
    first, second = gaussian(k, w), gaussian(k, w, seed=1)
    G = kernels.square(k, first.device)
    memory = G.data_ptr()
    kernels.add_panel(G, order(first))
    kernels.add_panel(G, order(second))
    assert G.data_ptr() == memory
    assert torch.allclose(torch.tril(G), torch.tril(first @ first.T + second @ second.T), atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 30])
def test_a_factor_replaces_its_matrix(k, road):
    A = positive(k)
    G = fortran(torch.tril(A))
    memory = G.data_ptr()
    assert kernels.factorise(G)
    assert G.data_ptr() == memory
    L = torch.tril(G)
    assert torch.allclose(L @ L.T, A, atol=1e-12)


@pytest.mark.parametrize(
    "A", [torch.zeros(3, 3), -torch.eye(4), torch.diag(torch.tensor([1.0, -1e-9])), torch.ones(5, 5)]
)
def test_what_is_not_positive_definite_is_told(A, road):
    assert not kernels.factorise(fortran(A.to(torch.float64)))


@pytest.mark.parametrize(("k", "w"), SIDES)
@pytest.mark.parametrize("order", [torch.Tensor.contiguous, fortran], ids=["C", "Fortran"])
def test_solving_undoes_the_factor_and_leaves_the_right_side(k, w, order, road):
    L = fortran(torch.linalg.cholesky(positive(k)))
    X = order(gaussian(k, w))
    before = X.clone()
    assert torch.allclose(L @ kernels.forward_solve(L, X), X, atol=1e-12)
    assert torch.allclose(L.T @ kernels.backward_solve(L, X), X, atol=1e-12)
    assert torch.equal(X, before)


@pytest.mark.parametrize("order", [torch.Tensor.contiguous, fortran], ids=["C", "Fortran"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
def test_a_symmetric_product_reads_the_lower_triangle_only(dtype, tolerance, order, road):
    A, X = positive(30).to(dtype), order(gaussian(30, 4, dtype))
    above = torch.triu(torch.full_like(A, torch.nan), 1)
    found = kernels.symmetric_product(fortran(torch.tril(A) + above), X)
    assert found.dtype == dtype
    assert torch.allclose(found, A @ X, atol=tolerance)


WEIGHTS = {
    "gram-eigh": lambda: gaussian(90, 560),
    "gram-lanczos": lambda: gaussian(560, 560),
    "cholesky-qr2": lambda: with_spectrum(560, 560, cliff(560, 24, 1e6)),
    "svd": lambda: with_spectrum(90, 60, log(60, 1e8)),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_both_roads_lead_every_solver_to_the_same_ends(solver, monkeypatch):
    W = WEIGHTS[solver]()
    by_scipy = ends(W, 8)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    by_torch = ends(W, 8)
    assert by_scipy.solver == by_torch.solver == solver
    assert torch.allclose(by_scipy.S, by_torch.S, atol=1e-12 * by_scipy.sigma_max)
    assert distance(by_scipy.U, by_torch.U) <= 1e-6
    assert distance(by_scipy.V, by_torch.V) <= 1e-6


@pytest.mark.parametrize("k", [1, 5, 300, 600])
def test_a_matrix_is_kept_above_its_factor_and_can_be_restored(k, road):
    A = positive(k)
    G = fortran(torch.tril(A))
    diagonal = kernels.keep(G)
    assert kernels.factorise(G)
    assert torch.allclose(torch.tril(G) @ torch.tril(G).T, A, atol=1e-9)
    kernels.restore(G, diagonal + 1)
    assert torch.equal(torch.tril(G, -1), torch.tril(A, -1))
    assert torch.equal(G.diagonal(), diagonal + 1)
