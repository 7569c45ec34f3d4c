"""`kasa inspect spectrum`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import (
    OUTPUT,
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
from kasa_cli.cli.output import answer

EXAMPLE = "Example: kasa inspect spectrum org/model --html spectra.html"


def inspect_spectrum(
    model: ModelArgument,
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained page to this file.", rich_help_panel=OUTPUT)
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write pictures to this folder.", rich_help_panel=OUTPUT),
    ] = None,
    values: Annotated[
        Path | None,
        typer.Option(help="Write all singular values to this safetensors file.", rich_help_panel=OUTPUT),
    ] = None,
    overwrite: OverwriteFiles = False,
    targets: Targets = None,
    excludes: Excludes = None,
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
    """Measure all singular values: condition, ranks, noise edge, tail; as a table, page or pictures."""
    return answer("inspect_spectrum", locals())
