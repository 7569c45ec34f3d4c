"""`kasa store ls`."""

from kasa_cli.cli.flags import Format, FormatOption, Json, Quiet, StoreOption, Verbose
from kasa_cli.cli.output import answer

EXAMPLE = "Example: kasa store ls"


def store_ls(
    store: StoreOption = None,
    output_format: FormatOption = Format.TABLE,
    json_format: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """List the tensors whose spectra are in the store, the one used last first."""
    return answer("store_ls", locals())
