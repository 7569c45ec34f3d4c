"""`kasa inspect spectrum`, `kasa inspect adapter` and `kasa inspect diff`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import (
    INPUT,
    OUTPUT,
    BaseIs,
    CacheDir,
    Config,
    Device,
    DryRun,
    Excludes,
    Format,
    FormatOption,
    Json,
    KeepGoing,
    LocalOnly,
    ModelArgument,
    NoStore,
    OverwriteFiles,
    Quiet,
    Revision,
    StoreOption,
    Targets,
    TargetsFrom,
    Threads,
    Verbose,
    Workers,
)
from kasa_cli.cli.output import publish, refuse_occupied, show, watching
from kasa_cli.errors import ExitCode

app = typer.Typer(
    help="Look: at the spectra of a checkpoint, at an adapter, at the change between two checkpoints.",
    no_args_is_help=True,
)


@app.command(epilog="Example: kasa inspect spectrum org/model --html spectra.html")
def spectrum(
    model: ModelArgument,
    html: Annotated[
        Path | None, typer.Option(help="One self-contained page to write.", rich_help_panel=OUTPUT)
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for pictures.", rich_help_panel=OUTPUT)
    ] = None,
    values: Annotated[
        Path | None,
        typer.Option(help="All singular values, as a safetensors file.", rich_help_panel=OUTPUT),
    ] = None,
    overwrite: OverwriteFiles = False,
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
    store: StoreOption = None,
    no_store: NoStore = False,
    keep_going: KeepGoing = False,
    dry_run: DryRun = False,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Measure all singular values: condition, ranks, noise edge, tail; as table, page or picture."""
    refuse_occupied(html, values, overwrite=overwrite, folder=png)
    from kasa_cli.commands import inspect_spectrum as verb

    where = verb.Where(model, revision, cache_dir, local_files_only)
    patterns = verb.patterns(target, exclude, targets_from)
    running = verb.Running(workers, threads_per_worker, device, store, not no_store, keep_going)
    spelling = Format.JSON if json_format else output_format
    if dry_run:
        return show(verb.plan(where, patterns, running), spelling, quiet)
    with watching(quiet) as watcher:
        report = verb.spectrum(where, patterns, running, values, watcher)
        publish(report, html, png)
    show(report, spelling, quiet)
    return ExitCode.BELOW_STANDARD if report.totals["unmeasured"] else ExitCode.DONE


@app.command(epilog="Example: kasa inspect adapter my-adapter --base org/model")
def adapter(
    path: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder, or a lora-lite file.")],
    base: Annotated[
        str | None,
        typer.Option(help="A directory, or a Hub id: for kinds that change it.", rich_help_panel=INPUT),
    ] = None,
    base_is: Annotated[
        BaseIs, typer.Option(help="Of KaSA: auto asks the manifests.", rich_help_panel=INPUT)
    ] = BaseIs.AUTO,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    workers: Workers = 0,
    threads_per_worker: Threads = 1,
    store: StoreOption = None,
    no_store: NoStore = False,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Look at an adapter: scaling, norm, singular values, diagonal, orthogonality, KaSA's penalties and cut."""
    from kasa_cli.commands import inspect_adapter as verb

    where = verb.Where(base, revision, cache_dir, local_files_only) if base is not None else None
    running = verb.Running(workers, threads_per_worker, "cpu", store, not no_store)
    with watching(quiet) as watcher:
        report = verb.adapter(path, where, base_is, running, watcher)
    return show(report, Format.JSON if json_format else output_format, quiet)


@app.command(epilog="Example: kasa inspect diff org/base org/chat")
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A directory, or a Hub id: the base.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another of the same shapes.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the subspaces compared at either end.")] = 16,
    target: Targets = None,
    exclude: Excludes = None,
    targets_from: TargetsFrom = None,
    revision: Revision = None,
    revision_b: Annotated[
        str | None, typer.Option("--revision-b", help="Branch, tag or commit of B.", rich_help_panel=INPUT)
    ] = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    workers: Workers = 0,
    threads_per_worker: Threads = 1,
    store: StoreOption = None,
    no_store: NoStore = False,
    keep_going: KeepGoing = False,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Compare two checkpoints: distances, spectra, angles between subspaces, new dominant directions."""
    from kasa_cli.commands import inspect_diff as verb

    with watching(quiet) as watcher:
        report = verb.diff(
            (
                verb.Where(first, revision, cache_dir, local_files_only),
                verb.Where(second, revision_b, cache_dir, local_files_only),
            ),
            verb.patterns(target, exclude, targets_from),
            verb.Running(workers, threads_per_worker, "cpu", store, not no_store, keep_going),
            rank,
            watcher,
        )
    show(report, Format.JSON if json_format else output_format, quiet)
    return ExitCode.BELOW_STANDARD if report.totals["unmeasured"] else ExitCode.DONE
