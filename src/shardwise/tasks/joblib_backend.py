"""joblib on shardwise's workers: `joblib.parallel_config(backend="shardwise")`, and with it scikit-learn's `n_jobs`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, final

import joblib
from joblib._parallel_backends import AutoBatchingMixin, FallbackToBackend, SequentialBackend
from joblib.parallel import ParallelBackendBase

from shardwise.run.cores import usable_cores
from shardwise.tasks.driver import Driver


@final
class ShardwiseBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """The workers stay warm for as long as the `parallel_config` block that made the backend."""

    supports_retrieve_callback = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._driver: Driver | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Workers that `n_jobs` means: -1 is all cores this process may use, -2 all but one."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(1, usable_cores() + 1 + n_jobs)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """Make a pool of so many workers, or keep the one there is."""
        count = self.effective_n_jobs(n_jobs)
        if count == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        if self._driver is not None and self._driver.workers != count:
            self._close()
        if self._driver is None:
            self._driver = Driver(count)
            self._end = weakref.finalize(self, self._driver.close)
        self.parallel = parallel
        return count

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], Any] | None = None) -> Future[Any]:
        """Run a batch of calls."""
        assert self._driver is not None
        future = self._driver.submit(func)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        """The result of a batch; raises what it raised."""
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """A call failed: the others need not go on."""
        if self._driver is not None:
            self._driver.cancel_all()

    def terminate(self) -> None:
        """A Parallel has ended. The workers stay warm for the next one."""
        self.reset_batch_stats()
        self.parallel = None  # which refers to us: the workers end with the last reference, not with the garbage

    def get_nested_backend(self) -> tuple[Any, None]:
        """Parallel calls inside a task run in it, one after the other: each task has one core."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None

    def _close(self) -> None:
        if self._end is not None:
            self._end()
        self._driver = self._end = None


def register_joblib() -> None:
    """Make `joblib.parallel_config(backend="shardwise")` known to joblib."""
    joblib.register_parallel_backend("shardwise", ShardwiseBackend)
