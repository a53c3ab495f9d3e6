"""A worker process as its launcher sees it."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import final

from shardwise.run.process import STACK_SIGNAL, Outcome, Setup, StartMethod, path_for_worker, start
from shardwise.spec.rank import Rank

_OURS = str(Path("run", "process.py"))


@final
@dataclass(kw_only=True)
class Child:
    """One worker process.

    A process that has ended is not reaped before `exit_code` is asked for: until then its number, which is also the
    number of its process group, cannot become another process's, so that `kill` cannot hit a stranger.

    Attributes:
        rank: its global rank.
        process: the process.
        pipe: where its Outcome arrives.
        outcome: what it was, once known.
        done_at: when it became known, on the monotonic clock, in seconds.
        stack_fd: the memory file where it says which lines it is in; None where the system has none.
    """

    rank: int
    process: BaseProcess
    pipe: Connection
    outcome: Outcome | None = None
    done_at: float = 0.0
    stack_fd: int | None = None
    _reaped: bool = False

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        if self._reaped:
            return False
        if sys.platform == "linux":
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        else:  # noqa: RET505 - the type checker needs it to see that this is another system
            return bool(self.process.is_alive())

    def exit_code(self) -> int:
        """Waits for the end and reaps the process; what it has started goes with it. Negative: minus the signal."""
        if sys.platform == "linux" and not self._reaped:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            self.kill()
        self.process.join()
        self._reaped = True
        code = self.process.exitcode
        assert code is not None
        return code

    def kill(self) -> None:
        """Ends the process and everything in its process group, unless it has been reaped."""
        if self._reaped:
            return
        for end in (os.killpg, os.kill):  # killpg fails in the instant before the worker has made its group
            try:
                end(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def stack(self, patience_seconds: float = 0.5) -> str:
        """The Python lines the worker is in, innermost first, without our own; "" if it does not say."""
        if self.stack_fd is None or not self.alive:
            return ""
        self.send(STACK_SIGNAL)
        deadline = time.monotonic() + patience_seconds
        text, before = "", None
        while time.monotonic() < deadline and (not text or text != before):
            time.sleep(0.02)
            before, text = text, os.pread(self.stack_fd, 1 << 20, 0).decode(errors="replace")
        lines = text.splitlines()[1:]  # without the heading
        ours = [number for number, line in enumerate(lines) if _OURS in line]
        return "\n".join(lines[: ours[0]] if ours else lines)

    def close(self) -> None:
        """Reaps the process and lets go of its files."""
        self.process.join()
        self.pipe.close()
        if self.stack_fd is not None:
            os.close(self.stack_fd)

    def send(self, signal_number: int) -> None:
        """Sends a signal to the process alone."""
        if self.alive:
            os.kill(self.pid, signal_number)


def start_child(method: StartMethod, setup: Setup, rank: Rank) -> Child:
    """Starts the process of one rank (see `start` for the errors)."""
    stack_fd = None
    if sys.platform == "linux":
        # A file without a name: nothing to clean up, whatever happens to the launcher.
        stack_fd = os.memfd_create(f"rank {rank.rank}")
        setup = replace(setup, stack_file=path_for_worker(stack_fd, method))
    process, pipe = start(method, setup, rank)
    return Child(rank=rank.rank, process=process, pipe=pipe, stack_fd=stack_fd)
