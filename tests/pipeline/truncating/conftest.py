"""Fixtures of the tests of truncation."""

import pytest

from tests.builders import tiny_models


@pytest.fixture
def llama():
    """A checkpoint that all tests share."""
    return tiny_models.saved("llama")
