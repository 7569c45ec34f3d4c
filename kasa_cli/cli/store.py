"""`kasa store ls` and `kasa store prune`."""

from typing import Annotated

import typer

from kasa_cli.cli.flags import Format, FormatOption, Json, Quiet, StoreOption, Verbose
from kasa_cli.cli.output import num_bytes, num_days, show

app = typer.Typer(help="The store of measured spectra: list it, bound it.", no_args_is_help=True)


@app.command(epilog="Example: kasa store ls")
def ls(
    store: StoreOption = None,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """List the tensors whose spectra are remembered, the one used last first."""
    from kasa_cli.commands import store as verb

    return show(verb.ls(store), Format.JSON if json_format else output_format, quiet)


@app.command(epilog="Example: kasa store prune --max-size 5GB --older-than 90d")
def prune(
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Forget the longest unused until it fits, e.g. 5GB.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Forget what was not used for so long, e.g. 90d or 12h.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Forget everything.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreOption = None,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Forget spectra: the longest unused, the oldest, or all."""
    from kasa_cli.commands import store as verb

    report = verb.prune(
        store,
        max_bytes=num_bytes(max_size),
        max_days=num_days(older_than),
        everything=everything,
        dry_run=dry_run,
    )
    return show(report, Format.JSON if json_format else output_format, quiet)
