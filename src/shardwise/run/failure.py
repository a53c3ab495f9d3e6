"""What went wrong in a worker, as plain data, and which of several failures is the cause.

When one rank dies, the ranks that were talking to it fail too, a moment later and with less to say. Everything here
serves one promise: the user sees the first failure and its own traceback, not its echo.
"""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch.distributed as dist

from shardwise import errors

Kind = Literal["error", "user", "killed", "exit", "lost", "grace", "timeout", "connection"]

# Lower is closer to the cause. A rank that timed out or lost its connection usually suffers from another one's end.
_DISTANCE: dict[str, int] = {"timeout": 1, "connection": 2}

_CONNECTION_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connectfullmesh",
    "broken pipe",
    "socket closed",
    "connection was likely closed",
    "remote process exited",
    "ncclremoteerror",
)
_TIMEOUT_TEXTS = (
    "timed out: the other ranks",  # dist/group.py
    "timed out waiting",
    "wait timeout",
    "watchdog caught collective operation timeout",
)

_SIGNAL_HINTS = {
    signal.SIGKILL: "Most often the machine is out of memory (see `dmesg`): use a smaller micro-batch or fewer workers.",
    signal.SIGBUS: "Most often shared memory (/dev/shm) is full: make it larger or use fewer data-loading workers.",
    signal.SIGSEGV: "Native code crashed; the Python lines that led there are further up in the output.",
    signal.SIGABRT: "Native code gave up: its own message is further up in the output.",
    signal.SIGTERM: "Somebody outside the run ended this worker.",
}


_FROM_LOADER = "in DataLoader worker process"

STALLED_EXIT = 75
"""Exit code of a worker that was asked to stop in a step that hangs (EX_TEMPFAIL of sysexits.h: try again later)."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The end of one rank that did not return a result.

    Attributes:
        rank: the global rank.
        kind: what happened; decides which of several failures is shown.
        summary: one sentence part that follows "rank N ".
        details: the rank's own traceback, or "".
        error_class: name of the class in shardwise.errors to raise again with `message`, or "" for RunFailed.
        message: the message of that error.
    """

    rank: int
    kind: Kind
    summary: str
    details: str = ""
    error_class: str = ""
    message: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Failure:
        return Failure(**json.loads(text))

    @property
    def restartable(self) -> bool:
        """Whether starting all ranks again can help: not where the user's input is wrong or the user wants to stop."""
        return self.kind not in ("user", "grace")

    def error(self) -> errors.ShardwiseError:
        """The exception that the launcher raises for this failure."""
        if self.error_class and self.error_class != "RunFailed":
            known: type[errors.ShardwiseError] = getattr(errors, self.error_class)
            return known(self.message)
        return errors.RunFailed(self.message or self.sentence(), rank=self.rank, details=self.details)

    def sentence(self) -> str:
        return self.summary if self.kind == "lost" else f"rank {self.rank} {self.summary}"


def from_exception(error: BaseException, rank: int) -> Failure:
    """What `error`, raised by the worker function on `rank`, says; call it inside the except block."""
    # The first frame is the launcher's own; the user's part of the traceback starts below it.
    below = error.__traceback__.tb_next if error.__traceback__ else None
    details = "".join(traceback.format_exception(type(error), error, below or error.__traceback__))
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
    below_it = (
        sum(len(note.split("\n")) for note in notes) if hasattr(error, "add_note") else 0
    )  # Python 3.10 shows none
    last_line = traceback.format_exception_only(type(error), error)[-1 - below_it].strip()
    if _FROM_LOADER in last_line:  # of torch's DataLoader, with the whole traceback of its worker in the message
        lines = last_line.splitlines()
        last_line = "; ".join(lines[max(row for row, line in enumerate(lines) if line.startswith("  ")) + 1 :])
    last_line = "; ".join([last_line, *notes])
    if isinstance(error, errors.UserError):
        return Failure(
            rank=rank, kind="user", summary=last_line, error_class=_public_class(error).__name__, message=str(error)
        )
    if isinstance(error, errors.ShardwiseError):
        kind = _kind(error) if isinstance(error, errors.RunFailed) else "error"
        known = _public_class(error).__name__
        if isinstance(error, errors.RunFailed) and error.details:
            details = error.details
        elif isinstance(error, errors.RunFailed) and error.__suppress_context__ and error.__cause__ is None:
            details = ""  # raised `from None`: its words say all there is to know
        return Failure(rank=rank, kind=kind, summary=last_line, details=details, error_class=known, message=str(error))
    return Failure(rank=rank, kind=_kind(error), summary=f"failed with {last_line}", details=details)


def from_exit_code(exit_code: int, rank: int) -> Failure:
    """What the exit code (negative: a signal) of a worker that sent no result says."""
    if exit_code >= 0:
        return Failure(
            rank=rank,
            kind="exit",
            summary=f"ended with exit code {exit_code} before it had a result; its own output, above, may say why.",
        )
    try:
        known = signal.Signals(-exit_code)
        name, hint = f" ({known.name})", _SIGNAL_HINTS.get(known, "")
    except ValueError:
        name, hint = "", ""
    return Failure(rank=rank, kind="killed", summary=f"was killed by signal {-exit_code}{name}. {hint}".rstrip())


def stalled(rank: int) -> Failure:
    """A worker that was asked to stop, and ended itself because its step had stalled and would not end."""
    text = "could not save and stop, because its step had stalled, and was ended"
    return Failure(
        rank=rank,
        kind="grace",
        summary=text,
        error_class="RunFailed",
        message=f"rank {rank} {text}. The last complete checkpoint is what `--resume` continues from.",
    )


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The one of `failures`, given in the order in which they were seen, that the others follow from."""
    return min(failures, key=lambda failure: _DISTANCE.get(failure.kind, 0))


def is_echo(failure: Failure) -> bool:
    """Whether this looks like the consequence of another rank's end, so that waiting for that one is worth a moment."""
    return failure.kind in _DISTANCE


def is_own_error(error: BaseException) -> bool:
    """Whether `error` is of this rank alone, and no echo of another rank's end."""
    return _kind(error) == "error"


def _kind(error: BaseException) -> Kind:
    if isinstance(error, (RuntimeError, OSError, errors.RunFailed)):
        if _says(error, _TIMEOUT_TEXTS):
            return "timeout"
        if isinstance(error, (ConnectionError, dist.DistNetworkError)) or _says(error, _CONNECTION_TEXTS):
            return "connection"
    return "error"


def _says(error: BaseException, texts: Sequence[str]) -> bool:
    message = str(error).lower()
    return any(text in message for text in texts)


def _public_class(error: errors.ShardwiseError) -> type[errors.ShardwiseError]:
    """The nearest class that shardwise.errors itself defines: a user's own subclass may not exist in the launcher."""
    for known in type(error).__mro__:
        if known.__module__ == errors.__name__ and issubclass(known, errors.ShardwiseError):
            return known
    raise AssertionError(f"{type(error)} is no ShardwiseError")
