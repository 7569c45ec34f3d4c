"""`kasa demo`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import Format, FormatOption, Json, Overwrite, Quiet, Verbose, Workers
from kasa_cli.cli.output import answer
from kasa_cli.errors import printable

EXAMPLE = "Example: kasa demo -o kasa-demo"


def demo(
    output: Annotated[
        Path,
        typer.Option("--output-dir", "-o", help="The output directory: new or empty."),
    ] = Path("kasa-demo"),
    overwrite: Overwrite = False,
    workers: Workers = 0,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Run the whole path on a small real model: inspect, select, truncate, verify, merge, load."""
    code = answer("demo", locals())
    if not quiet:
        typer.echo(f"note: open {printable(str(output / 'spectra.html'))} in a browser", err=True)
    return code
