"""The same tasks on a local Ray, with the same results. Skipped where Ray is not installed (the extra `ray`)."""

from __future__ import annotations

import gc
import itertools
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shardwise import tasks
from shardwise.errors import UserError
from shardwise.tasks import wire
from shardwise.tasks.backend import Order, Reply
from shardwise.tasks.need import Allocation, Need
from shardwise.tasks.pool import Pool
from shardwise.tasks.ray_backend import RayWorker

pytest.importorskip("ray", reason="the Ray back end is not tested: pip install 'shardwise[ray]'")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with warnings.catch_warnings():
        # Ray leaves its processes, files and sockets to the garbage collector.
        warnings.simplefilter("ignore")
        with Pool(workers=2, on="ray", tokens={"licences": 1}) as made:
            yield made
        del made
        gc.collect()


def test_results_and_failures_are_those_of_local_processes(pool: Pool) -> None:
    def work(x: int) -> int:
        if x == 3:
            raise ValueError("three")
        if x == 5:
            os._exit(2)
        if x == 6:
            time.sleep(60)
        return x * x

    def ended(where: Pool) -> list[tuple[str, Any, str]]:
        outcomes = where.map(work, range(8), errors="return", timeout=1.5).outcomes()
        return [(one.state, one.value, type(one.failure.error).__name__ if one.failure else "") for one in outcomes]

    there = ended(pool)
    with Pool(workers=2) as here:
        assert there == ended(here)
    assert [state for state, *_ in there].count("failed") == 3


def test_arrays_and_a_graph(pool: Pool) -> None:
    array = np.arange(1 << 18)
    assert list(pool.map(lambda a: int(a.sum()), [array, array * 2])) == [array.sum(), 2 * array.sum()]
    with pool.graph() as graph:
        made = graph.add(np.ones, 1 << 18)
        total = graph.add(np.sum, made)
        good = graph.add(lambda t: "large", total, when=lambda t: t > 10)
        bad = graph.add(lambda t: "small", total, when=lambda t: t <= 10)
        graph.run()
        assert graph.result(total) == 1 << 18
        assert graph.result(good) == "large" and graph.outcome(bad).state == "skipped"


def test_resources_and_retries(pool: Pool) -> None:
    def span(_: int) -> tuple[float, float]:
        began = time.time()
        time.sleep(0.1)
        return began, time.time()

    spans = list(pool.map(span, range(4), tokens={"licences": 1}, cores=0.5))
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))
    (outcome,) = pool.map(lambda _: os._exit(1), [0], errors="return", retries=1).outcomes()
    assert outcome.attempts == 2 and outcome.failure is not None and outcome.failure.kind == "killed"
    with pytest.raises(UserError, match="9 cores"):
        pool.map(len, ["a"], cores=9)


def test_the_start_of_a_process_takes_none_of_a_tasks_time(pool: Pool) -> None:
    backend, need = pool.engine.backend, Need(cores=0.125)
    worker = backend.open(Allocation(need, (), 0.0, 0))
    assert worker.send([Order(1, 10**6, wire.encode_function(len), wire.encode((("four",), {})))])
    assert worker.current() is None
    (reply,) = backend.wait(None)
    assert isinstance(reply, Reply) and reply.told == ("done",)
    assert worker.send([Order(2, 10**6, wire.encode_function(len), wire.encode((("four",), {})))])
    assert worker.current() is not None
    assert len(backend.wait(None)) == 1
    backend.release(worker)


def test_another_thread_wakes_a_wait(pool: Pool, tmp_path: Path) -> None:
    def wait_for(path: Path) -> bool:
        for _ in range(400):
            if path.exists():
                return True
            time.sleep(0.05)
        return False

    engine, path, heard = pool.engine, tmp_path / "go", []
    make, options = (lambda: wire.encode(((path,), {}))), tasks.Options()
    engine.submit(wait_for, make, lambda _, ending: heard.append(ending.state), name="wait", options=options)
    engine.step(0)
    engine.backend.wake()
    assert engine.backend.wait(None) == []  # and not the end of the task
    path.touch()
    while not heard:
        engine.step(None)
    assert heard == ["done"]


def test_an_end_after_that_of_ray_starts_no_other_ray() -> None:
    killed: list[object] = []
    gone = SimpleNamespace(is_initialized=lambda: False, kill=killed.append)
    actor = SimpleNamespace(born=SimpleNamespace(remote=object))
    RayWorker(gone, actor, (1, 1.0, 0)).kill()
    assert killed == []


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="the cluster's own"):
        Pool(on="ray", memory="1GiB")
    with pytest.raises(UserError, match="give None for this machine"):
        tasks.map(len, ["a"], on="moon")
