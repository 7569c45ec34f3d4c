"""Progress of a run on the terminal, one line for each stage."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from kasa_cli.errors import printable
from kasa_cli.render.units import duration
from kasa_cli.report import Progress as Event

TITLES = {
    "measure": "measuring",
    "write": "writing base",
    "adapter": "writing adapter",
    "tail": "writing tail",
    "hash": "hashing",
    "copies": "comparing copies",
    "compare": "recomputing",
    "convert": "converting",
    "look": "looking",
}
NAME_WIDTH = 44


class TimeLeft(TextColumn):
    """Time left from the share of the work done: a wide layer counts for more than a narrow one."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The estimated time left, once part of the work is done."""
        fraction = task.fields["fraction"]
        if not fraction or task.elapsed is None or task.finished:
            return Text("")
        return Text(f"{duration(task.elapsed * (1 - fraction) / fraction)} left", "cyan")


class Live:
    """A callback for `progress=` that draws one line for each stage."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[rate]}", style="dim"),
            TimeLeft(),
            TextColumn("{task.fields[name]}", style="dim", markup=False),
            console=console,
        )
        self._task: TaskID | None = None
        self._started = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Begin a line, or advance the last one."""
        if self._task is None or not event.num_done:
            title = TITLES.get(event.stage, event.stage)
            self._task = self._progress.add_task(title, total=event.num_items, name="", rate="", fraction=0.0)
            self._started = time.monotonic()
            return
        rate = event.num_done / max(time.monotonic() - self._started, 1e-9)
        is_last = event.num_done >= event.num_items
        self._progress.update(
            self._task,
            completed=event.num_done,
            fraction=event.fraction,
            rate=f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each",
            name="" if is_last else _shortened(printable(event.name)),
        )


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"…{name[-NAME_WIDTH:]}"
