"""Signals on both sides: a rank notices that it should stop; the launcher passes on what it was told."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, final

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class StopRequest:
    """Inside a rank: turns SIGINT and SIGTERM into a flag, for a loop that stops between two steps. A second SIGINT
    interrupts at once, as Python does.

    The flag of one rank says nothing about the others: a loop that stops because of it must agree with all ranks first
    (for example by reducing the flag), or the others wait for it in their next collective.
    Outside the main thread of a process no handler can be installed; then the flag stays False.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        if self._before and sys.version_info >= (3, 13):
            # In a process forked by another thread than the main one, Python 3.13 notes a signal for a thread that is not
            # there, and its handler does not run by itself. This sends nothing, and asks for signals that have come.
            os.kill(os.getpid(), 0)
        return self.signal_number is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            # Ctrl-C again: the step does not end, or the user does not want to wait for it. (A launcher passes the first
            # on and deals with the second itself.)
            raise KeyboardInterrupt
        self.signal_number = number


@contextmanager
def handling(react: Callable[[int], None]) -> Iterator[None]:
    """Inside the launcher: calls react(signal number) for SIGINT and SIGTERM while the block runs.

    Does nothing outside the main thread, where Python lets nobody install handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda got, _frame: react(got)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
