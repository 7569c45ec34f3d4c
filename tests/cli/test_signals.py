"""Signals and closed streams: the process ends within a second, prints one line at most, and keeps finished work."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.builders.runs import command, environment, forked, inside

SLEEPY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from kasa_cli.cli import app as cli
from kasa_cli.pipeline.measuring import facts
facts.ends_of = lambda *_: time.sleep(60)
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_answered_within_a_second(model, tmp_path, capsys, sent, code):
    arguments = ["truncate", str(model), "-o", str(tmp_path / "OUT"), "-r", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPY, *arguments],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(tmp_path / "OUT.kasa-partial" / "parts", process.poll)
    begun = time.monotonic()
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 1.5
    assert (process.returncode, out) == (code, "")
    assert re.fullmatch(r"kasa: (interrupted|terminated): run the same command again to go on\n", err)
    assert [path.name for path in tmp_path.iterdir()] == ["OUT.kasa-partial"]
    assert inside(capsys, *arguments).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_impatient_user_sees_no_traceback_either(model, tmp_path, sent):
    process = forked(tmp_path / "log", "truncate", model, "-o", tmp_path / "OUT", "-r", 2, pause=60)
    wait_for(tmp_path / "OUT.kasa-partial", lambda: process.exitcode)
    for _ in range(5):
        with suppress(ProcessLookupError):
            os.kill(process.pid, sent)
    process.join(20)
    assert process.exitcode == 128 + sent
    assert "Traceback" not in (tmp_path / "log.err").read_text()


def wait_for(path, ended):
    while not path.exists():
        assert ended() is None
        time.sleep(0.02)
    time.sleep(0.3)


@pytest.mark.parametrize("arguments", [["--help"], ["truncate", "--help"], ["--version"]])
def test_a_reader_who_leaves_is_no_error(arguments):
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(20)) == (b"", 0)
    process.stderr.close()


def test_streams_that_are_full_or_closed_leave_no_traceback():
    for redirection, code in ((">/dev/full", 8), (">&-", 0), (">&- 2>&-", 0)):
        script = f'exec "$@" {redirection}'
        done = subprocess.run(
            ["sh", "-c", script, "sh", *command("--version")],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, len(done.stderr.splitlines())) == (code, code // 8)
        assert "Traceback" not in done.stderr
