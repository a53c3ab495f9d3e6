"""A worker process as its launcher sees it."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import final

from shardwise.run.process import Outcome


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
    """

    rank: int
    process: BaseProcess
    pipe: Connection
    outcome: Outcome | None = None
    done_at: float = 0.0
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

    def send(self, signal_number: int) -> None:
        """Sends a signal to the process alone."""
        if self.alive:
            os.kill(self.pid, signal_number)
