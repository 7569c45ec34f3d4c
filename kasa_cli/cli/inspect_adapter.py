"""`kasa inspect adapter`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import (
    INPUT,
    BaseIs,
    CacheDir,
    Format,
    FormatOption,
    Json,
    LocalOnly,
    NoStore,
    Quiet,
    Revision,
    StoreOption,
    Threads,
    Verbose,
    Workers,
)
from kasa_cli.cli.output import answer

EXAMPLE = "Example: kasa inspect adapter my-adapter --base org/model"


def inspect_adapter(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="The adapter: a folder, or a file of lora-lite.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base: a directory or a Hub id. Some kinds of adapters need it.", rich_help_panel=INPUT
        ),
    ] = None,
    base_is: Annotated[
        BaseIs,
        typer.Option(
            help="KaSA only: whether BASE is the original or the truncated model. auto reads the manifests.",
            rich_help_panel=INPUT,
        ),
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
    """Measure an adapter: scaling, norm, singular values, diagonal, orthogonality, KaSA's penalties."""
    return answer("inspect_adapter", locals())
