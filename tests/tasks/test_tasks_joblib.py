"""joblib and scikit-learn on shardwise's workers."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import Any

import numpy as np
import pytest

from shardwise import tasks
from shardwise.tasks.pool import Pool

joblib = pytest.importorskip("joblib", reason="the joblib backend needs joblib: pip install joblib")


@pytest.fixture(autouse=True)
def _registered() -> None:
    tasks.register_joblib()


def test_parallel_calls_in_order_on_warm_workers() -> None:
    with joblib.parallel_config(backend="shardwise", n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(math.sqrt)(i**2) for i in range(300)) == [float(i) for i in range(300)]
        first = set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(40)))
        again = set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(40)))
    assert os.getpid() not in first | again
    assert len(first | again) <= 2


def test_results_as_a_generator_and_local_functions() -> None:
    offset = 3
    with joblib.parallel_config(backend="shardwise", n_jobs=2):
        results = joblib.Parallel(return_as="generator")(joblib.delayed(lambda x: x + offset)(i) for i in range(20))
        assert list(results) == list(range(3, 23))
        arrays = joblib.Parallel()(joblib.delayed(np.square)(np.full(200_000, i)) for i in range(4))
    assert [array[0] for array in arrays] == [0, 1, 4, 9]


def test_exceptions_keep_their_class_and_the_backend_goes_on() -> None:
    with joblib.parallel_config(backend="shardwise", n_jobs=2):
        with pytest.raises(ValueError, match="negative"):
            joblib.Parallel()(joblib.delayed(_positive)(i) for i in (1, 2, -1, 3))
        assert joblib.Parallel()(joblib.delayed(_positive)(i) for i in (4, 5)) == [4, 5]
        with pytest.raises(tasks.TaskFailed, match="SIGKILL"):
            joblib.Parallel()(joblib.delayed(lambda: os.kill(os.getpid(), signal.SIGKILL))() for _ in range(1))
        assert joblib.Parallel()(joblib.delayed(_positive)(i) for i in (6, 7)) == [6, 7]


def _positive(x: int) -> int:
    if x < 0:
        raise ValueError("negative")
    return x


_positive.__module__ = "__main__"  # a worker cannot import this test: it travels as code


def test_the_workers_end_with_the_block() -> None:
    with joblib.parallel_config(backend="shardwise", n_jobs=2):
        pids = set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(10)))
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_grid_search_of_scikit_learn() -> None:
    sklearn: Any = pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import GridSearchCV

    assert sklearn.__version__
    inputs, targets = load_digits(return_X_y=True)
    inputs, targets = inputs[:400], targets[:400]

    def search(n_jobs: int | None) -> Any:
        forest = RandomForestClassifier(n_estimators=5, random_state=0)
        return GridSearchCV(forest, {"max_depth": [2, 4, 8], "max_features": [4, 8]}, cv=3, n_jobs=n_jobs).fit(
            inputs, targets
        )

    alone = search(None)
    with joblib.parallel_config(backend="shardwise"):
        together = search(2)
    assert together.best_params_ == alone.best_params_
    assert np.array_equal(together.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    assert together.best_score_ > 0.6


def test_a_pool_can_hold_a_joblib_call() -> None:
    """Nested: inside a task, a Parallel runs in the task's own process."""
    with Pool(workers=1) as pool:
        (inner,) = pool.map(lambda n: len(joblib.Parallel(n_jobs=1)(joblib.delayed(abs)(i) for i in range(n))), [5])
    assert inner == 5
