"""`kasa merge`."""

import os
from collections.abc import Iterable
from typing import Any

from kasa_cli.commands.arguments import PathLike, location, optional_path, path
from kasa_cli.commands.progress import Callback, watcher
from kasa_cli.pipeline.merging import run
from kasa_cli.report import MergeReport


def merge(
    adapters: PathLike | Iterable[PathLike],
    *,
    into: PathLike,
    output: PathLike,
    weights: Iterable[float] | None = None,
    base_is: str = "auto",
    force_base: bool = False,
    untie: bool = False,
    dtype: str = "auto",
    rounding: str = "nearest",
    max_shard_size: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    dry_run: bool = False,
    workers: int = 0,
    threads_per_worker: int = 1,
    store: PathLike | None = None,
    no_store: bool = False,
    progress: Callback | None = None,
) -> MergeReport | Any:
    """Merge adapters, in their order, into a copy of their base; each tensor is rounded once.

    Each keyword is the option of `kasa merge` of that name; `weights` has one number for each adapter. With `dry_run`
    the result is a `MergePlan`, and nothing is written. An interrupted call continues when it is repeated.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    case = (
        [path(adapter) for adapter in paths],
        location(into, revision, cache_dir, local_files_only),
        path(output),
        run.MergeRequest(
            weights=tuple(weights or ()),
            base_is=base_is,
            force_base=force_base,
            untie=untie,
            dtype=dtype,
            rounding=rounding,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            restart=restart,
        ),
        run.RunOptions(workers, threads_per_worker, "cpu", optional_path(store), not no_store),
    )
    return run.plan(*case) if dry_run else run.merge(*case, watcher(progress))
