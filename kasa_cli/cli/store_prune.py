"""`kasa store prune`."""

from typing import Annotated

import typer

from kasa_cli.cli.flags import Format, FormatOption, Json, Quiet, StoreOption, Verbose
from kasa_cli.cli.output import answer

EXAMPLE = "Example: kasa store prune --max-size 5GB --older-than 90d"


def store_prune(
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Remove the longest unused until the store fits this size, such as 5GB."
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Remove what was not used for this time, such as 90d or 12h."),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")
    ] = False,
    store: StoreOption = None,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Remove spectra from the store: the longest unused, the oldest, or all."""
    return answer("store_prune", locals())
