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
from kasa_cli.cli.output import show, watching
from kasa_cli.errors import ExitCode

EXAMPLE = "Example: kasa truncate org/model -o out -r 16 --rounding preserve"


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
        store=store,
        use_store=not no_store,
        overwrite=overwrite,
        restart=restart,
    )
    spelling = Format.JSON if json_format else output_format
    if dry_run:
        return show(verb.plan(where, options), spelling, quiet)
    with watching(quiet) as watcher:
        report = verb.truncate(where, output_dir, options, watcher)
    show(report, spelling, quiet)
    is_weak = strict and report.totals["below_min_realised"] > 0
    return ExitCode.BELOW_STANDARD if is_weak else ExitCode.DONE
