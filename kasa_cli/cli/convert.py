"""`kasa convert`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import (
    CHOICE,
    INPUT,
    BaseIs,
    BaseName,
    CacheDir,
    Config,
    DryRun,
    FlavourName,
    Format,
    FormatOption,
    FormName,
    Json,
    LocalOnly,
    NoStore,
    OutputOption,
    Overwrite,
    Quiet,
    Restart,
    Revision,
    StoreOption,
    Threads,
    Verbose,
    Workers,
)
from kasa_cli.cli.output import answer

EXAMPLE = "Example: kasa convert my-adapter --to lora --base org/model -o lora"


def convert(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="The adapter: a folder of PEFT or kasa, or a file of lora-lite."
        ),
    ],
    to: Annotated[
        FormName,
        typer.Option(help="Convert to a plain LoRA for PEFT and servers, or to a file of lora-lite."),
    ],
    base: Annotated[
        str,
        typer.Option(
            metavar="BASE", help="The model: a directory or a Hub id (org/name).", rich_help_panel=INPUT
        ),
    ],
    output: OutputOption,
    on: Annotated[
        BaseName,
        typer.Option(
            help="KaSA only: the base of the result. Its rank is r + t on the original, r on the truncated.",
            rich_help_panel=CHOICE,
        ),
    ] = BaseName.ORIGINAL,
    names: Annotated[
        FlavourName,
        typer.Option(
            help="Name the tensors by modules in memory (peft) or by tensors on disk.", rich_help_panel=CHOICE
        ),
    ] = FlavourName.PEFT,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep this many of the largest components of each update.", rich_help_panel=CHOICE
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Keep the fewest components that hold this share of Σσ².",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    pad_rank: Annotated[
        bool,
        typer.Option("--pad-rank", help="Pad the rank to one that servers accept.", rich_help_panel=CHOICE),
    ] = False,
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
            "--force-base", help="Accept a base that the adapter was not made for.", rich_help_panel=INPUT
        ),
    ] = False,
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
    """Convert an adapter into a plain LoRA that PEFT, vLLM and llama.cpp read, exactly or with the loss measured."""
    return answer("convert", locals())
