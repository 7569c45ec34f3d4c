"""`kasa truncate`."""

from typing import Annotated

import typer

from kasa_cli.cli.flags import (
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
    NoStore,
    OutputOption,
    Overwrite,
    Quiet,
    Restart,
    Revision,
    RoundingName,
    Seed,
    StoreOption,
    Targets,
    TargetsFrom,
    Threads,
    Verbose,
    Workers,
)
from kasa_cli.cli.output import answer

EXAMPLE = "Example: kasa truncate org/model -o out -r 16 --rounding preserve"


def truncate(
    model: ModelArgument,
    output: OutputOption,
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of the adapter.")] = 16,
    truncation_rank: Annotated[
        int | None, typer.Option(min=0, help="Drop this many components (default: the rank).")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0, max=MAX_WEIGHT, help="Scaling numerator of the adapter (default: twice the rank)."
        ),
    ] = None,
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="Scale the adapter by alpha / sqrt(rank).")
    ] = False,
    emit: Annotated[str, typer.Option(help="Write these parts, joined by commas.")] = "base,adapter,tail",
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the truncated tensors; auto keeps theirs.")
    ] = Dtype.AUTO,
    rounding: Annotated[
        RoundingName,
        typer.Option(help="How values are rounded; preserve keeps the truncation in half precision."),
    ] = RoundingName.NEAREST,
    min_realised: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of the truncation that rounding must leave.")
    ] = 0.9,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 11 if a tensor is below --min-realised.")
    ] = False,
    diag_init: Annotated[DiagInit, typer.Option(help="Initialisation of the diagonal.")] = DiagInit.RANDN,
    beta: Annotated[float, typer.Option(min=0, max=MAX_WEIGHT, help="Weight of KaSA's L2 loss.")] = 1e-4,
    gamma: Annotated[float, typer.Option(min=0, max=MAX_WEIGHT, help="Weight of KaSA's L3 loss.")] = 1e-3,
    compat: Annotated[
        Compat,
        typer.Option(
            help="Rule for the components kept; reference is the in_features rule of the published code."
        ),
    ] = Compat.PEFT,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="Write shards of at most this size, such as 5GB, instead of the model's own.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
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
    seed: Seed = 0,
    dry_run: DryRun = False,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Drop the smallest singular components; write the base, a fresh KaSA adapter and the tail."""
    return answer("truncate", locals())
