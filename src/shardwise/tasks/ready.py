"""Ready tasks in the order in which they should start: by priority, then the longest first, as resources allow.

Longest first (Graham 1969, "Bounds on multiprocessing timing anomalies") leaves short tasks for the end, where they
fill the gaps. A task that waits for more than is free is not starved: smaller ones may go ahead of it only where they
end before it could start anyway (backfilling, Lifka 1995), or a few times where nothing is known about durations.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, final

from shardwise.tasks.need import Allocation, Free, Need, shared_resources

if TYPE_CHECKING:
    from shardwise.tasks.task import Task
    from shardwise.tasks.wire import Payload

MOST_BYPASSES = 8
"""How many tasks of unknown length may go ahead of one that waits for more than is free."""


@final
class Statistics:
    """What was measured of the tasks of one function."""

    def __init__(self, number: int, function: Callable[..., Any]) -> None:
        self.number = number
        self.function = function
        self.payload: Payload | None = None
        self.count = 0
        self.peak_bytes = 0
        self._seconds = 0.0

    @property
    def mean(self) -> float:
        """Seconds; 0 where no task has ended yet."""
        return self._seconds / self.count if self.count else 0.0

    def note(self, seconds: float, peak_bytes: int | None) -> None:
        # Old tasks count less: the mean follows a function whose items become longer.
        if self.count < 50:
            self.count += 1
            self._seconds += seconds
        else:
            self._seconds += seconds - self._seconds / self.count
        if peak_bytes is not None:
            self.note_peak(peak_bytes)

    def with_file(self, trace: str) -> str:
        """A traceback with the file of the function, where it travelled as code without a file."""
        code = getattr(getattr(self.function, "func", self.function), "__code__", None)
        return trace.replace("<dynamic-code>", code.co_filename) if code is not None else trace

    def note_peak(self, size_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, size_bytes)


@final
class Group:
    """Ready tasks of one function with one need."""

    def __init__(self, need: Need, statistics: Statistics) -> None:
        self.need = need
        self.statistics = statistics
        self.heap: list[tuple[int, float, int, Task]] = []
        self.lacks: frozenset[str] = frozenset()
        self.bypassed = 0
        self.count = 0

    def __len__(self) -> int:
        return self.count

    @property
    def memory_bytes(self) -> int:
        """To set aside for one of its tasks: what was declared, or a little more than any has used yet, or what is expected."""
        if self.need.memory_bytes is not None:
            return self.need.memory_bytes
        learned = round(self.statistics.peak_bytes * 1.1)
        if not learned:
            return self.need.expected_bytes
        # Only the task's own process is measured; a wide one may work in others.
        return max(learned, self.need.expected_bytes) if self.need.cores > 1 else learned

    def rank(self) -> tuple[int, float, int]:
        return self.heap[0][:3]


@final
class Ready:
    """All groups."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, Need], Group] = {}
        self._filled: set[Group] = set()
        self._skipped: set[Group] = set()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def group(self, function_id: int, need: Need) -> Group | None:
        return self._groups.get((function_id, need))

    def add_group(self, function_id: int, need: Need, statistics: Statistics) -> Group:
        group = self._groups[function_id, need] = Group(need, statistics)
        return group

    def push(self, task: Task) -> None:
        """The task may start."""
        task.state, task.place = "ready", None
        self._put(task)
        self._filled.add(task.group)
        self._count += 1
        task.group.count += 1

    def _put(self, task: Task) -> None:
        heapq.heappush(task.group.heap, (-task.options.priority, -task.expected, task.number, task))

    def raise_rank(self, task: Task, expected: float) -> None:
        """More waits for the task than was known."""
        task.expected = max(task.expected, expected)
        if task.state == "ready":
            self._put(task)  # its old place in the heap is shed when it comes up

    def pop(self, group: Group) -> Task:
        """The best task of a group, which is about to start."""
        task = heapq.heappop(group.heap)[3]
        self._count -= 1
        group.count -= 1
        group.bypassed = 0
        task.state = "sent"
        self._shed(group)
        return task

    def drop(self, task: Task) -> None:
        """The task shall not start any more."""
        task.state = "ended"
        self._count -= 1
        task.group.count -= 1
        self._shed(task.group)

    def _shed(self, group: Group) -> None:
        """Keep a task that is really there at the top of the heap: dropped and raised ones stay until they come up."""
        while group.heap and group.heap[0][3].state != "ready":
            heapq.heappop(group.heap)
        if not group.heap:
            self._filled.discard(group)

    def take_all(self) -> list[Task]:
        """All of them; none is ready any more."""
        tasks = {item[3] for group in self._filled for item in group.heap if item[3].state == "ready"}
        for group in self._filled:
            group.heap.clear()
            group.count = 0
        self._filled.clear()
        self._count = 0
        return sorted(tasks, key=lambda task: task.number)

    def in_order(self) -> Iterator[Group]:
        """The group with the best task, again and again, until all are empty or were skipped."""
        self._skipped = set()
        while True:
            open_groups = self._filled - self._skipped if self._skipped else self._filled
            if not open_groups:
                return
            yield min(open_groups, key=Group.rank)

    def skip(self, group: Group) -> None:
        self._skipped.add(group)

    def would_delay(
        self,
        group: Group,
        behind: list[tuple[Group, frozenset[str]]],
        free: Free,
        ends: Callable[[], list[tuple[float, Allocation]]],
    ) -> bool:
        """Whether starting a task of this group now makes a better one, which lacks something, wait longer."""
        for better, lacks in behind:
            if not shared_resources(group.need, lacks):
                continue
            start = _when_it_fits(better, free, ends())
            mean = group.statistics.mean
            if mean and time.monotonic() + mean <= start < float("inf"):
                continue
            if start == float("inf") and better.bypassed < MOST_BYPASSES:
                better.bypassed += 1
                continue
            return True
        return False

    def next_for(self, need: Need, behind: list[tuple[Group, frozenset[str]]]) -> Group | None:
        """The best group whose tasks can follow one with this need at the same worker, if none that is better waits."""
        same = [group for group in self._filled if group.need == need]
        if not same:
            return None
        best = min(same, key=Group.rank)
        for better, lacks in behind:
            if better.need != need and better.heap and better.rank() < best.rank() and shared_resources(need, lacks):
                return None
        return best

    def waiting(self) -> dict[str, int]:
        """What ready tasks wait for -> how many."""
        found: dict[str, int] = {}
        for group in self._filled:
            why = " and ".join(sorted(group.lacks)) or "their turn"
            found[why] = found.get(why, 0) + len(group)
        return found


def _when_it_fits(group: Group, free: Free, ends: list[tuple[float, Allocation]]) -> float:
    """Monotonic second at which enough will be free for a task of the group."""
    then = free.copy()
    for end, allocation in ends:
        then.give_back(allocation)
        if not then.lacking(group.need, group.memory_bytes):
            return end
    return float("inf")
