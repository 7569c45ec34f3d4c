"""The command line: verbs in, exit codes out.

torch and transformers are imported inside the verbs, so that `--help` answers at once.
"""

import gc
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from kasa_cli import VERBS, __version__, function_name
from kasa_cli.errors import ExitCode, Interrupted, KasaError, printable

app = typer.Typer(
    help="Spectral surgery on Hugging Face checkpoints: offline KaSA, streamed, exact and verified.",
    epilog="Exit codes and every option: see docs/cli.md.",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it is not an Exception, so that no handler of failures catches it."""


COLLECT_EVERY = 10_000
"""New objects between two runs of the garbage collector. torch and transformers make a million objects that stay;
with Python's default of 700 the collector takes a quarter of the start."""
VERBOSE = re.compile(r"--verbose|-q*v[qv]*")


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"kasa {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options without a verb."""


GROUPS = {
    "inspect": "Inspect the spectra of a checkpoint, an adapter, or the change between two checkpoints.",
    "store": "List or bound the store of measured spectra.",
}


def _register() -> None:
    """Add the verbs in the order of the table; a verb of two words belongs to a group."""
    groups: dict[str, typer.Typer] = {"": app}
    for verb in VERBS:
        group, _, name = verb.rpartition(" ")
        if group not in groups:
            groups[group] = typer.Typer(help=GROUPS[group], no_args_is_help=True)
            app.add_typer(groups[group], name=group)
        module = import_module(f"kasa_cli.cli.{function_name(verb)}")
        groups[group].command(name, epilog=module.EXAMPLE)(getattr(module, function_name(verb)))


_register()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code; every known error is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    gc.set_threshold(COLLECT_EVERY)
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without κ shows its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _guarded(arguments)
    except KeyboardInterrupt:  # a second Ctrl-C, while the first is reported
        code = ExitCode.INTERRUPTED
    except Terminated:
        code = ExitCode.TERMINATED
    except SystemExit as leaving:  # rich exits so when the reader of the help has gone
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        code = ExitCode.DONE
    _leave(code)


def _guarded(arguments: list[str]) -> int:
    """The exit code of a run."""
    try:
        return _run(arguments)
    except KasaError as error:
        return _fail(error, error.exit_code, arguments)
    except TyperException as error:
        return _fail(_one_line(error), ExitCode.USAGE, arguments)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted: run the same command again to go on", ExitCode.INTERRUPTED, arguments)
    except Terminated:
        return _fail("terminated: run the same command again to go on", ExitCode.TERMINATED, arguments)
    except BrokenPipeError:
        return ExitCode.DONE
    except (OSError, MemoryError) as error:
        return _fail(_resource(error), ExitCode.RESOURCE, arguments)
    except Exception as error:  # a bug must not look like a result
        problem = f"internal error: {type(error).__name__}: {error}: please report it, with --verbose"
        return _fail(problem, ExitCode.INTERNAL, arguments)


def _run(arguments: list[str]) -> int:
    code = int(app(arguments, prog_name="kasa", standalone_mode=False) or 0)
    if code == ExitCode.INTERRUPTED:  # Typer returns this code after Ctrl-C
        raise KeyboardInterrupt
    return code


def _fail(error: object, code: ExitCode, arguments: list[str]) -> int:
    if any(VERBOSE.fullmatch(argument) for argument in arguments):
        import traceback

        for line in traceback.format_exc().splitlines():
            typer.echo(printable(line), err=True)
    typer.echo(f"kasa: {printable(str(error))}", err=True)
    return code


def _resource(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}: use fewer --workers"
    return f"{error.strerror or error}: {error.filename or 'the result'}: check disk and permissions"


def _one_line(error: TyperException) -> str:
    """An error of Typer in the form of kasa's: what, where, what to do."""
    describe: Callable[[], str] = getattr(error, "format_message", lambda: str(error))
    problem = " ".join(describe().split()).removesuffix(".").replace("Value error, ", "")
    command = getattr(getattr(error, "ctx", None), "command_path", "kasa")
    return f"{problem}: {command}: see {command} --help"


def _leave(code: int) -> NoReturn:
    """Exit at once: a thread in LAPACK cannot be stopped, and staging survives a crash."""
    with suppress(OSError, KeyboardInterrupt, Terminated):
        typer.echo(nl=False)
        typer.echo(nl=False, err=True)
    os._exit(code)


def _interrupt(*_: Any) -> NoReturn:
    raise Interrupted


def _terminate(*_: Any) -> NoReturn:
    raise Terminated
