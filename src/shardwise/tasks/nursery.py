"""The nursery: a small process with one thread that forks the workers, buries them, and ends what they leave.

Workers are forked here and not in the user's process, which may have threads, an OpenMP pool or a GPU context that no
child survives. What it has imported, its workers have as shared pages, so an import is paid once. Each worker has a
process group of its own; when one ends, however it ends, the rest of its group is ended too. When the scheduler ends,
even by SIGKILL, the nursery sees its socket close and takes the workers along; should the nursery be killed, the
kernel ends the workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing.process
import os
import selectors
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, final

from shardwise.tasks import wire, worker

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36

_LOOK_SECONDS = 1.0
"""How often to look whether the scheduler is there: what it has forked may hold its end of the socket open."""


@final
class _Nursery:
    def __init__(self, sock: socket.socket, scheduler: int) -> None:
        self._sock = sock
        self._scheduler = scheduler
        self._workers: set[int] = set()
        self._wake_read, self._wake_write = socket.socketpair()

    def run(self) -> None:
        self._wake_write.setblocking(False)
        self._wake_read.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while os.getppid() == self._scheduler:
                for key, _ in selector.select(_LOOK_SECONDS):
                    if key.fileobj is self._wake_read:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_read.recv(4096)
                        self._bury()
                    elif not self._obey(selector):
                        return

    def _obey(self, selector: selectors.BaseSelector) -> bool:
        received = wire.receive(self._sock)
        if received is None:
            return False
        (kind, *rest), descriptors = received
        if kind == "fork":
            self._fork(rest[0], rest[1], descriptors, selector)
        elif kind == "kill":
            # Only what has not been buried: its number cannot have gone to another process.
            if rest[0] in self._workers:
                os.kill(rest[0], signal.SIGKILL)
        elif kind == "import":
            self._import(rest[0])
        return True

    def _import(self, names: list[str]) -> None:
        for name in names:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001  # the task that needs it will say so itself
                sys.stderr.write(f"shardwise: cannot import {name} ahead of the tasks\n{traceback.format_exc()}")

    def _fork(
        self, token: int, options: dict[str, Any], descriptors: list[int], selector: selectors.BaseSelector
    ) -> None:
        # Blocked until the child has its own handlers, so that no signal meets the nursery's in it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            pid = os.fork()
        except OSError as error:
            wire.send(self._sock, ("refused", token, str(error)))
            return
        finally:
            if "pid" not in locals() or pid:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if pid == 0:
            self._be_worker(options, descriptors, selector)
        for fd in descriptors:
            os.close(fd)
        self._workers.add(pid)
        wire.send(self._sock, ("forked", token, pid))

    def _be_worker(self, options: dict[str, Any], descriptors: list[int], selector: selectors.BaseSelector) -> None:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            os.setpgid(0, 0)
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            prctl(_PR_SET_CHILD_SUBREAPER, 1)
            selector.close()
            self._sock.close()
            self._wake_read.close()
            self._wake_write.close()
            # When the machine is out of memory, the kernel ends a task and not the scheduler.
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("1000")
            worker.main(*descriptors, **options)
            code = 0
        except BaseException:  # noqa: BLE001  # nothing may get out of a forked process but its exit code
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _bury(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            known = pid in self._workers
            if known:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if known:
                self._workers.discard(pid)
                self._end_orphans()
                wire.send(self._sock, ("died", pid, status))

    def _end_orphans(self) -> None:
        """What a dead worker had started in process groups of their own has become our child."""
        for pid in worker.children():
            if pid not in self._workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def main() -> None:
    """Entry of the nursery's process: `python -m shardwise.tasks.nursery FD SCHEDULER_PID`."""
    fd, scheduler = int(sys.argv[1]), int(sys.argv[2])
    sock = socket.socket(fileno=fd)
    received = wire.receive(sock)
    if received is None or os.getppid() != scheduler:
        return
    setup, _ = received
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    sys.path[:] = setup["path"]
    sys.argv[:] = setup["argv"]
    multiprocessing.process.current_process().authkey = setup["authkey"]
    worker.set_threads(1)
    nursery = _Nursery(sock, scheduler)
    nursery._import(["cloudpickle", *setup["preload"]])
    # What is imported now is shared by all workers, and not theirs to collect.
    import gc

    gc.collect()
    gc.freeze()
    try:
        nursery.run()
    except ConnectionError:
        pass  # the scheduler went while it was told of a death; what is left of the workers ends below
    except Exception:  # noqa: BLE001  # told, since the exit below would hide it
        traceback.print_exc()
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for pid in nursery._workers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        # Taking torch's modules apart takes a quarter of a second, for which the scheduler would wait.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
