"""`kasa inspect diff`."""

from collections.abc import Iterable

from kasa_cli.commands.arguments import PathLike, location, optional_path, target_patterns
from kasa_cli.commands.progress import Callback, watcher
from kasa_cli.pipeline.inspecting import run_diff as run
from kasa_cli.report import DiffReport


def inspect_diff(
    first: PathLike,
    second: PathLike,
    *,
    rank: int = 16,
    targets: str | Iterable[str] | None = None,
    excludes: str | Iterable[str] | None = None,
    targets_from: PathLike | None = None,
    revision: str | None = None,
    revision_b: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    workers: int = 0,
    threads_per_worker: int = 1,
    store: PathLike | None = None,
    no_store: bool = False,
    keep_going: bool = False,
    progress: Callback | None = None,
) -> DiffReport:
    """Compare two checkpoints of the same shapes, weight by weight.

    Each keyword is the option of `kasa inspect diff` of that name.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    return run.diff(
        (
            location(first, revision, cache_dir, local_files_only),
            location(second, revision_b, cache_dir, local_files_only),
        ),
        target_patterns(targets, excludes, targets_from),
        run.RunOptions(workers, threads_per_worker, "cpu", optional_path(store), not no_store, keep_going),
        rank,
        watcher(progress),
    )
