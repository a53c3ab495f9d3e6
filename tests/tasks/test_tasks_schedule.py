"""The order in which tasks start, on a clock of the test's own: no processes, no waiting."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from shardwise.tasks.backend import Backend, Event, Order, Reply, Worker
from shardwise.tasks.engine import Engine
from shardwise.tasks.need import Allocation, Capacity
from shardwise.tasks.options import Options
from shardwise.tasks.wire import Payload

CLOCK = [0.0]
"""What the engine takes for the time."""


class Clocked(Worker):
    """A worker whose tasks take what the test says, on the backend's clock."""

    def __init__(self, backend: ClockedBackend) -> None:
        self.backend = backend
        self.queue: list[int] = []

    def send(self, orders: Sequence[Order]) -> bool:
        for order in orders:
            if not self.queue:
                self.backend.began[order.number] = self.backend.now
            self.queue.append(order.number)
        return True

    def recall(self) -> list[int]:
        taken, self.queue[1:] = self.queue[1:], []
        return taken

    def current(self) -> tuple[int, float] | None:
        return (self.queue[0], self.backend.began[self.queue[0]]) if self.queue else None

    def where(self) -> str:
        return ""

    def kill(self) -> None:
        raise AssertionError("nothing is killed here")

    def resident_bytes(self) -> int:
        return 0


class ClockedBackend(Backend):
    """Moves its clock to the next end of a task at every wait."""

    def __init__(self, capacity: Capacity, seconds: dict[int, float]) -> None:
        self._capacity = capacity
        self.seconds = seconds
        self.began: dict[int, float] = {}
        self.now = CLOCK[0] = 0.0
        self.workers: list[Clocked] = []
        self.most = 0.0

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def open(self, allocation: Allocation) -> Worker:
        worker = Clocked(self)
        self.workers.append(worker)
        return worker

    def release(self, worker: Worker) -> None:
        assert isinstance(worker, Clocked)
        self.workers.remove(worker)

    def wait(self, timeout_seconds: float | None) -> list[Event]:
        busy = [worker for worker in self.workers if worker.queue]
        if not busy:
            return []
        first = min(busy, key=lambda worker: self.began[worker.queue[0]] + self.seconds[worker.queue[0]])
        number = first.queue.pop(0)
        self.now = CLOCK[0] = self.began[number] + self.seconds[number]
        if first.queue:
            self.began[first.queue[0]] = self.now
        return [Reply(first, number, ("done",), self.seconds[number], None, (), Payload(b""))]

    def wake(self) -> None:
        raise AssertionError("one thread")

    def close(self) -> None:
        self.workers.clear()


def makespan(capacity: Capacity, tasks: Sequence[tuple[float, Options]], *, known: bool = True) -> float:
    """Seconds until all tasks have ended, each given its length and its options."""
    backend = ClockedBackend(capacity, {number: seconds for number, (seconds, _) in enumerate(tasks, start=1)})
    engine = Engine(backend)
    ended = []
    for seconds, options in tasks:
        engine.submit(
            len,
            lambda: Payload(b""),
            lambda task, ending: ended.append(task),
            name="task",
            options=options,
            expected=seconds if known else None,
        )
    while engine.busy:
        engine.step(None)
    assert len(ended) == len(tasks)
    return backend.now


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: CLOCK[0])


def test_uneven_tasks_end_within_five_per_cent_of_the_bound() -> None:
    chance = random.Random(1)
    for workers in (2, 4, 8):
        for _ in range(20):
            lengths = [chance.lognormvariate(0, 1) for _ in range(15 * workers)]
            bound = max(sum(lengths) / workers, max(lengths))
            took = makespan(Capacity(workers), [(seconds, Options()) for seconds in lengths])
            assert bound * (1 - 1e-9) <= took <= bound * 1.05


def test_the_longest_comes_first_only_where_lengths_are_known() -> None:
    """The planted fault: the same tasks without their lengths take longer than the bound allows."""
    tasks = [(1.0, Options())] * 10 + [(10.0, Options())]
    assert makespan(Capacity(2), tasks) == 10.0
    assert makespan(Capacity(2), tasks, known=False) == 15.0


def test_tasks_of_different_widths_pack() -> None:
    chance = random.Random(2)
    for _ in range(10):
        tasks = [(chance.uniform(1, 5), Options(cores=chance.choice([1, 1, 1, 2, 4]))) for _ in range(80)]
        area = sum(seconds * options.cores for seconds, options in tasks) / 4
        assert makespan(Capacity(4), tasks) <= area * 1.15


def test_a_wide_task_is_not_starved_by_narrow_ones() -> None:
    backend_tasks = [(1.0, Options())] * 40 + [(1.0, Options(cores=2, priority=1))]
    backend = ClockedBackend(Capacity(2), dict.fromkeys(range(1, 43), 1.0))
    engine = Engine(backend)
    order: list[int] = []
    for _, options in backend_tasks[:2]:
        engine.submit(len, lambda: Payload(b""), lambda task, _: order.append(task.number), name="t", options=options)
    engine.step(None)  # two narrow ones run, then the wide one arrives
    for _, options in backend_tasks[2:]:
        engine.submit(len, lambda: Payload(b""), lambda task, _: order.append(task.number), name="t", options=options)
    while engine.busy:
        engine.step(None)
    assert order.index(41) <= 12
    assert len(order) == 41


def test_tokens_limit_without_holding_up_others() -> None:
    tokens = Capacity(4, tokens={"licences": 1})
    limited = [(1.0, Options(tokens={"licences": 1}))] * 5
    free = [(1.0, Options())] * 15
    assert makespan(tokens, limited + free) == 5.0
