"""The process of one rank: how it is started, and what runs in it before and after the worker function.

Why a worker is forked where that is allowed: a forked worker inherits the imported torch (more than a second of
start-up), the job's closures, and the arrays already loaded, as shared pages. Two things make it safe:

- OpenMP. A process whose OpenMP pool has started cannot be forked by the thread that owns the pool: the child believes
  in threads that do not exist there and hangs in its first parallel region. The pool belongs to a *thread*, though.
  The launcher forks from a thread of its own that never runs a tensor operation, so that the child builds a fresh pool.
- Accelerators. Their contexts do not survive a fork, so workers on a device other than the CPU are spawned. The worker
  function is then pickled: where it can be imported by reference, else with its code.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, final

import cloudpickle
import torch

from shardwise import errors
from shardwise.run.failure import Failure, from_exception
from shardwise.run.signals import STOP_SIGNALS
from shardwise.spec.rank import Rank

StartMethod = Literal["fork", "spawn"]

STACK_SIGNAL = signal.SIGUSR2

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker needs to know besides its rank.

    Attributes:
        worker: the function to run.
        threads: intra-operation threads of torch in each worker.
        environment: variables to set before the function runs.
        launcher_pid: the process whose end ends the worker.
        wants_result: whether the launcher will use this worker's result.
        stack_file: where the worker writes the lines it is in when it gets STACK_SIGNAL; "" for nowhere.
    """

    worker: Callable[[Rank], Any]
    threads: int
    environment: dict[str, str]
    launcher_pid: int
    wants_result: bool
    stack_file: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a worker sends when it is done: exactly one of a result (pickled), a failure, a stop."""

    result: bytes | None = None
    failure: Failure | None = None
    stopped: str | None = None


def default_start_method(device: str) -> StartMethod:
    """fork for CPU workers on Linux, spawn elsewhere (macOS system libraries do not survive a fork)."""
    return "fork" if device == "cpu" and sys.platform == "linux" else "spawn"


def start(method: StartMethod, setup: Setup, rank: Rank) -> tuple[BaseProcess, Connection]:
    """Starts the process of one rank; returns it with the end of the pipe on which its Outcome arrives.

    Raises:
        UserError: the start method is spawn, and something that the worker function holds cannot be sent.
    """
    if method == "fork" or not _main_is_a_session():
        try:
            return _start(method, setup, rank)
        except _UNPICKLABLE:
            pass  # a lambda, or what is defined inside a function
    try:
        return _start(method, replace(setup, worker=_ByValue(setup.worker)), rank)
    except _UNPICKLABLE as error:
        raise errors.UserError(
            f"what the workers are to run cannot be sent to them: {error}. Workers are new processes on this device or system; "
            "leave open files, locks, connections and running generators out of the job, or make them where they are used"
        ) from error


_UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)


def _start(method: StartMethod, setup: Setup, rank: Rank) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork") if method == "fork" else multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(setup, rank, theirs), name=f"rank {rank.rank}", daemon=False)
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns about every fork of a process with threads; see the top of this file.
            warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)
            process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def _main_is_a_session() -> bool:
    """Whether this is a notebook or a prompt: a new process cannot import again what was defined in it."""
    main = sys.modules["__main__"]
    return getattr(main, "__spec__", None) is None and not hasattr(main, "__file__")


@final
class _ByValue:
    """A function that is sent with the code it needs, where that is in no module, and arrives as itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, rank: Rank) -> Any:
        return self._function(rank)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
        return pickle.loads, (cloudpickle.dumps(self._function, protocol=5),)


def path_for_worker(fd: int, method: StartMethod) -> str:
    """Where a worker finds an open file of the launcher (Linux): a forked one has it too, a spawned one goes there."""
    return f"/proc/self/fd/{fd}" if method == "fork" else f"/proc/{os.getpid()}/fd/{fd}"


def set_threads(threads: int) -> None:
    """Sets torch's intra-operation threads of this process, and one inter-operation thread."""
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError:
            # Only allowed once per process. Eager training uses no inter-operation threads, so nothing depends on it.
            return


def _main(setup: Setup, rank: Rank, pipe: Connection) -> None:
    end_with_launcher(setup.launcher_pid)
    # A process group of its own: Ctrl-C in a terminal reaches the launcher alone, which passes it on once, and whatever
    # the worker starts can be ended together with it.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _show_stacks(setup.stack_file)
    os.environ.update(setup.environment)
    # What was inherited stays shared with the launcher, and its garbage is not ours to collect.
    gc.freeze()
    _forget_compiler_threads()
    set_threads(setup.threads)
    outcome = _run(setup, rank)
    # After the function has returned, a stop request has nothing left to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send(outcome)
    pipe.close()


def _forget_compiler_threads() -> None:
    """After a fork torch forgets the processes in which its compiler works, but not the threads, which are not here: whoever
    gives them work waits for ever (torch 2.13, `torch/_inductor/async_compile.py`)."""
    module = sys.modules.get("torch._inductor.async_compile")
    if module is not None:
        module.AsyncCompile.pool.cache_clear()


def _run(setup: Setup, rank: Rank) -> Outcome:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the launcher, see _run_agent
        result = setup.worker(rank)
    except errors.Stopped as stop:
        return Outcome(stopped=str(stop))
    except KeyboardInterrupt:
        return Outcome(stopped="interrupted (SIGINT) before the workers could save anything")
    except Exception as error:  # noqa: BLE001 - every exception of the worker is reported by the launcher
        return Outcome(failure=from_exception(error, rank.rank))
    if not setup.wants_result:
        return Outcome(result=b"")
    try:
        # The plain pickler copies tensors; multiprocessing's own would hand over memory that ends with the worker.
        return Outcome(result=pickle.dumps(result, protocol=5))
    except Exception as error:  # noqa: BLE001 - pickling runs the result's own code
        what = f"returned a {type(result).__name__} that cannot be sent to the launcher: {error}"
        return Outcome(failure=Failure(rank=rank.rank, kind="error", summary=what))


def _show_stacks(stack_file: str) -> None:
    """A crash in native code shows the Python lines that led there; so does STACK_SIGNAL, even inside a collective."""
    faulthandler.enable(file=2, all_threads=False)
    if stack_file:
        stream = Path(stack_file).open("w")  # noqa: SIM115 - stays open as long as the process
        faulthandler.register(STACK_SIGNAL, file=stream, all_threads=False, chain=False)


def end_with_launcher(launcher_pid: int) -> None:
    """Makes the end of the launcher, even by SIGKILL, the end of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(launcher_pid,), daemon=True).start()
    if os.getppid() != launcher_pid:  # it ended before the line above
        os._exit(1)


def _watch_parent(launcher_pid: int) -> None:
    while os.getppid() == launcher_pid:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
