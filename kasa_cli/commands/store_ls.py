"""`kasa store ls`."""

from kasa_cli.commands.arguments import PathLike, optional_path
from kasa_cli.pipeline import store_contents
from kasa_cli.report import StoreReport


def store_ls(*, store: PathLike | None = None) -> StoreReport:
    """List the tensors whose spectra are in the store, the one used last first.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    return store_contents.ls(optional_path(store))
