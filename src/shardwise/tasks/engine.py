"""The engine: starts ready tasks on workers as resources allow, hears how they end, and blames the right one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

from shardwise.errors import RunFailed
from shardwise.tasks import wire
from shardwise.tasks.alone import Alone
from shardwise.tasks.backend import Backend, Death, Order, Reply, Worker
from shardwise.tasks.need import Allocation, Free
from shardwise.tasks.options import Options
from shardwise.tasks.outcome import TaskFailure
from shardwise.tasks.ready import Group, Ready, Statistics
from shardwise.tasks.task import Ending, Place, Task, lost_too_often, why_it_died, why_it_failed
from shardwise.tasks.wire import Payload
from shardwise.units import format_bytes, format_seconds

QUEUE_SECONDS = 0.02
"""Work that lies ready at a worker, so that it need not wait for the scheduler between short tasks."""

MESSAGE_SECONDS = 0.001
"""Work that is sent in one message, where tasks are shorter."""

MOST_QUEUED = 512
MOST_IN_MESSAGE = 64

MEMORY_CHECK_SECONDS = 0.5
STEAL_SECONDS = 0.005
"""A worker that is so long in one task gives what lies ready at it to idle ones."""

MOST_LOSSES = 5
"""How often a task may be lost through no fault of its own before it counts as failed."""


@final
class Engine:
    """Runs tasks on a backend. Everything happens inside `step`, in the thread that calls it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.free = Free(backend.capacity)
        self.ready = Ready()
        self.places: dict[Worker, Place] = {}
        self._number = 0
        self._functions: dict[int, tuple[Callable[..., Any], Statistics]] = {}
        self._next_memory_check = 0.0
        self._endings: deque[tuple[Task, Ending]] = deque()
        self._alone = Alone()

    # What there is to do

    def submit(
        self,
        function: Callable[..., Any],
        make: Callable[[], Payload],
        sink: Callable[[Task, Ending], None],
        *,
        name: str,
        options: Options,
        inputs: tuple[tuple[int, Payload], ...] = (),
        expected: float | None = None,
    ) -> Task:
        """A task whose inputs are there.

        Raises:
            UserError: it asks for more than there is.
        """
        with self._alone:
            need = options.need
            group = self.ready.group(id(function), need)
            if group is None:
                self.backend.capacity.check(need)
                group = self.ready.add_group(id(function), need, self._statistics(function))
            self._number += 1
            rank = expected if expected is not None else options.seconds
            rank = rank if rank is not None else group.statistics.mean
            task = Task(self._number, name, group, options, make, inputs, sink, rank)
            self.ready.push(task)
            return task

    def _statistics(self, function: Callable[..., Any]) -> Statistics:
        known = self._functions.get(id(function))
        if known is None:
            # Holding the function keeps its id its own.
            known = self._functions[id(function)] = (function, Statistics(len(self._functions) + 1, function))
        return known[1]

    def cancel(self, task: Task) -> None:
        """The task need not run any more; where it runs, its worker is ended."""
        with self._alone:
            if task.state == "ready":
                self.ready.drop(task)
                self._end(task, Ending("cancelled", attempts=task.attempts))
            elif task.place is not None:
                place = task.place
                task.cancelled = True
                self._recall(place)
                if task.number in place.tasks and place.verdict is None:
                    place.verdict = (task.number, None)
                    place.worker.kill()

    @property
    def running(self) -> int:
        """Tasks at workers."""
        return sum(len(place.tasks) for place in self.places.values())

    @property
    def busy(self) -> bool:
        return bool(self.places) or bool(self.ready)

    # Time passes

    def step(self, timeout_seconds: float | None) -> None:
        """Start what can start, wait for something to happen, at most so long, and deal with it.

        Raises:
            UserError: another thread is in it.
        """
        with self._alone:
            self._fill()
            self._tell()
            if not self.places and timeout_seconds is None:
                return  # nothing will ever happen
            for event in self.backend.wait(self._patience(timeout_seconds)):
                if isinstance(event, Reply):
                    self._replied(event)
                else:
                    self._died(event)
            self._check_times()
            self._check_memory()
            self._tell()  # before new ones start: what was told may add better ones
            self._fill()

    def _tell(self) -> None:
        while self._endings:
            task, ending = self._endings.popleft()
            task.sink(task, ending)

    def _patience(self, timeout_seconds: float | None) -> float | None:
        limits = [] if timeout_seconds is None else [timeout_seconds]
        now = time.monotonic()
        if self.places:
            limits.append(MEMORY_CHECK_SECONDS)
        for place in self.places.values():
            current = place.worker.current()
            if current is not None and (task := place.tasks.get(current[0])) is not None:
                limit = task.options.timeout_seconds
                if limit is not None:
                    limits.append(max(0.0, current[1] + limit - now))
            elif any(task.options.timeout_seconds is not None for task in place.tasks.values()):
                limits.append(0.01)  # sent and not begun yet
            if len(place.tasks) > 1:
                limits.append(STEAL_SECONDS)
        return min(limits) if limits else None

    def _fill(self) -> None:
        """Start ready tasks, best first; then lay short ones ready at workers."""
        behind: list[tuple[Group, frozenset[str]]] = []
        for group in self.ready.in_order():
            memory = group.memory_bytes
            lacks = self.free.lacking(group.need, memory)
            if not lacks and not self.ready.would_delay(group, behind, self.free, self._ends):
                self._start(group, memory)
            else:
                group.lacks = lacks or frozenset({"a task that started waiting before"})
                behind.append((group, group.lacks))
                self.ready.skip(group)
        if self.ready:
            self._top_up(behind)
        elif self.places:
            self._steal()

    def _ends(self) -> list[tuple[float, Allocation]]:
        """When each place is expected to be free, soonest first; never, where nothing is known."""
        found = [(place.ends(), place.allocation) for place in self.places.values()]
        return sorted(found, key=lambda item: item[0])

    def _start(self, group: Group, memory_bytes: int) -> None:
        task = self.ready.pop(group)
        order = self._order(task)
        if order is None:
            return
        allocation = self.free.take(group.need, memory_bytes)
        try:
            worker = self.backend.open(allocation)
        except RunFailed:
            self.free.give_back(allocation)
            self.ready.push(task)
            raise
        place = self.places[worker] = Place(worker, allocation)
        if self._send(place, [task], [order]):
            return
        # It ended while it was idle: another one takes the task.
        del self.places[worker]
        self.free.give_back(allocation)
        worker.kill()

    def _order(self, task: Task) -> Order | None:
        statistics = task.group.statistics
        try:
            if statistics.payload is None:
                statistics.payload = wire.encode_function(statistics.function)
            arguments = task.make()
        except Exception as error:  # noqa: BLE001  # pickling runs the user's code
            what = f"what it is given cannot be sent to another process: {type(error).__name__}: {error}"
            self._end(task, Ending("failed", failure=TaskFailure(kind="input", message=what, error=error)))
            return None
        return Order(
            number=task.number,
            function_number=statistics.number,
            function=statistics.payload,
            arguments=arguments,
            inputs=task.inputs,
            memory_bytes=task.options.need.memory_bytes,
        )

    def _send(self, place: Place, tasks: list[Task], orders: list[Order]) -> bool:
        if not place.worker.send(orders):
            for task in tasks:
                self.ready.push(task)
            return False
        for task in tasks:
            task.state, task.place = "sent", place
            task.attempts += 1
            place.tasks[task.number] = task
        return True

    def _top_up(self, behind: list[tuple[Group, frozenset[str]]]) -> None:
        for place in list(self.places.values()):
            group = self.ready.next_for(place.allocation.need, behind)
            if group is None:
                continue
            mean = group.statistics.mean
            if not mean or place.verdict is not None:
                continue
            share = -(-(len(group) + self.running) // (2 * len(self.places)))  # less and less towards the end
            depth = min(int(QUEUE_SECONDS / mean) + 1, MOST_QUEUED, max(1, share))
            while len(place.tasks) < depth and group:
                size = min(depth - len(place.tasks), max(1, min(MOST_IN_MESSAGE, int(MESSAGE_SECONDS / mean))))
                if not self._lay_ready(place, group, size):
                    break

    def _lay_ready(self, place: Place, group: Group, size: int) -> bool:
        tasks: list[Task] = []
        orders: list[Order] = []
        total = 0
        while group and len(tasks) < size:
            task = self.ready.pop(group)
            order = self._order(task)
            if order is None:
                continue
            total += len(order.arguments.data)
            tasks.append(task)
            orders.append(order)
            if order.has_file or total > wire.BIG_MESSAGE // 2:
                break
        return bool(tasks) and self._send(place, tasks, orders)

    def _steal(self) -> None:
        """Nothing is ready, so a worker may idle: take back what lies at one that does not get to it."""
        now = time.monotonic()
        slow = [place for place in self.places.values() if len(place.tasks) > 1 and now - place.heard > STEAL_SECONDS]
        for place in sorted(slow, key=lambda place: -len(place.tasks)):
            if self.free.lacking(place.allocation.need, place.allocation.memory_bytes):
                continue
            if self._recall(place):
                self._fill()
                return

    def _recall(self, place: Place) -> int:
        numbers = place.worker.recall()
        for number in numbers:
            task = place.tasks.pop(number)
            task.attempts -= 1
            self._again(task)
        if numbers and not place.tasks:
            self._leave(place)
        return len(numbers)

    def _again(self, task: Task) -> None:
        """What was sent and did not run to its end may start once more, unless nobody wants it any longer."""
        if task.cancelled:
            self._end(task, Ending("cancelled", attempts=task.attempts))
        else:
            self.ready.push(task)

    # What has happened

    def _replied(self, reply: Reply) -> None:
        place = self.places[reply.worker]
        place.heard = time.monotonic()
        task = place.tasks.pop(reply.number)
        task.group.statistics.note(reply.seconds, reply.peak_bytes)
        failure = why_it_failed(task, reply)
        payload = reply.payload if failure is None else None
        ending = Ending("done", payload, None, task.attempts, reply.seconds, reply.peak_bytes, reply.remarks)
        if failure is None:
            self._end(task, ending)
        else:
            self._fail(task, failure, ending)
        if not place.tasks:
            self._leave(place)

    def _leave(self, place: Place) -> None:
        del self.places[place.worker]
        self.free.give_back(place.allocation)
        if place.verdict is None:
            self.backend.release(place.worker)

    def _died(self, death: Death) -> None:
        place = self.places.pop(death.worker, None)
        if place is None:
            return  # it was idle
        self.free.give_back(place.allocation)
        tasks = list(place.tasks.values())
        if place.verdict is not None:
            blamed = place.tasks.get(place.verdict[0])
        elif death.lost:
            blamed = None
        else:
            blamed = place.tasks.get(death.running) if death.running is not None else None
        for task in tasks:
            if task is blamed:
                continue
            # What lay ready behind it, or was done and not told yet, runs elsewhere.
            task.attempts -= 1
            task.losses += 1
            if task.losses > MOST_LOSSES:
                self._end(task, Ending("failed", failure=lost_too_often(task.losses), attempts=task.attempts))
            else:
                self._again(task)
        if blamed is None:
            return
        ending = Ending("cancelled", attempts=blamed.attempts, seconds=death.seconds)
        why = why_it_died(death) if place.verdict is None else place.verdict[1]
        if why is None:
            self._end(blamed, ending)
        else:
            self._fail(blamed, why, ending)

    def _fail(self, task: Task, failure: TaskFailure, ending: Ending) -> None:
        if task.attempts <= task.options.retries and failure.kind in task.options.retry_on:
            self._again(task)
        else:
            self._end(task, replace(ending, state="failed", failure=failure))

    def _end(self, task: Task, ending: Ending) -> None:
        task.state, task.place = "ended", None
        task.inputs = ()
        self._endings.append((task, ending))

    def _check_times(self) -> None:
        now = time.monotonic()
        for place in self.places.values():
            current = place.worker.current()
            if current is None or place.verdict is not None:
                continue
            task = place.tasks.get(current[0])
            limit = task.options.timeout_seconds if task is not None else None
            if task is None or limit is None or now - current[1] < limit:
                continue
            message = f"it took longer than {format_seconds(limit)}, its limit, and was ended"
            failure = TaskFailure(kind="timeout", message=message, details=place.where(task))
            place.verdict = (task.number, failure)
            place.worker.kill()

    def _check_memory(self) -> None:
        now = time.monotonic()
        if now < self._next_memory_check or not self.places:
            return
        self._next_memory_check = now + MEMORY_CHECK_SECONDS
        if not self.backend.short_of_memory:
            return
        largest = max(self.places.values(), key=lambda place: place.worker.resident_bytes())
        current = largest.worker.current()
        if current is None or current[0] not in largest.tasks or largest.verdict is not None:
            return
        size = largest.worker.resident_bytes()
        task = largest.tasks[current[0]]
        task.group.statistics.note_peak(size)
        message = (
            f"the machine ran out of memory, and its process was the largest with {format_bytes(size)}: it was ended"
        )
        largest.verdict = (task.number, TaskFailure(kind="memory", message=message, details=largest.where(task)))
        largest.worker.kill()

    def close(self) -> None:
        """End all workers; tasks that have not ended are told to be cancelled."""
        left = [task for place in self.places.values() for task in place.tasks.values()] + self.ready.take_all()
        self.places.clear()
        self.backend.close()
        for task in left:
            self._end(task, Ending("cancelled", attempts=task.attempts))
        self._tell()
