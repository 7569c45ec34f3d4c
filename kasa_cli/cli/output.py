"""What a verb does with its results: to stdout, progress and notes to stderr, pages and pictures to files."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kasa_cli.cli.flags import Format
from kasa_cli.errors import ExitCode, OutputExists, UsageError, printable

if TYPE_CHECKING:
    from kasa_cli.pipeline.workers import Watcher
    from kasa_cli.report import Report, SelectReport, SpectrumReport


def show(report: "Report", spelling: Format, quiet: bool) -> int:
    """The result to stdout, what is worth knowing about it to stderr."""
    from kasa_cli.render.formats import FORMATS

    typer.echo(FORMATS[spelling](report), color=True)
    notes(report, quiet)
    return ExitCode.DONE


def notes(report: "Report", quiet: bool) -> None:
    """What is worth knowing about a result."""
    for note in () if quiet else getattr(report, "notes", ()):
        typer.echo(f"note: {printable(note)}", err=True)


@contextmanager
def watching(quiet: bool) -> Iterator["Watcher"]:
    """A live view on a terminal, silence elsewhere."""
    from kasa_cli.pipeline.workers import Silent

    if quiet or not sys.stderr.isatty() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield Silent()
        return
    from rich.console import Console

    from kasa_cli.render.progress import Live

    with Live(Console(stderr=True)) as live:
        yield live


def refuse_occupied(*files: Path | None, overwrite: bool, folder: Path | None = None) -> None:
    """Refuse, before the work, a file that is there or cannot be, and a folder that is none.

    Raises:
        OutputExists: something is there, and not to be replaced.
        UsageError: there is no folder to put it in.
    """
    for path in files:
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError("no such folder", str(path.parent), "make it first")
        if path is None or not os.path.lexists(path):
            continue
        if path.is_symlink() or not path.is_file():
            raise OutputExists("not a file, and not overwritten", str(path), "choose another")
        if not overwrite:
            raise OutputExists(
                "the output exists", str(path), "choose another, or replace it with --overwrite"
            )
    if folder is not None and os.path.lexists(folder) and not folder.is_dir():
        raise OutputExists("not a folder", str(folder), "choose another")


def publish(report: "SpectrumReport", html: Path | None, png: Path | None) -> None:
    """Write the page and the pictures of a report."""
    from kasa_cli.files.durable import make_folder, write_file

    if html:
        from kasa_cli.render import page

        write_file(html, [page.html(report).encode()])
    if png:
        from kasa_cli.render import pictures

        make_folder(png)
        for name, content in pictures.pictures(report).items():
            write_file(png / name, [content])


def hand_off(report: "SelectReport", output: Path | None, spelling: Format, quiet: bool) -> bool:
    """Write the hand-off, or without one the JSON, to a file; without a file the hand-off is the result.

    Whether that was all there is to show.
    """
    from kasa_cli.files.durable import write_file
    from kasa_cli.render.formats import as_json

    text = report.emission.text if report.emission else None
    if output:
        write_file(output, [(text if text is not None else as_json(report)).rstrip("\n").encode() + b"\n"])
        return False
    if text is None or spelling is not Format.TABLE:
        return False
    typer.echo(text.rstrip("\n"))
    notes(report, quiet)
    return True


SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
DAYS = {"d": 1.0, "h": 1 / 24, "w": 7.0}


def num_bytes(text: str | None) -> int | None:
    """A size as bytes.

    >>> num_bytes("1.5 GB"), num_bytes(None)
    (1500000000, None)

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if not match:
        raise UsageError(f"no size: {text!r}", "--max-size", "give one such as 5GB or 500MB")
    return int(float(match[1]) * SIZES[match[2]])


def num_days(text: str | None) -> float | None:
    """A time span in days.

    >>> num_days("36h"), num_days("2w")
    (1.5, 14.0)

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([dhw])", text.strip().lower())
    if not match:
        raise UsageError(f"no time span: {text!r}", "--older-than", "give one such as 90d or 12h")
    return float(match[1]) * DAYS[match[2]]
