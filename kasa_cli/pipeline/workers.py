"""Processes several tensors at once, each with its own BLAS threads; results do not depend on the number of workers.

Threads suffice: LAPACK and file reads release the interpreter. The main thread only waits, so Ctrl-C takes effect
immediately.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

from kasa_cli.errors import Interrupted, KasaError, NumericalError, ResourceError, UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

LEAST_BUDGET = 1 << 30
BUDGET = max(LEAST_BUDGET, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
"""Bytes that all running items may occupy together: a quarter of the machine's memory."""


class Watcher(Protocol):
    """Receives the progress of a run. Its methods are called from the main thread only."""

    def stage(self, title: str, num_items: int, work: float) -> None:
        """Called when a stage begins: its number of items and their total work."""

    def finished(self, name: str, work: float) -> None:
        """Called when an item is finished."""


class Silent:
    """A watcher that shows nothing."""

    def stage(self, title: str, num_items: int, work: float) -> None:
        """Does nothing."""

    def finished(self, name: str, work: float) -> None:
        """Does nothing."""


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def blas_threads(number: int) -> Iterator[None]:
    """Let torch and scipy use `number` BLAS threads for each matrix until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with threadpool_limits(limits=number):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Task(Generic[Item, Result]):
    """What a stage does to each item, and how an item is named and weighed.

    `work` orders the items and measures progress; `memory` is in bytes. `on_failure` turns the NumericalError of an
    item into its result; without it the first failure stops the stage.
    """

    run: Callable[[Item], Result]
    name: Callable[[Item], str]
    work: Callable[[Item], float] = lambda _: 1
    memory: Callable[[Item], int] = lambda _: 0
    on_failure: Callable[[Item, NumericalError], Result] | None = None

    def result(self, item: Item) -> Result:
        """The result for one item."""
        try:
            return self.run(item)
        except NumericalError as error:
            if self.on_failure is None:
                raise
            return self.on_failure(item, error)


def run_stage(
    title: str, task: Task[Item, Result], items: Sequence[Item], num_workers: int, watcher: Watcher
) -> list[Result]:
    """Run a task on all items, the largest first; the results are in the order of the items.

    Raises:
        ResourceError: there is not enough memory.
    """
    works = [task.work(item) for item in items]
    watcher.stage(title, len(items), sum(works))
    largest_first = sorted(range(len(items)), key=lambda index: -works[index])
    results = run(
        lambda index: task.result(items[index]),
        largest_first,
        num_workers,
        lambda index: watcher.finished(task.name(items[index]), works[index]),
        lambda index: task.memory(items[index]),
        lambda index: task.name(items[index]),
    )
    by_index = dict(zip(largest_first, results, strict=True))
    return [by_index[index] for index in range(len(items))]


def _name(item: object) -> str:
    """The name of an item in an error: its attribute `name`, the item itself if it is text, or an empty string."""
    name = getattr(item, "name", item)
    return name if isinstance(name, str) else ""


def run(
    task: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int,
    on_finished: Callable[[Item], None],
    memory: Callable[[Item], int] = lambda item: 0,
    name: Callable[[Item], str] = _name,
) -> list[Result]:
    """Start a task on the items in their order; the results are in that order. The first failure stops the rest.

    `on_finished` is called in this thread after each item. An item waits as long as the `memory` of all running items
    would exceed BUDGET with it; so large items should come first.

    Raises:
        ResourceError: there is not enough memory.
    """
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="kasa")
    results: dict[int, Result] = {}
    running: dict[Future[Result], int] = {}
    waiting = deque(range(len(items)))
    try:
        while waiting or running:
            room = BUDGET - sum(memory(items[index]) for index in running.values())
            while (
                waiting and len(running) < num_workers and (not running or memory(items[waiting[0]]) <= room)
            ):
                room -= memory(items[waiting[0]])
                index = waiting.popleft()
                running[pool.submit(_guarded, task, items[index], name(items[index]))] = index
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                index = running.pop(future)
                results[index] = future.result()
                on_finished(items[index])
        return [results[index] for index in range(len(items))]
    except Interrupted:
        raise
    except (Exception, KeyboardInterrupt):
        # The caller may close files that workers still write to, so wait for them. A process that ends does not wait.
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _guarded(task: Callable[[Item], Result], item: Item, name: str) -> Result:
    """Run a task; errors of memory and of LAPACK are raised again as kasa's errors, which name the item."""
    try:
        with torch.inference_mode():
            return task(item)
    except KasaError:
        raise
    except torch.linalg.LinAlgError as error:
        is_overflow = "non-finite" in str(error)
        problem = "numbers beyond float64 in a decomposition" if is_overflow else str(error).splitlines()[0]
        raise NumericalError(problem, name) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ResourceError("not enough memory", name, "use fewer --workers") from error


@dataclass(frozen=True)
class RunOptions:
    """Workers, threads, device and store of a run. Only threads and device can change a result.

    `workers` 0 is the number of cores. `store` None is the default store; with `use_store` False a run neither reads
    earlier results nor keeps its own. With `keep_going`, weights that cannot be measured are skipped and listed.
    """

    workers: int = 0
    threads_per_worker: int = 1
    device: str = "auto"
    store: Path | None = None
    use_store: bool = True
    keep_going: bool = False

    @property
    def num_workers(self) -> int:
        """Number of matrices processed at once."""
        return self.workers or num_cores()


def check_running(running: RunOptions) -> None:
    """Refuse numbers that are not whole, negative numbers of workers and fewer than one thread.

    Raises:
        UsageError: a number is out of range.
    """
    numbers = (running.workers, running.threads_per_worker)
    if {type(number) for number in numbers} != {int} or numbers[0] < 0 or numbers[1] < 1:
        raise UsageError(
            f"invalid workers {running.workers!r} or threads per worker {running.threads_per_worker!r}",
            "",
            "give a whole number of workers (0: the cores) and at least 1 thread",
        )
