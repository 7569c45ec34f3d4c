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
    """Drop the smallest singular components; write base, fresh KaSA adapter and tail."""
    return answer("truncate", locals())
