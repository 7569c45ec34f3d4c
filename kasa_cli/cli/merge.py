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
from kasa_cli.cli.output import show, watching

EXAMPLE = "Example: kasa merge my-adapter --into org/model -o merged"


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER …", help="Folders, or lora-lite files.")],
    base: Annotated[
        str,
        typer.Option(
            "--into", metavar="BASE", help="A directory, or a Hub id (org/name).", rich_help_panel=INPUT
        ),
    ],
    output_dir: OutputOption,
    weight: Annotated[
        list[float] | None, typer.Option(help="Once per adapter; default: 1.", rich_help_panel=INPUT)
    ] = None,
    base_is: Annotated[
        BaseIs, typer.Option(help="Of KaSA: auto asks the manifests.", rich_help_panel=INPUT)
    ] = BaseIs.AUTO,
    force_base: Annotated[
        bool,
        typer.Option("--force-base", help="Merge into a base it was not made for.", rich_help_panel=INPUT),
    ] = False,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="When an adapter changes one end of tied weights: write both ends.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the tensors changed; auto keeps.")] = Dtype.AUTO,
    rounding: Annotated[
        RoundingName, typer.Option(help="preserve keeps the update in half precision.")
    ] = RoundingName.NEAREST,
    max_shard_size: Annotated[
        str | None, typer.Option(help='Lay out shards anew, e.g. "5GB".', rich_help_panel=OUTPUT)
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
    from kasa_cli.commands import merge as verb

    options = verb.Options(
        weights=tuple(weight or ()),
        base_is=base_is,
        force_base=force_base,
        untie=untie,
        dtype=dtype,
        rounding=rounding,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        restart=restart,
    )
    where = verb.Where(base, revision, cache_dir, local_files_only)
    running = verb.Running(workers, threads_per_worker, "cpu", store, not no_store)
    spelling = Format.JSON if json_format else output_format
    if dry_run:
        return show(verb.plan(adapters, where, output_dir, options, running), spelling, quiet)
    with watching(quiet) as watcher:
        report = verb.merge(adapters, where, output_dir, options, running, watcher)
    return show(report, spelling, quiet)
