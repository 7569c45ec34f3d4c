"""Several tensors at once, one BLAS thread each: the bytes of a result do not depend on how many.

Threads suffice, for LAPACK and file reads let go of the interpreter; the main thread only waits, so that Ctrl-C
is answered at once.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

from kasa_cli.errors import KasaError, NumericalError, ResourceError, UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

LEAST_BUDGET = 1 << 30
BUDGET = max(LEAST_BUDGET, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
"""Bytes that the matrices in work may occupy together: a quarter of the machine."""


class Watcher(Protocol):
    """Who wants to know how far a run has come. Called from the main thread only."""

    def stage(self, title: str, num_items: int, work: float) -> None:
        """A stage of so many items, and of so much work in all, begins."""

    def finished(self, name: str, work: float) -> None:
        """An item is done."""


class Silent:
    """Nobody watches."""

    def stage(self, title: str, num_items: int, work: float) -> None:
        """Not shown."""

    def finished(self, name: str, work: float) -> None:
        """Not shown."""


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def blas_threads(number: int) -> Iterator[None]:
    """So many BLAS threads a matrix, in torch and in scipy, until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with threadpool_limits(limits=number):
            yield
    finally:
        torch.set_num_threads(before)


def run(
    task: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int,
    done: Callable[[Item], None],
    size: Callable[[Item], int] = lambda item: 0,
) -> list[Result]:
    """Results of the task for all items, in their order; the first failure stops the rest.

    `done` is called in this thread as each item ends. Large items should come first: one that would take the bytes
    in work, by `size`, over BUDGET waits until others have ended.

    Raises:
        ResourceError: there is not enough memory.
    """
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="kasa")
    results: dict[int, Result] = {}
    running: dict[Future[Result], int] = {}
    waiting = deque(range(len(items)))
    try:
        while waiting or running:
            room = BUDGET - sum(size(items[index]) for index in running.values())
            while waiting and len(running) < num_workers and (not running or size(items[waiting[0]]) <= room):
                room -= size(items[waiting[0]])
                index = waiting.popleft()
                running[pool.submit(_guarded, task, items[index])] = index
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                index = running.pop(future)
                results[index] = future.result()
                done(items[index])
        return [results[index] for index in range(len(items))]
    except Exception:
        # What a worker still writes to must not be closed under it. Ctrl-C alone does not wait.
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _guarded(task: Callable[[Item], Result], item: Item) -> Result:
    """Run a task, with the errors of memory and of LAPACK in kasa's own words."""
    try:
        with torch.inference_mode():
            return task(item)
    except KasaError:
        raise
    except torch.linalg.LinAlgError as error:
        is_overflow = "non-finite" in str(error)
        what = "numbers beyond float64 in a decomposition" if is_overflow else str(error).splitlines()[0]
        raise NumericalError(what, _name(item)) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ResourceError("not enough memory", _name(item), "use fewer --workers") from error


def _name(item: object) -> str:
    """What to call an item in an error; nothing, where only its whole content would say it."""
    name = getattr(item, "name", item)
    return name if isinstance(name, str) else ""


@dataclass(frozen=True)
class Running:
    """How a run is done: none of it but threads and device changes a figure. `workers` 0: the number of cores.

    `store` None is the default store; `use_store` False knows nothing from earlier runs and leaves nothing to later
    ones. `keep_going`: what cannot be measured is listed and left out.
    """

    workers: int = 0
    threads_per_worker: int = 1
    device: str = "auto"
    store: Path | None = None
    use_store: bool = True
    keep_going: bool = False

    @property
    def num_workers(self) -> int:
        """Matrices worked on at once."""
        return self.workers or num_cores()


def check_running(running: Running) -> None:
    """Refuse what no machine can do.

    Raises:
        UsageError: a number below zero.
    """
    if running.workers < 0 or running.threads_per_worker < 1:
        raise UsageError("workers and threads must be positive")
