"""`kasa inspect spectrum`."""

from collections.abc import Iterable
from typing import Any

from kasa_cli.commands.arguments import PathLike, location, optional_path, target_patterns
from kasa_cli.commands.files import refuse_occupied, write_page, write_pictures
from kasa_cli.commands.progress import Callback, watcher
from kasa_cli.pipeline.inspecting import run_spectrum as run
from kasa_cli.report import SpectrumReport


def inspect_spectrum(
    model: PathLike,
    *,
    html: PathLike | None = None,
    png: PathLike | None = None,
    values: PathLike | None = None,
    overwrite: bool = False,
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
) -> SpectrumReport | Any:
    """Measure all singular values of the linear weights of a model, or of those that the targets name.

    Each keyword is the option of `kasa inspect spectrum` of that name; without `html`, `png` and `values` no file is
    written. With `dry_run` the result is a `MeasurePlan`.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    page, pictures, file = (optional_path(value) for value in (html, png, values))
    refuse_occupied(page, file, overwrite=overwrite, folder=pictures)
    case = (
        location(model, revision, cache_dir, local_files_only),
        target_patterns(targets, excludes, targets_from),
        run.RunOptions(workers, threads_per_worker, device, optional_path(store), not no_store, keep_going),
    )
    if dry_run:
        return run.plan(*case)
    report = run.spectrum(*case, file, watcher(progress))
    if page:
        write_page(report, page)
    if pictures:
        write_pictures(report, pictures)
    return report
