"""The flags of the command line, each with its help: what the verbs share, and how presets fill them in.

The choices spell out the tables of the maths, for `--help` must not import them; a test holds the two together.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MAX_WEIGHT = 1e30
"""Of a loss: beyond it, infinity among them, nothing trains."""


class Format(StrEnum):
    """How results are spelled on stdout."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"


class Dtype(StrEnum):
    """Dtype of the tensors operated on."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class RoundingName(StrEnum):
    """How sums are rounded to the stored dtype."""

    NEAREST = "nearest"
    PRESERVE = "preserve"


class DiagInit(StrEnum):
    """Start of the diagonal."""

    RANDN = "randn"
    ONES = "ones"
    RESIDUAL = "residual"


class Compat(StrEnum):
    """Whose rule says how many components are kept."""

    PEFT = "peft"
    REFERENCE = "reference"


class CriterionName(StrEnum):
    """What targets are ranked by."""

    KAPPA = "kappa"
    SNR = "snr"
    SNR_MP = "snr-mp"
    STABLE_RANK = "stable-rank"
    EFFECTIVE_RANK = "effective-rank"
    ALPHA = "alpha"


class Rule(StrEnum):
    """Whose kappa."""

    PEFT = "peft"
    STRICT = "strict"


class End(StrEnum):
    """Which end of a criterion is chosen."""

    LOW = "low"
    HIGH = "high"


class BaseIs(StrEnum):
    """What the base of a KaSA adapter is."""

    AUTO = "auto"
    ORIGINAL = "original"
    TRUNCATED = "truncated"


class FormName(StrEnum):
    """What an adapter is converted to."""

    LORA = "lora"
    LORA_LITE = "lora-lite"


class BaseName(StrEnum):
    """Which of KaSA's two bases."""

    ORIGINAL = "original"
    TRUNCATED = "truncated"


class FlavourName(StrEnum):
    """Whose names the tensors have."""

    PEFT = "peft"
    DISK = "disk"


class EmitName(StrEnum):
    """Spelling of a choice for those who train on it."""

    NAMES = "names"
    PEFT = "peft"
    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"
    REGEX = "regex"


NOT_IN_PRESETS = ("config", "help", "verbose")


def _preset(context: typer.Context, path: Path | None) -> Path | None:
    """Take the defaults of a verb from a preset, before its flags are read."""
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

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a Hub id (org/name).")]
OutputOption = Annotated[
    Path, typer.Option("--output-dir", "-o", help="Must not exist, or be empty.", rich_help_panel=OUTPUT)
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=INPUT)
]
CacheDir = Annotated[Path | None, typer.Option(help="Cache of Hub downloads.", rich_help_panel=INPUT)]
LocalOnly = Annotated[
    bool, typer.Option("--local-files-only", help="Never ask the Hub.", rich_help_panel=INPUT)
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="PATTERN", help="Glob over module names, or a suffix.", rich_help_panel=INPUT
    ),
]
Excludes = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Leave these out.", rich_help_panel=INPUT),
]
TargetsFrom = Annotated[
    Path | None, typer.Option("--targets-from", help="JSON with target_modules.", rich_help_panel=INPUT)
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="A YAML preset; flags win.", callback=_preset, is_eager=True, rich_help_panel=RUN
    ),
]
Workers = Annotated[int, typer.Option(min=0, help="Matrices at once; 0: the cores.", rich_help_panel=RUN)]
Threads = Annotated[
    int, typer.Option(min=1, help="BLAS threads a matrix; bytes depend on it.", rich_help_panel=RUN)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="Where measured spectra are kept; default: KASA_STORE, or the user's cache.",
        rich_help_panel=RUN,
    ),
]
NoStore = Annotated[
    bool, typer.Option("--no-store", help="Use and leave no measured spectra.", rich_help_panel=RUN)
]
KeepGoing = Annotated[
    bool, typer.Option("--keep-going", help="List what cannot be measured, and exit 11.", rich_help_panel=RUN)
]
Seed = Annotated[int, typer.Option(help="Of the adapter's random start.", rich_help_panel=RUN)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output of kasa.", rich_help_panel=OUTPUT)
]
OverwriteFiles = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that exist.", rich_help_panel=OUTPUT)
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Throw away what an interrupted run left.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only the plan; reads headers, writes nothing.", rich_help_panel=RUN)
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="Spelling of the result.", rich_help_panel=ABOUT)
]
Json = Annotated[bool, typer.Option("--json", help="Short for --format json.", rich_help_panel=ABOUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.", rich_help_panel=ABOUT)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.", rich_help_panel=ABOUT)
]
