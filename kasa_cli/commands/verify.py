"""`kasa verify`."""

from kasa_cli.commands.arguments import PathLike, location, path
from kasa_cli.commands.progress import Callback, watcher
from kasa_cli.pipeline.verifying import run
from kasa_cli.report import VerifyReport


def verify(
    output: PathLike,
    *,
    read_data: bool = False,
    against: PathLike | None = None,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    workers: int = 0,
    progress: Callback | None = None,
) -> VerifyReport:
    """Check an output against its manifest, and against its base. Nothing is written.

    Each keyword is the option of `kasa verify` of that name.

    Raises:
        IntegrityError: the first file or tensor that is missing, extra or altered.
        KasaError: another subclass that fits the failure.
    """
    base = location(against, revision, cache_dir, local_files_only) if against else None
    return run.verify(
        path(output), read_data=read_data, against=base, workers=workers, watcher=watcher(progress)
    )
