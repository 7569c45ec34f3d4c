"""One run at a time builds an output, and others report which process holds it."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from kasa_cli.errors import Locked
from kasa_cli.files.lock import RunLock
from kasa_cli.files.staging import Staging
from tests.builders.runs import ROOT


def enter(output, **options):
    with Staging(output, fingerprint={}, **options):
        pass


HOLDER = """
import sys
from pathlib import Path
from kasa_cli.files.staging import Staging
with Staging(Path(sys.argv[1]), fingerprint={}):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_run(output):
    command = [sys.executable, "-c", HOLDER, str(output)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("restart", [False, True])
def test_a_second_run_is_refused_at_once_with_the_name_of_the_first(output, restart):
    staging = output.with_name("OUT.kasa-partial")
    with another_run(output) as first:
        before = sorted(staging.iterdir())
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(Locked, match=rf"pid {first.pid} on .* since 2"):
                enter(output, restart=restart)
        assert time.monotonic() - started < 1
        assert sorted(staging.iterdir()) == before


def test_the_lock_of_a_killed_run_is_free(output):
    with another_run(output) as first:
        first.kill()
        first.wait()
        with Staging(output, fingerprint={}) as staging:
            assert staging.resumed


def test_two_runs_of_one_process_exclude_each_other(output):
    with Staging(output, fingerprint={}), pytest.raises(Locked, match=f"pid {os.getpid()}"):
        enter(output)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(output, monkeypatch):
    guards, signed = RunLock._guards, []

    def guards_too_late(lock):
        if not signed:
            lock.path.unlink()
        signed.append(lock)
        return guards(lock)

    monkeypatch.setattr(RunLock, "_guards", guards_too_late)
    with Staging(output, fingerprint={}):
        assert len(signed) == 2
        with pytest.raises(Locked):
            enter(output)
