"""Tasks on processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from shardwise.errors import RunFailed
from shardwise.run.available import available_memory, memory_figures
from shardwise.tasks import wire
from shardwise.tasks.backend import Backend, Death, Event, Order, Reply, Worker
from shardwise.tasks.need import Allocation, Capacity, device_environment
from shardwise.tasks.slot import Slot, new_slot_file
from shardwise.tasks.wire import SharedFile
from shardwise.tasks.worker import STACK_SIGNAL

START_SECONDS = 60.0
"""Longest wait for the nursery to fork a worker; imports ahead of the tasks are part of it the first time."""

LEAST_MEMORY = 256 * 1024**2
"""Bytes of available memory below which the largest task is ended, before the kernel picks a process."""


@final
class LocalWorker(Worker):
    """A worker forked by the nursery."""

    def __init__(self, backend: LocalBackend, threads: int, devices: tuple[str, ...]) -> None:
        self.threads, self.devices = threads, devices
        self.pid = 0
        self.alive = True
        self._backend = backend
        self._known: set[int] = set()
        # We keep its end as well: what it has not taken yet can be taken back.
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        slot_file = SharedFile(new_slot_file(), 0)
        self._stack = SharedFile(os.memfd_create("shardwise-stack"), 0)
        self._slot = Slot(slot_file.fd)
        self.descriptors = [self._theirs.fileno(), slot_file.fd, self._stack.fd]
        self._slot_file = slot_file

    def send(self, orders: Sequence[Order]) -> bool:
        if not self.alive:
            return False
        files: list[SharedFile] = []
        new = {order.function_number: order for order in orders if order.function_number not in self._known}
        functions = [(number, wire.to_wire(order.function, files)) for number, order in new.items()]
        items = [
            (
                order.number,
                order.function_number,
                wire.to_wire(order.arguments, files),
                [(number, wire.to_wire(payload, files)) for number, payload in order.inputs],
                order.memory_bytes,
            )
            for order in orders
        ]
        try:
            sent = wire.send(self.ours, (functions, items), files)
        except (BrokenPipeError, ConnectionResetError):
            return False  # its death is about to be told
        if sent:
            self._known.update(new)
        return sent

    def recall(self) -> list[int]:
        numbers: list[int] = []
        while self.alive:
            try:
                # One reader gets each packet, the worker or we: nothing is run twice or lost. What the worker's own
                # blocking read has taken is out of reach.
                body, extra, _, _ = self._theirs.recvmsg(wire.MESSAGE_ROOM, wire.ROOM, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            (functions, items), descriptors = wire.unpack(body, extra)
            for fd in descriptors:
                os.close(fd)
            self._known.difference_update(number for number, _ in functions)
            numbers += [item[0] for item in items]
        return numbers

    def current(self) -> tuple[int, float] | None:
        return self._slot.read() if self.alive else None

    def where(self) -> str:
        """Asks the worker, which answers from a signal handler, so also from within native code that never returns."""
        if not self.alive:
            return ""
        try:
            os.kill(self.pid, STACK_SIGNAL)
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                time.sleep(0.02)
                text = os.pread(self._stack.fd, 1 << 16, 0)
                if text:
                    return _own_lines(text.decode(errors="replace"))
        except OSError:
            pass
        return ""

    def kill(self) -> None:
        if self.alive:
            self._backend.tell_nursery(("kill", self.pid))

    def resident_bytes(self) -> int:
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):
            return 0

    def close(self) -> None:
        self.alive = False
        hang_up(self.ours)
        self._theirs.close()
        self._slot.close()


@final
class LocalBackend(Backend):
    """Warm processes under one nursery, which is started with the first worker."""

    def __init__(self, capacity: Capacity, preload: Sequence[str] = ()) -> None:
        self._capacity = capacity
        self._preload = list(preload)
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._nursery: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._workers: dict[int, LocalWorker] = {}
        self._starting: dict[int, LocalWorker] = {}
        self._idle: list[LocalWorker] = []
        self._early: list[Event] = []
        self._token = 0
        self._kernel_kills = _kernel_kills()
        self._owner = os.getpid()

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def prepare(self) -> None:
        if self._nursery is None:
            self._start_nursery()

    def open(self, allocation: Allocation) -> Worker:
        threads, devices = allocation.need.threads, allocation.devices
        for index in range(len(self._idle) - 1, -1, -1):  # the last used is the warmest
            worker = self._idle[index]
            if (worker.threads, worker.devices) == (threads, devices):
                del self._idle[index]
                return worker
        if len(self._idle) >= 2 * max(1, int(self._capacity.cores)):
            oldest = self._idle.pop(0)
            self._forget(oldest)  # it ends when its socket closes
        return self._start(threads, devices)

    def release(self, worker: Worker) -> None:
        assert isinstance(worker, LocalWorker)
        if worker.alive:
            self._idle.append(worker)

    def wait(self, timeout_seconds: float | None) -> list[Event]:
        events, self._early = self._early, []
        for key, _ in self._selector.select(0 if events else timeout_seconds):
            if key.fileobj is self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
            elif key.data is None:
                self._hear_nursery(events)
            elif key.data.alive:
                self._drain(key.data, events)
        return events

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_write.send(b"w")

    def close(self) -> None:
        if self._owner != os.getpid():  # in a process that the user forked: the workers are not ours
            return
        idle = not self._workers
        for worker in list(self._workers.values()):
            self._forget(worker)
        for worker in self._starting.values():
            worker.close()
        if self._nursery is not None:
            assert self._line is not None
            hang_up(self._line)
            if idle:
                self._nursery.kill()  # it may be in the middle of its imports
            self._nursery.wait()
            self._nursery = self._line = None
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    @property
    def short_of_memory(self) -> bool:
        total = memory_figures().get("MemTotal", 0)
        return available_memory() < max(LEAST_MEMORY, total // 50)

    def tell_nursery(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # its end is about to be heard
            assert self._line is not None
            wire.send(self._line, message)

    def _start(self, threads: int, devices: tuple[str, ...]) -> LocalWorker:
        if self._nursery is None:
            self._start_nursery()
        assert self._line is not None
        worker = LocalWorker(self, threads, devices)
        self._token += 1
        environment = device_environment(devices) if self._capacity.gpus or devices else {}
        options = {"threads": threads, "environment": environment}
        lent = [SharedFile(os.dup(fd), 0) for fd in worker.descriptors]
        self._starting[self._token] = worker
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wire.send(self._line, ("fork", self._token, options), lent)
        deadline = time.monotonic() + START_SECONDS
        while not worker.pid and worker.alive:
            # Nothing but this line: whatever else it brings is kept for the next wait.
            with selectors.DefaultSelector() as only:
                only.register(self._line, selectors.EVENT_READ)
                if not only.select(max(0.0, deadline - time.monotonic())):
                    raise RunFailed(f"no worker was started within {START_SECONDS:g} s: the machine is overloaded")
            self._hear_nursery(self._early)
            if self._line is None:
                raise RunFailed("the process that starts the workers was ended while one was starting")
        self._selector.register(worker.ours, selectors.EVENT_READ, worker)
        return worker

    def _start_nursery(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
        command = [sys.executable, *flags, "-m", "shardwise.tasks.nursery", str(theirs.fileno()), str(os.getpid())]
        # A session of its own: Ctrl-C in the terminal is for the scheduler, which ends the others.
        self._nursery = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._line = ours
        key = multiprocessing.process.current_process().authkey  # with it, tasks may use managers of the program
        setup = {"path": list(sys.path), "argv": sys.argv[:1], "preload": self._preload, "authkey": bytes(key)}
        wire.send(ours, setup)
        self._selector.register(ours, selectors.EVENT_READ, None)

    def _hear_nursery(self, events: list[Event]) -> None:
        assert self._line is not None
        received = wire.receive(self._line)
        if received is None:
            self._nursery_ended(events)
            return
        (kind, *rest), _ = received
        if kind == "forked":
            worker = self._starting.pop(rest[0])
            worker.pid = rest[1]
            self._workers[worker.pid] = worker
        elif kind == "refused":
            worker = self._starting.pop(rest[0])
            worker.close()
            raise RunFailed(f"no further worker can be started: {rest[1]}")
        elif kind == "died":
            pid, status = rest
            if pid in self._workers:
                self._died(self._workers[pid], status, events)

    def _died(self, worker: LocalWorker, status: int, events: list[Event]) -> None:
        self._drain(worker, events)  # what it had told before it ended
        current = worker.current()
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        kills = _kernel_kills()
        out_of_memory = number == signal.SIGKILL and kills > self._kernel_kills
        self._kernel_kills = kills
        self._forget(worker)
        events.append(
            Death(
                worker=worker,
                running=current[0] if current is not None else None,
                signal_number=number,
                exit_code=None if number is not None else os.waitstatus_to_exitcode(status),
                out_of_memory=out_of_memory,
                seconds=time.monotonic() - current[1] if current is not None else 0.0,
            )
        )

    def _nursery_ended(self, events: list[Event]) -> None:
        assert self._nursery is not None and self._line is not None
        self._selector.unregister(self._line)
        self._line.close()
        self._nursery.wait()
        self._nursery = self._line = None
        for worker in [*self._workers.values(), *self._starting.values()]:
            if worker.pid:
                self._drain(worker, events)
                events.append(Death(worker=worker, running=None, signal_number=None, exit_code=None, lost=True))
            self._forget(worker)
        self._starting.clear()

    def _drain(self, worker: LocalWorker, events: list[Event]) -> None:
        while True:
            try:
                received = wire.receive(worker.ours)
            except BlockingIOError:
                return
            if received is None:
                return
            items, descriptors = received
            for number, told, seconds, peak, remarks, wired in items:
                payload = wire.from_wire(wired, descriptors) if wired is not None else None
                events.append(Reply(worker, number, told, seconds, peak, remarks, payload))

    def _forget(self, worker: LocalWorker) -> None:
        if not worker.alive:
            return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.ours)
        self._workers.pop(worker.pid, None)
        if worker in self._idle:
            self._idle.remove(worker)
        worker.close()


def hang_up(sock: socket.socket) -> None:
    """Close a connection for the other end too, though a process that the user forked may hold a copy of ours."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _own_lines(stack: str) -> str:
    """The task's part of a stack, without what called it."""
    lines = stack.splitlines()
    ours = [number for number, line in enumerate(lines) if "/shardwise/tasks/worker.py" in line]
    return "\n".join(lines[: ours[0]] if ours else lines) + "\n"


def _kernel_kills() -> int:
    """How often the kernel has ended a process because memory had run out."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
