"""The command line: verbs in, exit codes out.

torch and transformers are imported inside the verbs, so that `--help` answers at once.
"""

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from kasa_cli import __version__
from kasa_cli.errors import ExitCode, KasaError, printable
from kasa_cli.flags import (
    MAX_WEIGHT,
    OUTPUT,
    CacheDir,
    Compat,
    Config,
    Device,
    DiagInit,
    DryRun,
    Dtype,
    Excludes,
    Format,
    FormatOption,
    Json,
    LocalOnly,
    ModelArgument,
    OutputOption,
    Overwrite,
    Quiet,
    Restart,
    Revision,
    RoundingName,
    Seed,
    Targets,
    TargetsFrom,
    Threads,
    Verbose,
    Workers,
)

if TYPE_CHECKING:
    from kasa_cli.pipeline.workers import Watcher
    from kasa_cli.report import Report

app = typer.Typer(
    help="Spectral surgery on Hugging Face checkpoints: offline KaSA, streamed, exact and verified.",
    epilog="Exit codes and every option: see docs/cli.md.",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, it is nothing that an `except Exception` may take for a failure."""


VERBOSE = re.compile(r"--verbose|-q*v[qv]*")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kasa {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hold the options that need no verb."""


@app.command(epilog="Example: kasa truncate org/model -o out -r 16 --rounding preserve")
def truncate(
    model: ModelArgument,
    output_dir: OutputOption,
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Adapter rank.")] = 16,
    truncation_rank: Annotated[
        int | None, typer.Option(min=0, help="Components dropped; default: the rank.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=MAX_WEIGHT, help="Default: twice the rank.")
    ] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank).")] = False,
    emit: Annotated[str, typer.Option(help="What to write, joined by commas.")] = "base,adapter,tail",
    dtype: Annotated[Dtype, typer.Option(help="Of the tensors operated on; auto keeps.")] = Dtype.AUTO,
    rounding: Annotated[
        RoundingName, typer.Option(help="preserve keeps the cut in half precision.")
    ] = RoundingName.NEAREST,
    min_realised: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the cut that must be left.")
    ] = 0.9,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 11 below --min-realised.")] = False,
    diag_init: Annotated[DiagInit, typer.Option(help="Start of the diagonal.")] = DiagInit.RANDN,
    beta: Annotated[float, typer.Option(min=0, max=MAX_WEIGHT, help="Weight of KaSA's L2 loss.")] = 1e-4,
    gamma: Annotated[float, typer.Option(min=0, max=MAX_WEIGHT, help="Weight of KaSA's L3 loss.")] = 1e-3,
    compat: Annotated[
        Compat, typer.Option(help="reference: the published code's in_features rule.")
    ] = Compat.PEFT,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help='Lay out shards anew, e.g. "5GB".', rich_help_panel=OUTPUT),
    ] = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    target: Targets = None,
    exclude: Excludes = None,
    targets_from: TargetsFrom = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    config: Config = None,
    workers: Workers = 0,
    threads_per_worker: Threads = 1,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Drop the smallest singular components; write base, fresh KaSA adapter and tail."""
    from kasa_cli.commands import truncate as verb

    where = verb.Where(model, revision, cache_dir, local_files_only)
    options = verb.Options(
        rank=rank,
        truncation_rank=truncation_rank,
        alpha=alpha,
        use_rslora=use_rslora,
        emit=tuple(part.strip() for part in emit.split(",") if part.strip()),
        dtype=dtype,
        rounding=rounding,
        min_realised=min_realised,
        diag_init=diag_init,
        beta=beta,
        gamma=gamma,
        compat=compat,
        max_shard_size=max_shard_size,
        patterns=verb.Patterns(tuple(target or ()), tuple(exclude or ())),
        targets_from=targets_from,
        seed=seed,
        workers=workers,
        threads_per_worker=threads_per_worker,
        device=device,
        overwrite=overwrite,
        restart=restart,
    )
    spelling = Format.JSON if json_format else output_format
    if dry_run:
        return _show(verb.plan(where, options), spelling, quiet)
    with _watching(quiet) as watcher:
        report = verb.truncate(where, output_dir, options, watcher)
    _show(report, spelling, quiet)
    is_weak = strict and report.totals["below_min_realised"] > 0
    return ExitCode.BELOW_STANDARD if is_weak else ExitCode.DONE


@app.command(epilog="Example: kasa verify out --read-data --against org/model")
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A directory that kasa wrote.")],
    read_data: Annotated[bool, typer.Option("--read-data", help="Hash every byte.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Recompute from the base and compare.")
    ] = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    workers: Workers = 0,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Check an output against its manifest, and against its base. Never writes."""
    from kasa_cli.commands import verify as verb

    base = verb.Where(against, revision, cache_dir, local_files_only) if against else None
    with _watching(quiet) as watcher:
        report = verb.verify(output, read_data=read_data, against=base, workers=workers, watcher=watcher)
    return _show(report, Format.JSON if json_format else output_format, quiet)


@app.command(epilog="Example: kasa demo -o kasa-demo")
def demo(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Must not exist, or be empty.")
    ] = Path("kasa-demo"),
    overwrite: Overwrite = False,
    workers: Workers = 0,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Walk the whole path on a small real model: plan, truncate, verify, load."""
    from kasa_cli.commands import demo as verb

    with _watching(quiet) as watcher:
        report = verb.demo(output_dir, overwrite=overwrite, workers=workers, watcher=watcher)
    return _show(report, Format.JSON if json_format else output_format, quiet)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code; every known error is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no κ shows how it is spelled
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _guarded(arguments)
    except KeyboardInterrupt:  # once more, while the first is being reported
        code = ExitCode.INTERRUPTED
    except Terminated:
        code = ExitCode.TERMINATED
    except SystemExit as leaving:  # rich's way to say that nobody reads the help any more
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
    except Exception as error:  # the last line of defence: a bug must not look like a result
        what = f"internal error: {type(error).__name__}: {error}: please report it, with --verbose"
        return _fail(what, ExitCode.INTERNAL, arguments)


def _run(arguments: list[str]) -> int:
    code = int(app(arguments, prog_name="kasa", standalone_mode=False) or 0)
    if code == ExitCode.INTERRUPTED:  # Typer's way to say that Ctrl-C was pressed
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
    """Typer's own errors in the words of kasa's: what, where, what to do."""
    describe: Callable[[], str] = getattr(error, "format_message", lambda: str(error))
    what = " ".join(describe().split()).removesuffix(".").replace("Value error, ", "")
    command = getattr(getattr(error, "ctx", None), "command_path", "kasa")
    return f"{what}: {command}: see {command} --help"


def _leave(code: int) -> NoReturn:
    """Leave at once: a thread deep in LAPACK cannot be asked to stop, and a crash is what staging is made for."""
    with suppress(OSError, KeyboardInterrupt, Terminated):
        typer.echo(nl=False)
        typer.echo(nl=False, err=True)
    os._exit(code)


def _terminate(*_: Any) -> NoReturn:
    raise Terminated


def _show(report: "Report", spelling: Format, quiet: bool) -> int:
    """The result to stdout, what is worth knowing about it to stderr."""
    from kasa_cli.render.formats import FORMATS

    typer.echo(FORMATS[spelling](report), color=True)
    for note in () if quiet else getattr(report, "notes", ()):
        typer.echo(f"note: {printable(note)}", err=True)
    return ExitCode.DONE


@contextmanager
def _watching(quiet: bool) -> Iterator["Watcher"]:
    """A live view on a terminal, silence elsewhere."""
    from kasa_cli.pipeline.workers import Silent

    if quiet or not sys.stderr.isatty() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield Silent()
        return
    from rich.console import Console

    from kasa_cli.render.progress import Live

    with Live(Console(stderr=True)) as live:
        yield live
