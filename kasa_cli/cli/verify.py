"""`kasa verify`."""

from pathlib import Path
from typing import Annotated

import typer

from kasa_cli.cli.flags import (
    CacheDir,
    Format,
    FormatOption,
    Json,
    LocalOnly,
    Quiet,
    Revision,
    Verbose,
    Workers,
)
from kasa_cli.cli.output import answer

EXAMPLE = "Example: kasa verify out --read-data --against org/model"


def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The directory that kasa wrote.")],
    read_data: Annotated[bool, typer.Option("--read-data", help="Hash every byte.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Recompute the truncation from this base, and compare.")
    ] = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    workers: Workers = 0,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Check an output against its manifest and its base. Nothing is written."""
    return answer("verify", locals())
