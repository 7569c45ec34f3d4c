"""`kasa merge`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import (
    INPUT,
    OUTPUT,
    BaseIs,
    CacheDir,
    Config,
    DryRun,
    Dtype,
    Format,
    FormatOption,
    Json,
    LocalOnly,
    NoStore,
    OutputOption,
    Overwrite,
    Quiet,
    Restart,
    Revision,
    RoundingName,
    StoreOption,
    Threads,
    Verbose,
    Workers,
)
from kasa_cli.cli.output import answer

EXAMPLE = "Example: kasa merge my-adapter --into org/model -o merged"


def merge(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER …", help="Adapters: folders, or files of lora-lite.")
    ],
    into: Annotated[
        str,
        typer.Option(
            "--into",
            metavar="BASE",
            help="The model: a directory or a Hub id (org/name).",
            rich_help_panel=INPUT,
        ),
    ],
    output: OutputOption,
    weights: Annotated[
        list[float] | None,
        typer.Option(
            "--weight", help="Weight of an adapter, once for each (default 1).", rich_help_panel=INPUT
        ),
    ] = None,
    base_is: Annotated[
        BaseIs,
        typer.Option(
            help="KaSA only: whether BASE is the original or the truncated model. auto reads the manifests.",
            rich_help_panel=INPUT,
        ),
    ] = BaseIs.AUTO,
    force_base: Annotated[
        bool,
        typer.Option(
            "--force-base", help="Merge into a base that the adapter was not made for.", rich_help_panel=INPUT
        ),
    ] = False,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Write tied weights apart where an adapter changes only one of them.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the changed tensors; auto keeps theirs.")
    ] = Dtype.AUTO,
    rounding: Annotated[
        RoundingName,
        typer.Option(help="How values are rounded; preserve keeps the update in half precision."),
    ] = RoundingName.NEAREST,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="Write shards of at most this size, such as 5GB, instead of the model's own.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    config: Config = None,
    dry_run: DryRun = False,
    workers: Workers = 0,
    threads_per_worker: Threads = 1,
    store: StoreOption = None,
    no_store: NoStore = False,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Merge adapters into their base, one tensor at a time, each rounded once; without PEFT."""
    return answer("merge", locals())
