"""Angles between subspaces against scipy, and against bases turned by known angles."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from kasa_cli.linalg.subspaces import best_cosines, principal_angles
from tests.builders.matrices import gaussian, orthonormal


@pytest.mark.parametrize(("n", "t"), [(40, 6), (40, 20), (40, 30), (6, 6), (9, 1)])
def test_angles_are_scipys(n: int, t: int) -> None:
    X, Y = orthonormal(n, t), orthonormal(n, t, seed=7)
    theirs = scipy.linalg.subspace_angles(X.numpy(), Y.numpy())[::-1]
    assert np.abs(principal_angles(X, Y).numpy() - theirs).max() < 1e-7
    large = theirs > 1e-3
    assert np.abs(principal_angles(X, Y).numpy() - theirs)[large].max(initial=0) < 1e-13


@pytest.mark.parametrize(
    "angle", [0.0, 1e-12, 1e-9, 1e-5, 0.3, 0.78, 0.79, 1.2, math.pi / 2 - 1e-9, math.pi / 2]
)
def test_a_basis_turned_by_an_angle_is_at_that_angle(angle: float) -> None:
    Q, R = orthonormal(30, 6), orthonormal(3, 3, seed=5)
    given = torch.tensor([angle / 2, angle / 2, angle], dtype=torch.float64)
    X, Z = Q[:, :3], Q[:, 3:]
    Y = (X * given.cos() + Z * given.sin()) @ R
    assert (principal_angles(X, Y) - given).abs().max() < 4e-15


def test_angles_ascend_and_do_not_depend_on_order_or_bases() -> None:
    X, Y, R = orthonormal(50, 5), orthonormal(50, 5, seed=2), orthonormal(5, 5, seed=3)
    angles = principal_angles(X, Y)
    assert bool((angles[1:] >= angles[:-1]).all())
    assert torch.allclose(principal_angles(Y, X @ R), angles, atol=1e-13)


def test_best_cosines_are_numpys_whatever_the_signs() -> None:
    X, Y = (torch.nn.functional.normalize(gaussian(20, n, seed=n), dim=0) for n in (4, 9))
    right = np.abs(X.numpy().T @ Y.numpy()).max(axis=1)
    assert np.abs(best_cosines(X, -Y).numpy() - right).max() < 1e-15


def test_no_cosine_is_above_one_by_roundoff() -> None:
    X = torch.nn.functional.normalize(gaussian(20, 50), dim=0)
    assert float((X.T @ X).max()) > 1
    assert bool((best_cosines(X, X) <= 1).all())


def test_an_intruder_is_no_direction_of_the_base() -> None:
    Q = orthonormal(30, 8)
    mixed = (Q[:, 0] - Q[:, 1]) / math.sqrt(2)
    X = torch.stack([-Q[:, 2], mixed, Q[:, 7]], dim=1)
    expected = torch.tensor([1, math.sqrt(0.5), 0], dtype=torch.float64)
    assert torch.allclose(best_cosines(X, Q[:, :7]), expected, atol=1e-14)
    assert float(best_cosines(X, Q).max()) <= 1
