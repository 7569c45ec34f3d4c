"""Fixtures of the tests of the command line."""

import shutil

import pytest


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the model, to change at will."""
    return shutil.copytree(model, tmp_path / "model")
