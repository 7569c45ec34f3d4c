"""`kasa demo`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import Format, FormatOption, Json, Overwrite, Quiet, Verbose, Workers
from kasa_cli.cli.output import publish, show, watching
from kasa_cli.errors import ExitCode, printable

EXAMPLE = "Example: kasa demo -o kasa-demo"


def demo(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Must not exist, or be empty.")
    ] = Path("kasa-demo"),
    overwrite: Overwrite = False,
    workers: Workers = 0,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Walk the whole path on a small real model: inspect, select, truncate, verify, merge, load."""
    from kasa_cli.commands import demo as verb

    with watching(quiet) as watcher:
        report = verb.demo(output_dir, overwrite=overwrite, workers=workers, watcher=watcher)
        publish(report.spectrum, output_dir / "spectra.html", None)
    show(report, Format.JSON if json_format else output_format, quiet)
    if not quiet:
        typer.echo(f"note: open {printable(str(output_dir / 'spectra.html'))} in a browser", err=True)
    return ExitCode.DONE
