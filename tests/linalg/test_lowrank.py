"""The SVD of a product of factors, against that of the dense product by numpy."""

import numpy as np
import pytest
import torch

from kasa_cli.linalg.lowrank import svd_of_product


@pytest.mark.parametrize(("o", "i", "r"), [(40, 24, 4), (24, 40, 4), (32, 32, 6), (5, 40, 9), (40, 3, 9)])
def test_values_and_product_are_those_of_the_dense_svd(o, i, r):
    generator = torch.Generator().manual_seed(o * i)
    L = torch.randn(o, r, generator=generator, dtype=torch.float64)
    R = torch.randn(r, i, generator=generator, dtype=torch.float64)
    U, S, V = svd_of_product(L, R)
    p = min(o, i, r)
    assert (U.shape, S.shape, V.shape) == ((o, p), (p,), (i, p))
    dense = (L @ R).numpy()
    np.testing.assert_allclose(S.numpy(), np.linalg.svd(dense, compute_uv=False)[:p], rtol=1e-12)
    np.testing.assert_allclose(((U * S) @ V.T).numpy(), dense, atol=1e-12 * np.abs(dense).max())
    for basis in (U, V):
        np.testing.assert_allclose((basis.T @ basis).numpy(), np.eye(p), atol=1e-12)


def test_rank_deficient_and_zero_factors():
    L = torch.ones(6, 3, dtype=torch.float64)
    R = torch.ones(3, 4, dtype=torch.float64)
    S = svd_of_product(L, R)[1]
    assert float(S[0]) == pytest.approx(3 * 24**0.5) and float(S[1:].max()) < 1e-12
    assert not svd_of_product(torch.zeros_like(L), R)[1].any()
