"""`kasa select-targets`."""

from collections.abc import Iterable
from typing import Any

from kasa_cli.commands.arguments import PathLike, location, optional_path, separated, target_patterns
from kasa_cli.commands.files import refuse_occupied, write_selection
from kasa_cli.commands.progress import Callback, watcher
from kasa_cli.pipeline.selecting import run
from kasa_cli.report import SelectReport


def select_targets(
    model: PathLike,
    *,
    output: PathLike | None = None,
    emit: str | None = None,
    overwrite: bool = False,
    top_p: float | None = None,
    num_modules: int | None = None,
    threshold: float | None = None,
    criterion: str = "kappa",
    prefer: str | None = None,
    rule: str = "peft",
    max_dim: int = 16384,
    per_type: bool = False,
    shape_fair: bool = False,
    match_budget: int | None = None,
    compare: str | Iterable[str] = "",
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
    keep_going: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> SelectReport | Any:
    """Rank the weights of a model by one figure of their spectra, and select the best as targets.

    Each keyword is the option of `kasa select-targets` of that name; without `output` no file is written. With
    `dry_run` the result is a `MeasurePlan`.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    file = optional_path(output)
    refuse_occupied(file, overwrite=overwrite)
    options = run.SelectRequest(
        amount=run.Amount(top_p, num_modules, threshold),
        criterion=criterion,
        prefer=prefer,
        rule=rule,
        max_dim=max_dim,
        per_type=per_type,
        shape_fair=shape_fair,
        match_budget=match_budget,
        compare=separated(compare),
        emit=emit,
    )
    case = (
        location(model, revision, cache_dir, local_files_only),
        options,
        target_patterns(targets, excludes, targets_from),
        run.RunOptions(workers, threads_per_worker, device, optional_path(store), not no_store, keep_going),
    )
    if dry_run:
        return run.plan(*case)
    report = run.select_targets(*case, watcher(progress))
    if file:
        write_selection(report, file)
    return report
