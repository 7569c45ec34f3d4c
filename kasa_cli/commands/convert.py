"""`kasa convert`."""

from typing import Any

from kasa_cli.commands.arguments import PathLike, location, optional_path, path
from kasa_cli.commands.progress import Callback, watcher
from kasa_cli.pipeline.converting import run
from kasa_cli.report import ConvertReport


def convert(
    adapter: PathLike,
    *,
    to: str,
    base: PathLike,
    output: PathLike,
    on: str = "original",
    names: str = "peft",
    rank: int | None = None,
    energy: float | None = None,
    pad_rank: bool = False,
    base_is: str = "auto",
    force_base: bool = False,
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
) -> ConvertReport | Any:
    """Convert an adapter into a plain LoRA, exactly, or with the loss measured.

    Each keyword is the option of `kasa convert` of that name. With `dry_run` the result is a `ConvertPlan`, and
    nothing is written. An interrupted call continues when it is repeated.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    case = (
        path(adapter),
        location(base, revision, cache_dir, local_files_only),
        path(output),
        run.ConvertRequest(
            to=to,
            on=on,
            names=names,
            rank=rank,
            energy=energy,
            pad_rank=pad_rank,
            base_is=base_is,
            force_base=force_base,
            overwrite=overwrite,
            restart=restart,
        ),
        run.RunOptions(workers, threads_per_worker, "cpu", optional_path(store), not no_store),
    )
    return run.plan(*case) if dry_run else run.convert(*case, watcher(progress))
