"""The flags that verbs share, each with its help, and the presets that fill them in.

The enums repeat the tables of `methods` and `linalg`, which `--help` must not import; a test compares them.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MAX_WEIGHT = 1e30
"""Largest loss weight accepted."""


class Format(StrEnum):
    """Format of the result on stdout."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"


class Dtype(StrEnum):
    """Dtype of the changed tensors."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class RoundingName(StrEnum):
    """How values are rounded to the stored dtype."""

    NEAREST = "nearest"
    PRESERVE = "preserve"


class DiagInit(StrEnum):
    """Initialisation of the diagonal."""

    RANDN = "randn"
    ONES = "ones"
    RESIDUAL = "residual"


class Compat(StrEnum):
    """Rule for the number of components kept."""

    PEFT = "peft"
    REFERENCE = "reference"


class CriterionName(StrEnum):
    """Figure that targets are ranked by."""

    KAPPA = "kappa"
    SNR = "snr"
    SNR_MP = "snr-mp"
    STABLE_RANK = "stable-rank"
    EFFECTIVE_RANK = "effective-rank"
    ALPHA = "alpha"


class Rule(StrEnum):
    """Definition of kappa."""

    PEFT = "peft"
    STRICT = "strict"


class End(StrEnum):
    """End of a criterion that is preferred."""

    LOW = "low"
    HIGH = "high"


class BaseIs(StrEnum):
    """Whether the base of a KaSA adapter is truncated."""

    AUTO = "auto"
    ORIGINAL = "original"
    TRUNCATED = "truncated"


class FormName(StrEnum):
    """Form of the converted adapter."""

    LORA = "lora"
    LORA_LITE = "lora-lite"


class BaseName(StrEnum):
    """One of KaSA's two bases."""

    ORIGINAL = "original"
    TRUNCATED = "truncated"


class FlavourName(StrEnum):
    """Naming of the tensors."""

    PEFT = "peft"
    DISK = "disk"


class EmitName(StrEnum):
    """Format of an exported selection."""

    NAMES = "names"
    PEFT = "peft"
    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"
    REGEX = "regex"


NOT_IN_PRESETS = ("config", "help", "verbose")


def _preset(context: typer.Context, path: Path | None) -> Path | None:
    """Set the defaults of a verb from a preset before its flags are read."""
    if path is not None:
        from kasa_cli.cli.presets import Option, load

        known = {
            flag.lstrip("-").replace("-", "_"): Option(parameter.name, parameter.multiple)
            for parameter in context.command.params
            for flag in parameter.opts
            if flag.startswith("--") and parameter.name and parameter.name not in NOT_IN_PRESETS
        }
        context.default_map = {**(context.default_map or {}), **load(path, known)}
    return path


INPUT, CHOICE, OUTPUT, RUN, ABOUT = "Model and targets", "Choice", "Output", "Run", "Reporting"

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="The model: a directory or a Hub id (org/name).")
]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output-dir",
        "-o",
        help="The output directory: new or empty.",
        rich_help_panel=OUTPUT,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Use this branch, tag or commit of the Hub repository.", rich_help_panel=INPUT),
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Keep Hub downloads in this folder.", rich_help_panel=INPUT)
]
LocalOnly = Annotated[
    bool,
    typer.Option(
        "--local-files-only", help="Use only files that are on this machine.", rich_help_panel=INPUT
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="PATTERN",
        help="Select the modules that match: a glob over full names, or a suffix.",
        rich_help_panel=INPUT,
    ),
]
Excludes = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", help="Leave out the modules that match.", rich_help_panel=INPUT
    ),
]
TargetsFrom = Annotated[
    Path | None,
    typer.Option(
        "--targets-from",
        help="Read the targets from the JSON that select-targets wrote.",
        rich_help_panel=INPUT,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Read options from a YAML preset; flags override it.",
        callback=_preset,
        is_eager=True,
        rich_help_panel=RUN,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        min=0, help="Work on this many matrices at once (0: the number of cores).", rich_help_panel=RUN
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        min=1,
        help="Use this many BLAS threads for each matrix; the output bytes depend on it.",
        rich_help_panel=RUN,
    ),
]
Device = Annotated[
    str, typer.Option(help="Decompose on this device: auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="Keep measured spectra in this folder (default KASA_STORE, else the user's cache).",
        rich_help_panel=RUN,
    ),
]
NoStore = Annotated[
    bool, typer.Option("--no-store", help="Neither use nor keep measured spectra.", rich_help_panel=RUN)
]
KeepGoing = Annotated[
    bool,
    typer.Option(
        "--keep-going",
        help="Skip and list weights that cannot be measured, and exit with 11.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the adapter's random initialisation.", rich_help_panel=RUN)]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an output directory that kasa wrote.", rich_help_panel=OUTPUT),
]
OverwriteFiles = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that exist.", rich_help_panel=OUTPUT)
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart", help="Discard what an interrupted run left, and begin again.", rich_help_panel=OUTPUT
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the plan: only headers are read, and nothing is written.",
        rich_help_panel=RUN,
    ),
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="Format of the result.", rich_help_panel=ABOUT)
]
Json = Annotated[bool, typer.Option("--json", help="Short for --format json.", rich_help_panel=ABOUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show neither progress nor notes.", rich_help_panel=ABOUT)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.", rich_help_panel=ABOUT)
]
