"""Reports the progress of a pipeline to a callback."""

from collections.abc import Callable
from dataclasses import replace

from kasa_cli.pipeline import Silent, Watcher
from kasa_cli.report import Progress

Callback = Callable[[Progress], None]
"""Receives a `Progress` when a stage begins and after each item, in the thread of the caller."""


class Reporting:
    """A watcher that calls a function."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._progress = Progress("", 0)
        self._work, self._work_done = 1.0, 0.0

    def stage(self, title: str, num_items: int, work: float) -> None:
        """Report that a stage begins."""
        self._work, self._work_done = work or 1.0, 0.0
        self._report(Progress(title, num_items))

    def finished(self, name: str, work: float) -> None:
        """Report that an item is done."""
        self._work_done += work
        done, fraction = self._progress.num_done + 1, self._work_done / self._work
        self._report(replace(self._progress, num_done=done, fraction=fraction, name=name))

    def _report(self, progress: Progress) -> None:
        self._progress = progress
        self._callback(progress)


def watcher(callback: Callback | None) -> Watcher:
    """A watcher that calls the callback, or none."""
    return Reporting(callback) if callback else Silent()
