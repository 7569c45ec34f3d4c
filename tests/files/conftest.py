"""Fixtures of the tests of files."""

import pytest


@pytest.fixture
def output(tmp_path):
    """The path of an output that is not there yet."""
    return tmp_path / "OUT"
