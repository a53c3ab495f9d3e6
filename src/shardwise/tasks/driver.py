"""A pool driven by a thread of its own, for callers that hand in work from anywhere and wait for futures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, final

from shardwise.tasks import wire
from shardwise.tasks.options import Options
from shardwise.tasks.pool import Pool
from shardwise.tasks.task import Ending, Task

_IDLE_SECONDS = 60.0


@final
class Driver:
    """Runs calls without arguments, such as joblib's batches, in a pool. Its methods may be called from any thread."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = Pool(workers=workers)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._open: dict[Task, Future[Any]] = {}
        self._options = Options()
        self._thread = threading.Thread(target=self._drive, name="shardwise tasks", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run `call()` in a worker. The future raises what the call raised, or a TaskFailed with the cause."""
        future: Future[Any] = Future()
        # Pickled here, where the caller sees what cannot be sent, and the array cannot have changed meanwhile.
        payload = wire.encode(((call,), {}))

        def begin() -> None:
            task = self._pool.engine.submit(
                call_it, lambda: payload, self._hear, name="a joblib call", options=self._options
            )
            self._open[task] = future

        self._ask(begin)
        return future

    def cancel_all(self) -> None:
        """Nothing that was handed in so far needs to go on."""

        def cancel() -> None:
            for task in list(self._open):
                self._pool.engine.cancel(task)

        self._ask(cancel)

    def close(self) -> None:
        """End the workers and the thread."""
        self._closed = True
        self._ask(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _ask(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()
        self._pool.engine.backend.wake()

    def _drive(self) -> None:
        engine = self._pool.engine
        try:
            while not self._closed:
                self._wake.clear()
                while self._commands:
                    self._commands.popleft()()
                if engine.busy:
                    engine.step(_IDLE_SECONDS)
                elif not self._closed:
                    self._wake.wait()
        except BaseException as error:  # noqa: BLE001  # nobody else would hear of it
            for future in self._open.values():
                future.set_exception(error)
            self._open.clear()
        finally:
            self._pool.close()

    def _hear(self, task: Task, ending: Ending) -> None:
        future = self._open.pop(task, None)
        if future is None:
            return
        if ending.state == "done" and ending.payload is not None:
            try:
                future.set_result(ending.payload.decode())
            except Exception as error:  # noqa: BLE001  # unpickling runs the result's own code
                future.set_exception(error)
        elif ending.failure is None:
            future.cancel()
            future.set_running_or_notify_cancel()
        else:
            future.set_exception(ending.failure.error or ending.failure.raised("a joblib call"))


def call_it(call: Callable[[], Any]) -> Any:
    """What a worker runs."""
    return call()
