"""`kasa truncate`."""

from collections.abc import Iterable
from typing import Any

from kasa_cli.commands.arguments import (
    PathLike,
    location,
    optional_path,
    path,
    separated,
    sequence,
)
from kasa_cli.commands.progress import Callback, watcher
from kasa_cli.errors import BelowStandard
from kasa_cli.pipeline.truncating import run
from kasa_cli.report import TruncateReport
from kasa_cli.targets import Patterns


def truncate(
    model: PathLike,
    output: PathLike,
    *,
    rank: int = 16,
    truncation_rank: int | None = None,
    alpha: float | None = None,
    use_rslora: bool = False,
    emit: str | Iterable[str] = "base,adapter,tail",
    dtype: str = "auto",
    rounding: str = "nearest",
    min_realised: float = 0.9,
    strict: bool = False,
    diag_init: str = "randn",
    beta: float = 1e-4,
    gamma: float = 1e-3,
    compat: str = "peft",
    max_shard_size: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    targets: str | Iterable[str] | None = None,
    excludes: str | Iterable[str] | None = None,
    targets_from: PathLike | None = None,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    workers: int = 0,
    threads_per_worker: int = 1,
    device: str = "auto",
    store: PathLike | None = None,
    no_store: bool = False,
    seed: int = 0,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> TruncateReport | Any:
    """Drop the smallest singular components of a model; write the base, a fresh KaSA adapter and the tail.

    Each keyword is the option of `kasa truncate` of that name. With `dry_run` the result is a `PlanReport`, and
    nothing is written. An interrupted call continues when it is repeated.

    Raises:
        KasaError: a subclass that fits the failure.
        BelowStandard: the output is complete, but `strict` asks for more; its `report` is the result.
    """
    where = location(model, revision, cache_dir, local_files_only)
    options = run.TruncateRequest(
        rank=rank,
        truncation_rank=truncation_rank,
        alpha=alpha,
        use_rslora=use_rslora,
        emit=separated(emit),
        dtype=dtype,
        rounding=rounding,
        min_realised=min_realised,
        diag_init=diag_init,
        beta=beta,
        gamma=gamma,
        compat=compat,
        max_shard_size=max_shard_size,
        patterns=Patterns(sequence(targets), sequence(excludes)),
        targets_from=optional_path(targets_from),
        seed=seed,
        workers=workers,
        threads_per_worker=threads_per_worker,
        device=device,
        store=optional_path(store),
        use_store=not no_store,
        overwrite=overwrite,
        restart=restart,
    )
    if dry_run:
        return run.plan(where, options)
    report = run.truncate(where, path(output), options, watcher(progress))
    if strict and report.totals["below_min_realised"]:
        number = report.totals["below_min_realised"]
        problem = f"{number} tensors realise less than {min_realised} of the truncation"
        raise BelowStandard(problem, str(output), "use --rounding preserve or a wider --dtype", report)
    return report
