"""One function in a process of its own, as if it were the only rank of a run; the calling process stays as it was."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from shardwise.errors import RunFailed
from shardwise.run.failure import Failure, from_exit_code
from shardwise.run.heap import use_one_heap
from shardwise.run.process import Setup, default_start_method, start
from shardwise.spec.rank import SERIAL, Rank

T = TypeVar("T")

_STARTING = threading.Lock()
"""One fork at a time: starting a process changes the warning filters and reaps what has ended, for all threads."""


def call_in_child(
    function: Callable[[Rank], T], *, threads: int, device: str, timeout_seconds: float | None = None
) -> T:
    """Call `function(SERIAL)` in a new process and return its picklable result.

    Call it from a thread that runs no tensor operations and lives until it returns: a forked child builds its own pool of
    compute threads only if the thread it was forked from had none, and it ends with that thread.

    Args:
        function: what to call.
        threads: compute threads of the process.
        device: kind of device it computes on.
        timeout_seconds: the process is ended when it has not answered in this time; None waits for ever.

    Raises:
        UserError: the function raised one.
        RunFailed: it raised anything else, the process died, or it took too long; `details` holds its traceback.
    """
    setup = Setup(worker=function, threads=threads, environment={}, launcher_pid=os.getpid(), wants_result=True)
    with _STARTING:
        process, pipe = start(default_start_method(device), setup, SERIAL)
    try:
        if timeout_seconds is not None and not pipe.poll(timeout_seconds):
            process.kill()
            process.join()
            raise RunFailed(f"the process of a serial run gave no answer within {timeout_seconds:g} s and was ended")
        outcome = pipe.recv()
    except EOFError:
        raise _died(from_exit_code(_exit_code(process), 0)) from None
    finally:
        pipe.close()
    process.join()
    if outcome.failure is not None:
        raise outcome.failure.error()
    if outcome.result is None:
        raise RunFailed(f"the serial run was stopped: {outcome.stopped}")
    result: Any = pickle.loads(outcome.result)
    return result  # type: ignore[no-any-return]


def in_thread(function: Callable[[], T]) -> T:
    """Call `function` in a fresh thread and wait: a thread that runs no tensor operation, as `call_in_child` needs it."""
    results: list[T] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  # raised again in the calling thread
            raised.append(error)

    use_one_heap()
    thread = threading.Thread(target=call, name="shardwise apart", daemon=True)
    thread.start()
    thread.join()
    for error in raised:
        raise error
    return results[0]


def fall_first() -> None:
    """Of all processes, let the system end this one first where memory is gone: it is there to find out (Linux)."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:
        return


def _exit_code(process: BaseProcess) -> int:
    """Of a process that is ending. Another thread that starts one may be just about to reap it and note the code."""
    process.join()
    while (code := process.exitcode) is None:
        time.sleep(0.01)
    return code


def _died(failure: Failure) -> RunFailed:
    return RunFailed(f"the process of a serial run {failure.summary}", details=failure.details)
