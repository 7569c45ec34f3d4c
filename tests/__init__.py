"""Tests, in folders of the names of the packages that they test."""

import pytest

pytest.register_assert_rewrite("tests.builders")
