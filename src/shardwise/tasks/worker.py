"""A worker process: takes tasks from its socket one after the other, runs them, and tells how each ended."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from shardwise.tasks import handle, wire
from shardwise.tasks.slot import Slot
from shardwise.tasks.wire import Payload, SharedFile

STACK_SIGNAL = signal.SIGUSR2
"""Makes a worker write the lines it stands in to its stack file."""

_FLUSH_SECONDS = 0.002
"""Results of tiny tasks travel together for at most so long."""

_NO_LIMIT = resource.RLIM_INFINITY


@final
class _Replies:
    """Collects how tasks ended and sends it, several at a time where they are quick."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._items: list[Any] = []
        self._files: list[SharedFile] = []
        self._bytes = 0
        self._last = time.monotonic()

    def add(self, item: Any, payload: Payload | None) -> None:
        wired = wire.to_wire(payload, self._files) if payload is not None else None
        self._items.append((*item, wired))
        self._bytes += 100 + (len(payload.data) if payload is not None else 0)
        if self._files or self._bytes > 32 * 1024 or time.monotonic() - self._last > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._items:
            wire.send(self._sock, self._items, self._files)
            self._items, self._files, self._bytes = [], [], 0
        self._last = time.monotonic()


def serve(sock: socket.socket, slot: Slot, stack_fd: int) -> None:
    """Work until the scheduler closes the socket."""
    faulthandler.register(STACK_SIGNAL, file=stack_fd, all_threads=False, chain=False)
    functions: dict[int, Payload] = {}
    replies = _Replies(sock)
    bench = Bench()
    while True:
        received = wire.receive(sock)
        if received is None:
            return
        (new, orders), descriptors = received
        for number, wired in new:
            functions[number] = wire.from_wire(wired, descriptors)
        for number, function_number, wired, wired_inputs, limit_bytes in orders:
            arguments = wire.from_wire(wired, descriptors)
            inputs = {index: wire.from_wire(one, descriptors) for index, one in wired_inputs}
            slot.begin(number, time.monotonic())
            told, result = bench.run(function_number, functions[function_number], arguments, inputs, limit_bytes)
            replies.add((number, *told), result)
        slot.rest()
        replies.flush()


@final
class Bench:
    """Runs tasks in this process, and keeps the functions it has been given."""

    def __init__(self) -> None:
        self._functions: dict[int, Callable[..., Any]] = {}
        self._memory = _Memory()
        try:
            self._folder: int | None = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # it was removed
            self._folder = None

    def run(
        self,
        function_number: int,
        function: Payload,
        arguments: Payload,
        inputs: Mapping[int, Payload],
        limit_bytes: int | None,
        *,
        end_children: bool = True,
    ) -> tuple[tuple[Any, float, int | None, tuple[str, ...]], Payload | None]:
        """Run one task: (told, seconds, peak bytes, remarks), and the payload of its result or exception."""
        self._memory.begin(limit_bytes)
        began = time.monotonic()
        told: tuple[Any, ...]
        try:
            call = self._functions.get(function_number)
            if call is None:
                call = self._functions[function_number] = function.decode()
            with handle.reading(inputs):
                positional, named = arguments.decode()
            value = call(*positional, **named)
            result: Payload | None = wire.encode(value)
            del value
            told = ("done",)
        except BaseException as error:  # noqa: BLE001  # even SystemExit and KeyboardInterrupt are the task's own end
            told = ("failed", _describe(error))
            result = _sendable(error)
            error.__traceback__ = None  # lets go of what the failed task held
        seconds = time.monotonic() - began
        if self._folder is not None:
            os.fchdir(self._folder)  # relative paths mean the same to the next task
        with contextlib.suppress(UnboundLocalError):
            del positional, named
        peak = self._memory.end(limit_bytes)
        return (told, seconds, peak, _end_children() if end_children else ()), result


def _describe(error: BaseException) -> tuple[str, str, str]:
    """(kind, one line, traceback from the task's own function on)."""
    # The first frame is this file's.
    trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
    details = "".join(traceback.format_exception(type(error), error, trace or error.__traceback__))
    line = traceback.format_exception_only(type(error), error)[-1].strip()
    if isinstance(error, SystemExit):
        return "exit", f"it asked to end the program ({line})", details
    out_of_memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))
    )
    return ("memory" if out_of_memory else "error"), line, details


def _sendable(error: BaseException) -> Payload | None:
    """The exception itself, where it survives the way; many with arguments of their own do not."""
    try:
        payload = wire.encode(error)
        payload.decode()
    except BaseException:  # noqa: BLE001  # runs the exception's own code
        return None
    return payload if not payload.sizes else None


@final
class _Memory:
    """Measures and limits the memory of one task in this process."""

    def __init__(self) -> None:
        self._page = resource.getpagesize()
        self._before = 0
        self._began = 0.0
        try:
            self._reset: int | None = os.open("/proc/self/clear_refs", os.O_WRONLY)
            self._figures: int | None = os.open("/proc/self/statm", os.O_RDONLY)
        except OSError:
            self._reset = self._figures = None

    def begin(self, limit_bytes: int | None) -> None:
        if self._figures is None or self._reset is None:
            return
        os.pwrite(self._reset, b"5", 0)  # proc(5): resets the peak resident set size
        figures = os.pread(self._figures, 256, 0).split()
        self._before = int(figures[1]) * self._page
        if limit_bytes is not None:
            # Counts private writable memory (man 2 getrlimit), so that neither libraries nor shared arrays count.
            data = int(figures[5]) * self._page
            resource.setrlimit(resource.RLIMIT_DATA, (data + limit_bytes, _NO_LIMIT))

    def end(self, limit_bytes: int | None) -> int | None:
        """Bytes at the peak beyond those at the start."""
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (_NO_LIMIT, _NO_LIMIT))
        if self._reset is None:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(0, peak - self._before)


def _end_children() -> tuple[str, ...]:
    """End the processes that a task left behind. This process adopts orphans below it, so that none gets away."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the usual case costs one call
        return ()
    left, ended = children(), []
    while left:
        for pid in left:
            name = _name(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                _, status = os.waitpid(pid, 0)
                if os.WIFSIGNALED(status):  # others had ended by themselves and only wanted to be asked
                    ended.append(name)
        left = children()
    _forget_helpers()
    if not ended:
        return ()
    shown = ", ".join(sorted(set(ended)))
    return (f"it left {len(ended)} {'process' if len(ended) == 1 else 'processes'} running, ended now: {shown}",)


def _forget_helpers() -> None:
    """Python's own helper processes were among those ended; the modules must start new ones when they need them."""
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    if tracker is not None:
        current: Any = tracker._resource_tracker
        current._fd = current._pid = None
    server = sys.modules.get("multiprocessing.forkserver")
    if server is not None:
        forkserver: Any = server._forkserver
        forkserver._forkserver_pid = forkserver._forkserver_alive_fd = None


def children() -> list[int]:
    """Processes below this one, of all its threads."""
    found = []
    try:
        threads = list(Path("/proc/self/task").iterdir())
    except OSError:
        return []
    for thread in threads:
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (thread / "children").read_text().split()]
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def set_threads(threads: int) -> None:
    """Compute threads of whatever library computes here: those still to be loaded, and those loaded already."""
    for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB", "BLIS"):
        os.environ[f"{name}_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
    if any(name in sys.modules for name in ("numpy", "scipy", "sklearn")):
        try:
            import threadpoolctl
        except ImportError:
            return  # the nursery loaded them with one thread each, which is never too many
        threadpoolctl.threadpool_limits(threads)


def draw_apart() -> None:
    """A fork has the generators of what it was forked from: without this all workers would draw the same numbers."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    # Python does it for its own generator.


def main(sock_fd: int, slot_fd: int, stack_fd: int, *, threads: int, environment: dict[str, str]) -> None:
    """The life of a worker after its fork."""
    os.environ.update(environment)
    set_threads(threads)
    draw_apart()
    slot = Slot(slot_fd)
    sock = socket.socket(fileno=sock_fd)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        serve(sock, slot, stack_fd)
