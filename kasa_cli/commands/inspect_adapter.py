"""`kasa inspect adapter`."""

from kasa_cli.commands.arguments import PathLike, location, optional_path, path
from kasa_cli.commands.progress import Callback, watcher
from kasa_cli.pipeline.inspecting import run_adapter as run
from kasa_cli.report import AdapterReport


def inspect_adapter(
    adapter: PathLike,
    *,
    base: PathLike | None = None,
    base_is: str = "auto",
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    workers: int = 0,
    threads_per_worker: int = 1,
    store: PathLike | None = None,
    no_store: bool = False,
    progress: Callback | None = None,
) -> AdapterReport:
    """Measure what an adapter does to each weight, from its file and, where that is needed, from its base.

    Each keyword is the option of `kasa inspect adapter` of that name.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    where = None if base is None else location(base, revision, cache_dir, local_files_only)
    running = run.RunOptions(workers, threads_per_worker, "cpu", optional_path(store), not no_store)
    return run.adapter(path(adapter), where, base_is, running, watcher(progress))
