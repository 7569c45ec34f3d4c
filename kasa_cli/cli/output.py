"""What a command does with its report: the result to stdout, progress and notes to stderr."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import typer

import kasa_cli
from kasa_cli.cli.flags import Format
from kasa_cli.errors import BelowStandard, ExitCode, printable

if TYPE_CHECKING:
    from kasa_cli.commands.progress import Callback
    from kasa_cli.report import Report

ONLY_OF_COMMANDS = ("config", "output_format", "json_format", "quiet", "verbose")
"""Parameters of a command that its function does not have."""


def answer(verb: str, flags: Mapping[str, Any]) -> int:
    """Call the function of a verb with the flags of its command, and show its report; the exit code."""
    report, code = ask(verb, flags)
    show(report, spelling(flags), flags["quiet"])
    return code


def ask(verb: str, flags: Mapping[str, Any]) -> tuple[Any, int]:
    """The report of a verb, and the exit code."""
    function = getattr(kasa_cli, verb)
    keywords = {name: value for name, value in flags.items() if name not in ONLY_OF_COMMANDS}
    code = ExitCode.DONE
    with watching(flags["quiet"] or keywords.get("dry_run", False)) as progress:
        if "progress" in signature(function).parameters:
            keywords["progress"] = progress
        try:
            report = function(**keywords)
        except BelowStandard as error:
            report, code = error.report, error.exit_code
    is_incomplete = getattr(report, "totals", {}).get("unmeasured")
    return report, ExitCode.BELOW_STANDARD if is_incomplete else code


def spelling(flags: Mapping[str, Any]) -> Format:
    """The format of the result."""
    return Format.JSON if flags["json_format"] else Format(flags["output_format"])


def show(report: "Report", spelling: Format, quiet: bool) -> None:
    """Write the result to stdout and its notes to stderr."""
    from kasa_cli.render.formats import FORMATS

    typer.echo(FORMATS[spelling](report), color=True)
    show_notes(report, quiet)


def show_notes(report: "Report", quiet: bool) -> None:
    """Write the notes of a result to stderr."""
    for note in () if quiet else getattr(report, "notes", ()):
        typer.echo(f"note: {printable(note)}", err=True)


@contextmanager
def watching(quiet: bool) -> Iterator["Callback | None"]:
    """A callback that draws progress on a terminal; None elsewhere."""
    if quiet or not sys.stderr.isatty() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield None
        return
    from rich.console import Console

    from kasa_cli.render.progress import Live

    with Live(Console(stderr=True)) as live:
        yield live
