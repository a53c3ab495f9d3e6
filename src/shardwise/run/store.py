"""The key-value stores through which the workers of a run find each other.

No store server runs in the launcher. torch's TCPStore looks up the *name* of every address it talks to, in the server's
thread and in the clients. A process that is forked while such a thread is inside the resolver inherits the resolver's
lock, held for ever, and hangs in its own first look-up; and every lost DNS packet costs a connection five seconds. So:

- one node: a file in memory. Nothing to connect to, nothing to look up, nothing left behind.
- several nodes: a TCPStore in a process of its own, beside the launcher of node 0.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import final

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from shardwise.run.process import StartMethod, default_start_method, end_with_launcher, path_for_worker


@final
class StoreFile:
    """An empty file for a FileStore, at `path` for the workers of this process until `close`."""

    def __init__(self, method: StartMethod) -> None:
        self._fd: int | None = None
        if sys.platform == "linux":
            self._fd = os.memfd_create("shardwise store")
            self.path = path_for_worker(self._fd, method)
        else:
            handle, self.path = tempfile.mkstemp(prefix="shardwise-store-")
            os.close(handle)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        else:
            Path(self.path).unlink(missing_ok=True)


@final
class StoreServer:
    """A TCPStore server at host:port in a process of its own, until `close` or the end of the launcher.

    Raises:
        OSError: the address cannot be listened at; says why.
    """

    def __init__(self, host: str, port: int) -> None:
        context = multiprocessing.get_context(default_start_method("cpu"))
        ours, theirs = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=_serve, args=(host, port, os.getpid(), theirs), name="shardwise store"
        )
        self._process.start()
        theirs.close()
        with ours:
            try:
                problem = ours.recv()
            except EOFError:
                problem = "its process ended"
        if problem:
            self.close()
            raise OSError(problem)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(host: str, port: int, launcher_pid: int, pipe: Connection) -> None:
    end_with_launcher(launcher_pid)
    os.setpgid(0, 0)  # Ctrl-C in a terminal is for the launcher, which ends us last
    try:
        store = TCPStore(host, port, is_master=True, wait_for_workers=False)
    except (DistError, OSError) as error:
        pipe.send(str(error))
        return
    pipe.send("")
    pipe.close()
    while True:
        signal.pause()
        assert store is not None
