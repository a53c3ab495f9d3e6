"""How a task ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from shardwise.errors import TaskFailed

FailureKind = Literal["error", "timeout", "killed", "memory", "exit", "leak", "lost", "input", "dependency"]
State = Literal["done", "failed", "skipped", "cancelled"]

KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@final
@dataclass(frozen=True, kw_only=True)
class TaskFailure:
    """Why a task has no result.

    Attributes:
        kind: `error`: it raised; `timeout`; `killed`: a signal ended its process; `memory`: it took more than it may or
            than there is; `exit`: it ended its process; `leak`: it left processes running, where `Options.leaks` says that
            this is a failure; `lost`: the scheduler's own helper process died too often;
            `input`: what it was given cannot be sent to another process; `dependency`: a task before it failed.
        message: one line.
        details: its own traceback, or the lines it stood in when its time was over.
        signal_number: that ended the process, None where none did.
        error: the exception it raised, where it could be sent.
    """

    kind: FailureKind
    message: str
    details: str = ""
    signal_number: int | None = None
    error: BaseException | None = None

    def raised(self, name: str) -> TaskFailed:
        """The exception to raise for this failure; the task's own one is its cause."""
        text = f"task {name} failed: {self.message}"
        if self.details:
            text += "\n\n" + self.details.rstrip()
        error = TaskFailed(text, kind=self.kind, details=self.details)
        error.__cause__ = self.error
        return error


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one task ended.

    Attributes:
        index: of its item in `map`, or its number in the graph.
        name: what it is called in messages.
        state: `done`, `failed`, `skipped` (its condition said no, or a task it waits for was skipped) or `cancelled`.
        value: its result where it is done.
        failure: why it failed.
        attempts: how often it was started.
        seconds: of its last attempt.
        peak_bytes: how much memory its process took at most beyond what it held before; None where not measured.
        remarks: what else should be known, such as processes it left behind.
        restored: taken from the store, not run now.
    """

    index: int
    name: str
    state: State
    value: Any = None
    failure: TaskFailure | None = None
    attempts: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    remarks: tuple[str, ...] = ()
    restored: bool = False

    def result(self) -> Any:
        """The value of a task that is done.

        Raises:
            TaskFailed: it has none; the message says why.
        """
        if self.state == "done":
            return self.value
        failure = self.failure or TaskFailure(kind="dependency", message=f"it was {self.state}")
        raise failure.raised(self.name)


def signal_name(number: int) -> str:
    """`9 (SIGKILL)`."""
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)
