"""`python -m tests` runs everything and says what failed; with arguments, the tests that they name come first."""

from types import SimpleNamespace

import pytest

from tests import __main__ as command


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command with checks that only note their turn; mypy and pytest fail."""

    def run(*arguments):
        turns = []

        def fake(check, cwd):
            turns.append(check[2:])
            return SimpleNamespace(returncode=int(bool({"mypy", "pytest"} & {*check})))

        monkeypatch.setattr(command.subprocess, "run", fake)
        code = command.main([*arguments])
        return code, turns, capsys.readouterr().out.splitlines()[-1]

    return run


def test_without_arguments_all_tests_run_after_the_linters(run):
    code, turns, last = run()
    assert [turn[0] for turn in turns] == ["ruff", "ruff", "mypy", command.CONTRACT, "pytest"]
    assert (code, last) == (1, "failed: types, tests")


def test_with_arguments_the_tests_that_they_name_run_before_the_linters(run):
    code, turns, last = run("tests/linalg", "-k", "kappa")
    assert turns[0] == ["pytest", "tests/linalg", "-k", "kappa"]
    assert (code, len(turns), last) == (1, 5, "failed: tests, types")
