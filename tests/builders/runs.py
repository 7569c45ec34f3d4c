"""Ways to run kasa from a test: in this process, in a new process, or in a fork that may be killed.

A new process spends seconds on importing torch and transformers; a fork of a server that holds them starts at once.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from kasa_cli.cli import app

ROOT = Path(__file__).parents[2]
TOKEN = "hf_CANARYcanaryCANARYcanaryCANARY"
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    [
        "kasa_cli.cli.app",
        "kasa_cli.commands.truncate",
        "kasa_cli.commands.verify",
        "kasa_cli.model_names.name_map",
        "tests.builders.runs",
    ]
)


class Ran(NamedTuple):
    """Exit code and output of a run."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=forbidden)


def forbidden(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def inside(capsys, *arguments: object) -> Ran:
    """Run in this process: everything but signals, the environment and the exit of the process."""
    capsys.readouterr()
    code = app._guarded([str(argument) for argument in arguments])
    return Ran(int(code), *capsys.readouterr())


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kasa_cli", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """The environment of the test, with a token that must not appear in any output."""
    return {**os.environ, "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), **changes}


def outside(
    *arguments: object, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None, **more
) -> Ran:
    """Run in a new process, as a user does."""
    done = subprocess.run(
        [*prefix, *command(*arguments)],
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,
    )
    assert TOKEN not in done.stdout + done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


def forked(log: Path, *arguments: object, pause: float = 0.0):
    """Start a run in a fork, slowed by `pause` at every decomposition and every sync of the disk."""
    given = [str(argument) for argument in arguments]
    process = forks.Process(target=_slowed, args=(str(log), pause, given, os.environ["KASA_STORE"]))
    process.start()
    return process


def finished(log: Path, *arguments: object, pause: float = 0.0) -> Ran:
    """Run in a fork and wait for its end."""
    process = forked(log, *arguments, pause=pause)
    process.join(120)
    assert process.exitcode is not None
    return Ran(process.exitcode, log.read_text(), log.with_suffix(".err").read_text())


def _slowed(log: str, pause: float, arguments: list[str], store: str) -> None:
    """The child process: the command line with its output in files; only its store differs from the server's."""
    os.environ["KASA_STORE"] = store
    for stream, name in ((1, log), (2, str(Path(log).with_suffix(".err")))):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
    if pause:
        from kasa_cli.pipeline.measuring import facts

        facts.ends_of, os.fsync = _after(pause, facts.ends_of), _after(pause / 4, os.fsync)
    app.main(arguments)


def _after(pause: float, function):
    def slow(*arguments):
        time.sleep(pause)
        return function(*arguments)

    return slow
