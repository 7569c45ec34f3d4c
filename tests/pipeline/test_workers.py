"""Several items at once within the memory budget; results in order; one failure stops the rest."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from kasa_cli.errors import IntegrityError, KasaError, NumericalError, ResourceError
from kasa_cli.pipeline import workers
from kasa_cli.pipeline.workers import BUDGET, Task, blas_threads, run, run_stage

BUDGETS = {
    "equal": [40] * 12,
    "falling": [90, 60, 50, 30, 30, 20, 10, 10, 5, 1],
    "one too large": [500, 100, 60, 60, 40, 1, 1],
    "all too large": [101, 102, 103],
    "large last": [1, 1, 1, 1, 99, 100],
    "for nothing": [0] * 8,
}


@dataclass
class Gauge:
    """A task that notes how many others run at the same time."""

    sizes: Sequence[int]
    pause: float = 0.004
    most: int = 0
    most_at_once: int = 0
    started: list[int] = field(default_factory=list)
    _now: list[int] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    overfull: list[list[int]] = field(default_factory=list)

    def __call__(self, index: int) -> int:
        with self._lock:
            self.started.append(index)
            self._now.append(self.sizes[index])
            self.most = max(self.most, sum(self._now))
            self.most_at_once = max(self.most_at_once, len(self._now))
            if sum(self._now) > 100 and len(self._now) > 1:
                self.overfull.append([*self._now])
        time.sleep(self.pause)
        with self._lock:
            self._now.remove(self.sizes[index])
        return index * index


def ignore(_: object) -> None:
    """Progress is not counted."""


@pytest.fixture
def hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BUDGET", 100)


@pytest.mark.usefixtures("hundred")
@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("case", BUDGETS)
def test_what_runs_at_once_never_exceeds_the_budget_unless_it_runs_alone(case: str, num_workers: int) -> None:
    sizes = BUDGETS[case]
    gauge, ended = Gauge(sizes), []
    results = run(gauge, range(len(sizes)), num_workers, ended.append, lambda index: sizes[index])
    assert results == [index * index for index in range(len(sizes))]
    assert gauge.overfull == []
    assert gauge.most_at_once <= num_workers
    assert sorted(ended) == sorted(gauge.started) == list(range(len(sizes)))


@pytest.mark.usefixtures("hundred")
def test_what_fits_the_budget_runs_at_once() -> None:
    """Each task waits for the other; alone, a task would wait for ever."""
    meeting = threading.Barrier(2, timeout=20)
    assert run(lambda _: meeting.wait() >= 0, [50, 50], 2, ignore, lambda size: size) == [True, True]


@pytest.mark.usefixtures("hundred")
def test_a_large_item_that_waits_is_not_overtaken() -> None:
    sizes = [60, 60, 1, 1, 1, 1]
    gauge = Gauge(sizes)
    run(gauge, range(6), 3, ignore, lambda index: sizes[index])
    assert gauge.started[:2] == [0, 1]


def test_without_sizes_only_the_number_of_workers_limits() -> None:
    gauge = Gauge([BUDGET] * 12, pause=0.02)
    run(gauge, range(12), 3, ignore)
    assert gauge.most_at_once == 3


# --- order ---


@pytest.mark.parametrize("num_workers", [1, 2, 8])
def test_results_are_in_the_order_of_the_items(num_workers: int) -> None:
    def late(index: int) -> int:
        time.sleep(0.02 if index % 3 == 0 else 0)
        return -index

    assert run(late, range(20), num_workers, ignore) == [-index for index in range(20)]


def test_one_worker_takes_one_item_after_the_other_and_is_counted_as_it_goes() -> None:
    events: list[str] = []
    run(lambda item: events.append(f"run {item}"), "abc", 1, lambda item: events.append(f"done {item}"))
    assert [event for event in events if event[0] == "r"] == ["run a", "run b", "run c"]
    assert events == ["run a", "done a", "run b", "done b", "run c", "done c"]


def test_no_items_have_no_results() -> None:
    assert run(abs, [], 4, ignore) == []


def test_every_item_is_counted_once_and_in_the_thread_of_the_caller() -> None:
    counted: list[tuple[int, threading.Thread]] = []
    run(abs, range(30), 4, lambda item: counted.append((item, threading.current_thread())))
    assert sorted(item for item, _ in counted) == list(range(30))
    assert {thread for _, thread in counted} == {threading.current_thread()}


# --- failures ---


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_first_failure_stops_the_rest(num_workers: int) -> None:
    started: list[int] = []

    def third_fails(index: int) -> int:
        started.append(index)
        if index == 2:
            raise IntegrityError("bad", "third")
        time.sleep(0.002)
        return index

    counted: list[int] = []
    with pytest.raises(IntegrityError, match="third"):
        run(third_fails, range(200), num_workers, counted.append)
    assert len(started) <= 2 + 3 * num_workers
    assert 2 not in counted


def test_a_failure_waits_for_what_is_still_written() -> None:
    """The caller may then close the files that other tasks write to."""
    begun, ended = threading.Event(), []

    def task(item: str) -> None:
        if item == "fails":
            assert begun.wait(20)
            raise IntegrityError("bad", item)
        begun.set()
        time.sleep(0.1)
        ended.append(item)

    with pytest.raises(IntegrityError):
        run(task, ["writes", "fails"], 2, ignore)
    assert ended == ["writes"]


def test_a_watcher_that_fails_stops_the_rest() -> None:
    gauge = Gauge([0] * 100)

    def broken(_: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(gauge, range(100), 2, broken)
    assert len(gauge.started) <= 4


def no_memory() -> None:
    raise MemoryError


def no_allocation() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


def no_convergence() -> None:
    raise torch.linalg.LinAlgError("linalg.eigh: failed to converge\n at some line of C++")


def refused() -> None:
    raise NumericalError("not finite", "w", "remedy")


@dataclass(frozen=True)
class Named:
    """An item with a name."""

    name: str


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (no_memory, ResourceError, "not enough memory: layer: use fewer --workers"),
        (no_allocation, ResourceError, "not enough memory: layer: use fewer --workers"),
        (no_convergence, NumericalError, "linalg.eigh: failed to converge: layer"),
        (refused, NumericalError, "not finite: w: remedy"),
    ],
)
def test_errors_of_memory_and_lapack_name_the_item(
    task: Callable[[], None], kind: type[KasaError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        run(lambda _: task(), [Named("layer")], 2, ignore)
    assert str(caught.value) == message


def test_a_bug_stays_a_bug() -> None:
    def bug(_: object) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(bug, [1], 2, ignore)


# --- threads ---


def test_tasks_run_without_gradients() -> None:
    assert run(lambda _: torch.is_inference_mode_enabled(), [1, 2], 2, ignore) == [True, True]


def test_the_number_of_blas_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), blas_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


# --- a stage ---


@dataclass
class Notes:
    """A watcher that notes its calls."""

    heard: list[tuple[object, ...]] = field(default_factory=list)

    def stage(self, title: str, num_items: int, work: float) -> None:
        self.heard.append((title, num_items, work))

    def finished(self, name: str, work: float) -> None:
        self.heard.append((name, work))


def fails_on(bad: int) -> Callable[[int], int]:
    def task(item: int) -> int:
        if item == bad:
            raise NumericalError("not finite", "")
        return item * 10

    return task


def test_a_stage_runs_the_largest_first_and_returns_results_in_the_order_of_the_items() -> None:
    notes = Notes()
    task = Task(fails_on(0), name=lambda item: f"item {item}", work=float)
    assert run_stage("measure", task, [2, 3, 1, 3], 1, notes) == [20, 30, 10, 30]
    finished = [("item 3", 3.0), ("item 3", 3.0), ("item 2", 2.0), ("item 1", 1.0)]
    assert notes.heard == [("measure", 4, 9.0), *finished]


def test_a_numerical_failure_stops_a_stage_unless_it_has_a_result_of_its_own() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        run_stage("measure", Task(fails_on(2), name=str), [1, 2, 3], 2, Notes())
    task = Task(fails_on(2), name=str, on_failure=lambda item, error: -item)
    assert run_stage("measure", task, [1, 2, 3], 2, Notes()) == [10, -2, 30]


def test_an_item_without_a_name_is_named_by_its_task() -> None:
    def no_room(_: tuple[int]) -> None:
        raise MemoryError

    with pytest.raises(ResourceError, match="not enough memory: item 7: use fewer --workers"):
        run_stage("write", Task(no_room, name=lambda item: f"item {item[0]}"), [(7,)], 1, Notes())
