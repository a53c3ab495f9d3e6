"""tasks.Graph: results along the edges, conditions, tasks added on the way, and what a failure does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shardwise import tasks
from shardwise.errors import UserError
from shardwise.tasks.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(workers=2) as made:
        yield made


def add(*numbers: Any) -> Any:
    return sum(numbers)


def same(value: Any) -> Any:
    return value


def slow(value: Any) -> Any:
    """Long enough that nothing is laid ready behind it."""
    time.sleep(0.05)
    return value


def write_late(place: Any) -> None:
    time.sleep(0.1)
    place.write_text("x")


def fail(*_: Any) -> None:
    raise ValueError("no luck")


def test_results_flow_along_the_edges(pool: Pool) -> None:
    with pool.graph() as graph:
        one = graph.add(same, 1)
        two = graph.add(same, 2)
        three = graph.add(add, one, two)
        nested = graph.add(lambda tree: tree["list"][0] + tree["list"][1][0], {"list": [three, (two, 5)]})
        named = graph.add(lambda a, *, b: (a, b), one, b=nested)
        graph.run()
        assert graph.result(three) == 3
        assert graph.result(nested) == 5
        assert graph.result(named) == (1, 5)


def test_large_results_pass_through_without_copies(pool: Pool) -> None:
    with pool.graph() as graph:
        made = graph.add(np.ones, 1 << 20)
        parts = [graph.add(lambda array, n: float(array[n:].sum()), made, n) for n in range(4)]
        graph.run()
        assert [graph.result(part) for part in parts] == [float((1 << 20) - n) for n in range(4)]


def test_a_shared_value_is_stored_once(pool: Pool) -> None:
    with pool.graph() as graph:
        array = graph.share(np.arange(1 << 20))
        sums = [graph.add(lambda a, k: int(a[k]), array, k) for k in range(5)]
        graph.run()
        assert [graph.result(one) for one in sums] == list(range(5))


def test_conditions_choose_what_runs(pool: Pool) -> None:
    """A branch: exactly one side runs, and what joins them takes the one that did."""
    with pool.graph() as graph:
        score = graph.add(same, 0.7)
        good = graph.add(lambda s: f"promoted {s}", score, when=lambda s: s > 0.5)
        bad = graph.add(lambda s: f"stopped {s}", score, when=lambda s: s <= 0.5)
        after_bad = graph.add(same, bad)
        joined = graph.add(lambda a, b: a or b, good, bad, needs_all=False)
        gated = graph.add(same, 1, after=[score, good], when=lambda s, text: s < 0.1 and text)
        graph.run()
        states = [graph.outcome(handle).state for handle in (good, bad, after_bad, joined, gated)]
        assert states == ["done", "skipped", "skipped", "done", "skipped"]
        assert graph.result(joined) == "promoted 0.7"
        with pytest.raises(tasks.TaskFailed, match="skipped"):
            graph.result(bad)


def test_tasks_are_added_and_cancelled_on_the_way(pool: Pool) -> None:
    """A search that goes on from what it finds, and calls off the rest when it has found it."""
    with pool.graph() as graph:
        graph.add(same, 1)
        slow = graph.add(time.sleep, 60)
        seen = []
        for handle, outcome in graph.stream():
            if outcome.state == "done":
                seen.append(outcome.value)
                if outcome.value < 32:
                    graph.add(add, handle, handle)
                else:
                    graph.cancel(slow)
        assert seen == [1, 2, 4, 8, 16, 32]
        assert graph.outcome(slow).state == "cancelled"


def test_a_failure_reaches_what_waits_for_it_and_nothing_else(pool: Pool) -> None:
    with pool.graph() as graph:
        bad = graph.add(fail, name="bad")
        behind = graph.add(same, bad)
        far_behind = graph.add(same, behind)
        other = graph.add(same, 3)
        tolerant = graph.add(lambda a, b: (a, b), bad, other, needs_all=False)
        wrong = graph.add(same, 1, after=[other], when=lambda value: value.nothing)
        graph.run()
        assert graph.result(other) == 3
        assert graph.result(tolerant) == (None, 3)
        for handle in (behind, far_behind):
            failure = graph.outcome(handle).failure
            assert failure is not None and failure.kind == "dependency"
            assert failure.message == "the task it waits for failed, bad: ValueError: no luck"
        failure = graph.outcome(wrong).failure
        assert failure is not None and "condition failed" in failure.message
        with pytest.raises(tasks.TaskFailed, match="task bad failed: ValueError: no luck"):
            graph.result(bad)


def test_order_only(pool: Pool, tmp_path: Any) -> None:
    with pool.graph() as graph:
        first = graph.add(write_late, tmp_path / "a")
        second = graph.add(lambda: (tmp_path / "a").exists(), after=[first])
        graph.run()
        assert graph.result(second) is True


def test_priority_and_the_critical_path() -> None:
    with Pool(workers=1) as one, one.graph() as graph:
        graph.add(slow, "low", options=tasks.Options(priority=-1))
        graph.add(slow, "short", options=tasks.Options(seconds=1))
        head = graph.add(slow, "head of a chain", options=tasks.Options(seconds=1))
        graph.add(lambda _: slow("its tail"), head, options=tasks.Options(seconds=5))
        graph.add(slow, "high", options=tasks.Options(priority=1))
        order = [outcome.value for _, outcome in graph.stream()]
    assert order == ["high", "head of a chain", "its tail", "short", "low"]


def test_wrong_use_is_refused(pool: Pool) -> None:
    with pool.graph() as graph, pool.graph() as other:
        handle = graph.add(same, 1)
        foreign = other.add(same, 1)
        with pytest.raises(UserError, match="not of this graph"):
            graph.add(same, foreign)
        with pytest.raises(UserError, match="has not ended"):
            graph.result(handle)
        with pytest.raises(UserError, match="cannot be sent"):
            graph.add(same, (item for item in [1]))
        with pytest.raises(UserError, match="7 cores"):
            graph.add(same, 1, options=tasks.Options(cores=7))
        with pytest.raises(tasks.TaskFailed, match="can only be sent as an argument"):
            list(pool.map(same, [handle]))
    with pytest.raises(UserError, match="closed"):
        graph.add(same, 1)


def test_a_long_chain_and_a_wide_fan(pool: Pool) -> None:
    with pool.graph() as graph:
        last = graph.add(same, 0)
        for _ in range(300):
            last = graph.add(add, last, 1)
        total = graph.add(lambda items: sum(items), [graph.add(same, n) for n in range(500)])
        graph.run()
        assert graph.result(last) == 300
        assert graph.result(total) == sum(range(500))


def test_waiting_says_what_for() -> None:
    with Pool(workers=1, tokens={"licences": 1}) as one, one.graph() as graph:
        slow = graph.add(time.sleep, 0.3, options=tasks.Options(cores=0.5, tokens={"licences": 1}))
        graph.add(same, 1, options=tasks.Options(cores=0.5, tokens={"licences": 1}))
        graph.add(same, slow)
        one.engine.step(0.01)
        assert graph.waiting() == {"licences": 1, "other tasks": 1}
        graph.run()
