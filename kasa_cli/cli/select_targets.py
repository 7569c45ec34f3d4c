"""`kasa select-targets`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import (
    CHOICE,
    OUTPUT,
    CacheDir,
    Config,
    CriterionName,
    Device,
    DryRun,
    EmitName,
    End,
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
    Rule,
    StoreOption,
    Targets,
    TargetsFrom,
    Threads,
    Verbose,
    Workers,
)
from kasa_cli.cli.output import ask, show, show_notes

EXAMPLE = "Example: kasa select-targets org/model --top-p 0.2 --emit peft -o lora.json"


def select_targets(
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the export, or without --emit the JSON, to this file.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    emit: Annotated[
        EmitName | None,
        typer.Option(
            metavar="KIND",
            help=f"Export the selection, tested on the model: {', '.join(EmitName)}.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: OverwriteFiles = False,
    top_p: Annotated[
        float | None,
        typer.Option(help="Select this fraction of the candidates (default 0.2).", rich_help_panel=CHOICE),
    ] = None,
    num_modules: Annotated[
        int | None, typer.Option(help="Select this many candidates.", rich_help_panel=CHOICE)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Select the candidates up to this score, inclusive.", rich_help_panel=CHOICE),
    ] = None,
    criterion: Annotated[
        CriterionName,
        typer.Option(
            metavar="CRITERION",
            help=f"Rank by this figure: {', '.join(CriterionName)}.",
            rich_help_panel=CHOICE,
        ),
    ] = CriterionName.KAPPA,
    prefer: Annotated[
        End | None,
        typer.Option(
            help="Prefer low or high scores (default: the criterion's own).", rich_help_panel=CHOICE
        ),
    ] = None,
    rule: Annotated[
        Rule, typer.Option(help="kappa only: as KappaTune in PEFT, or σ₁/σₖ itself.", rich_help_panel=CHOICE)
    ] = Rule.PEFT,
    max_dim: Annotated[
        int, typer.Option(min=1, help="Leave out weights with a longer side.", rich_help_panel=CHOICE)
    ] = 16384,
    per_type: Annotated[
        bool, typer.Option("--per-type", help="Rank within each module type.", rich_help_panel=CHOICE)
    ] = False,
    shape_fair: Annotated[
        bool,
        typer.Option(
            "--shape-fair",
            help="Divide the score by that of a random matrix of the same shape.",
            rich_help_panel=CHOICE,
        ),
    ] = False,
    match_budget: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            min=1,
            help="Find the rank that trains as many parameters as RANK on all candidates.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    compare: Annotated[
        str, typer.Option(help="Compare with these criteria, joined by commas.", rich_help_panel=CHOICE)
    ] = "",
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
    """Rank weights by their spectra (KappaTune, Spectrum, …), and select the best for fine-tuning."""
    report, code = ask("select_targets", locals())
    has_text = not dry_run and report.emission is not None
    if has_text and output is None and output_format is Format.TABLE and not json_format:
        typer.echo(report.emission.text.rstrip("\n"))
        show_notes(report, quiet)
    else:
        show(report, Format.JSON if json_format else output_format, quiet)
    return code
