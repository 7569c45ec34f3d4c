"""`kasa inspect diff`."""

from typing import Annotated

import typer

from kasa_cli.cli.flags import (
    INPUT,
    CacheDir,
    Excludes,
    Format,
    FormatOption,
    Json,
    KeepGoing,
    LocalOnly,
    NoStore,
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

EXAMPLE = "Example: kasa inspect diff org/base org/chat"


def inspect_diff(
    first: Annotated[str, typer.Argument(metavar="A", help="The first model: a directory or a Hub id.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The second model, of the same shapes.")],
    rank: Annotated[
        int,
        typer.Option(min=1, help="Rank of the subspaces that are compared at either end of the spectrum."),
    ] = 16,
    targets: Targets = None,
    excludes: Excludes = None,
    targets_from: TargetsFrom = None,
    revision: Revision = None,
    revision_b: Annotated[
        str | None,
        typer.Option("--revision-b", help="Use this branch, tag or commit of B.", rich_help_panel=INPUT),
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
    return answer("inspect_diff", locals())
