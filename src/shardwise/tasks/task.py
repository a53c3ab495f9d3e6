"""A task inside the engine, where it is, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

from shardwise.tasks.backend import Death, Reply, Worker
from shardwise.tasks.need import Allocation
from shardwise.tasks.options import Options
from shardwise.tasks.outcome import TaskFailure, signal_name
from shardwise.tasks.wire import Payload
from shardwise.units import format_bytes

if TYPE_CHECKING:
    from shardwise.tasks.ready import Group


@final
@dataclass(frozen=True, slots=True)
class Ending:
    """How a task ended, as the engine knows it: the result is still a payload."""

    state: Literal["done", "failed", "cancelled"]
    payload: Payload | None = None
    failure: TaskFailure | None = None
    attempts: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    remarks: tuple[str, ...] = ()


@final
@dataclass(slots=True, eq=False)
class Task:
    """A task that may start at any time.

    Attributes:
        make: gives the payload of its arguments; called when it is sent, so that few of them exist at a time.
        sink: told how it ended.
        expected: seconds it and what follows it are expected to take, for the order among tasks of one priority.
    """

    number: int
    name: str
    group: Group
    options: Options
    make: Callable[[], Payload]
    inputs: tuple[tuple[int, Payload], ...]
    sink: Callable[[Task, Ending], None]
    expected: float
    state: Literal["ready", "sent", "ended"] = "ready"
    attempts: int = 0
    losses: int = 0
    cancelled: bool = False
    place: Place | None = None


@final
@dataclass(slots=True, eq=False)
class Place:
    """A worker at work and what is set aside for it."""

    worker: Worker
    allocation: Allocation
    tasks: dict[int, Task] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    verdict: tuple[int, TaskFailure | None] | None = None
    """Task for which we ended the worker, and why; no failure means that it was cancelled."""

    def ends(self) -> float:
        """Monotonic second at which it is expected to be free; never, where nothing is known."""
        current = self.worker.current()
        began = current[1] if current is not None else time.monotonic()
        means = [task.group.statistics.mean for task in self.tasks.values()]
        return began + sum(means) if all(means) else float("inf")

    def where(self, task: Task) -> str:
        """The lines that the task stands in now."""
        return task.group.statistics.with_file(self.worker.where())


def why_it_failed(task: Task, reply: Reply) -> TaskFailure | None:
    """The failure of a task that came to its own end; None where it has a result that counts."""
    if reply.told[0] == "done":
        if reply.remarks and task.options.leaks == "fail":
            return TaskFailure(kind="leak", message="; ".join(reply.remarks))
        return None
    kind, line, details = reply.told[1]
    error = reply.payload.decode() if reply.payload is not None else None
    if kind == "memory" and task.options.need.memory_bytes is not None:
        line += f" (its memory is limited to {format_bytes(task.options.need.memory_bytes)})"
    return TaskFailure(kind=kind, message=line, details=task.group.statistics.with_file(details), error=error)


def why_it_died(death: Death) -> TaskFailure:
    """The failure of the task that a worker was in when it ended."""
    if death.out_of_memory:
        return TaskFailure(
            kind="memory",
            message="the kernel ended its process because the machine was out of memory",
            signal_number=death.signal_number,
        )
    if death.signal_number is not None:
        return TaskFailure(
            kind="killed",
            message=f"its process was ended by signal {signal_name(death.signal_number)}",
            signal_number=death.signal_number,
        )
    if death.message:
        return TaskFailure(kind="killed", message=f"its process ended: {death.message}")
    return TaskFailure(kind="exit", message=f"it ended its process with exit code {death.exit_code}")


def lost_too_often(times: int) -> TaskFailure:
    """The failure of a task that never got to its end because of others."""
    return TaskFailure(kind="lost", message=f"its process went down {times} times through no fault of its own")
