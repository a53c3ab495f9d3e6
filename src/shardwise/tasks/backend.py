"""The one interface behind which tasks run: on local processes, or on Ray."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from shardwise.tasks.need import Allocation, Capacity
from shardwise.tasks.wire import Payload


@final
@dataclass(frozen=True, slots=True)
class Order:
    """One attempt at one task, ready to be sent.

    Attributes:
        number: of the task in its engine.
        function_number: names `function`, which a worker keeps.
        arguments: the payload of (args, kwargs).
        inputs: handle number -> payload of the result it stands for.
        memory_bytes: the task fails with a MemoryError beyond this; None for no limit.
    """

    number: int
    function_number: int
    function: Payload
    arguments: Payload
    inputs: tuple[tuple[int, Payload], ...] = ()
    memory_bytes: int | None = None

    @property
    def has_file(self) -> bool:
        return self.arguments.file is not None or any(payload.file is not None for _, payload in self.inputs)


@final
@dataclass(frozen=True, slots=True)
class Reply:
    """A worker tells how a task ended.

    Attributes:
        told: `("done",)` or `("failed", (kind, line, traceback))`.
        payload: of the result, or of the exception where it could be sent.
    """

    worker: Worker
    number: int
    told: tuple[Any, ...]
    seconds: float
    peak_bytes: int | None
    remarks: tuple[str, ...]
    payload: Payload | None


@final
@dataclass(frozen=True, slots=True)
class Death:
    """A worker ended without being asked.

    Attributes:
        running: number of the task it was in, None between tasks or unknown.
        signal_number: that ended it, None where it ended by itself.
        exit_code: where it ended by itself.
        lost: it went down with something that was not its own fault, such as the process that started it.
        out_of_memory: the machine's memory had run out.
        seconds: how long the running task had run.
        message: what else is known of it.
    """

    worker: Worker
    running: int | None
    signal_number: int | None
    exit_code: int | None
    lost: bool = False
    out_of_memory: bool = False
    seconds: float = 0.0
    message: str = ""


class Worker(ABC):
    """One warm process with a fixed number of threads and fixed devices."""

    @abstractmethod
    def send(self, orders: Sequence[Order]) -> bool:
        """Send tasks in one message, to be run in this order; False where it has no room for more now."""

    @abstractmethod
    def recall(self) -> list[int]:
        """Take back tasks that it has not begun; numbers of those that it will certainly not run."""

    @abstractmethod
    def current(self) -> tuple[int, float] | None:
        """(number, monotonic second at which it began) of the running task; None between tasks or where unknown."""

    @abstractmethod
    def where(self) -> str:
        """The lines it stands in now, where they can be had."""

    @abstractmethod
    def kill(self) -> None:
        """End it now; a `Death` follows."""

    @abstractmethod
    def resident_bytes(self) -> int:
        """Memory of its process, 0 where unknown."""


Event = Reply | Death


class Backend(ABC):
    """Starts workers and hears from them. Used from one thread, except `wake`."""

    @property
    @abstractmethod
    def capacity(self) -> Capacity:
        """What there is for all tasks together."""

    def prepare(self) -> None:
        """Begin with what workers will need, without waiting for it."""
        return

    @abstractmethod
    def open(self, allocation: Allocation) -> Worker:
        """A warm worker for tasks with this need on these devices, new where none is idle.

        Raises:
            RunFailed: no worker can be started.
        """

    @abstractmethod
    def release(self, worker: Worker) -> None:
        """The worker has nothing to do: keep it warm for later."""

    @abstractmethod
    def wait(self, timeout_seconds: float | None) -> list[Event]:
        """What has happened, after at most so long; None waits for something."""

    @abstractmethod
    def wake(self) -> None:
        """Make a `wait` in another thread return."""

    @abstractmethod
    def close(self) -> None:
        """End all workers."""

    @property
    def short_of_memory(self) -> bool:
        """Whether so little memory is left on the machine of the workers that one of them has to go."""
        return False
