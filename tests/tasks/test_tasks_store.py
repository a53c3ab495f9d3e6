"""The store: kill -9 of the scheduler at any moment loses no finished result, and a resumed run does only the rest."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shardwise import tasks
from shardwise.errors import FolderError, UserError
from shardwise.tasks.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(workers=2) as made:
        yield made


PROGRAM = """
import sys, time
from pathlib import Path
from shardwise import tasks

ran = Path(sys.argv[2])

def work(x):
    time.sleep(0.01)
    with ran.open("a") as file:
        file.write(f"{x}\\n")
    return x * x

if __name__ == "__main__":
    for result in tasks.map(work, range(40), workers=2, store=sys.argv[1], resume=True):
        print(result, flush=True)
"""


def test_a_killed_scheduler_loses_no_result_it_has_told(tmp_path: Path) -> None:
    program, store, ran = tmp_path / "program.py", tmp_path / "store.sqlite", tmp_path / "ran"
    program.write_text(PROGRAM)
    chance = random.Random(0)
    told: set[str] = set()
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, str(program), str(store), str(ran)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 12)):
            told.add(process.stdout.readline())
        process.kill()
        told |= set(process.stdout.readlines())
        process.wait()
        process.stdout.close()
    with contextlib.closing(sqlite3.connect(store)) as base:
        kept = base.execute("SELECT COUNT(*) FROM tasks WHERE state = 'done'").fetchone()[0]
    assert kept >= len(told) > 3
    runs_before = len(ran.read_text().splitlines())
    done = subprocess.run(
        [sys.executable, str(program), str(store), str(ran)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(x * x) for x in range(40)]
    assert len(ran.read_text().splitlines()) - runs_before == 40 - kept


def test_only_what_is_missing_runs(pool: Pool, tmp_path: Path) -> None:
    store, fixed = tmp_path / "store.sqlite", tmp_path / "fixed"

    def work(x: int) -> int:
        if x == 2 and not fixed.exists():
            raise ValueError("two")
        return x

    first = list(pool.map(work, range(4), store=store, errors="return").outcomes())
    assert [outcome.state for outcome in first] == ["done", "done", "failed", "done"]
    with pytest.raises(FolderError, match="holds 3 results"):
        pool.map(work, range(4), store=store)
    fixed.touch()
    second = list(pool.map(work, range(6), store=store, resume=True).outcomes())
    assert [outcome.value for outcome in second] == list(range(6))
    assert [outcome.restored for outcome in second] == [True, True, False, True, False, False]


def test_equal_items_are_different_tasks_and_arrays_come_back(pool: Pool, tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    items = [np.full(50_000, 1.0), np.full(50_000, 1.0), np.full(3, 2.0)]
    for restored in (False, True):
        ended = list(pool.map(lambda a: a + 1, items, store=store, resume=restored).outcomes())
        assert [outcome.restored for outcome in ended] == [restored] * 3
        for outcome, item in zip(ended, items, strict=True):
            assert np.array_equal(outcome.value, item + 1)
            outcome.value[0] = 0  # writable, as any result


def test_keys_of_ones_own(pool: Pool, tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    assert list(pool.map(len, ["aa", "b"], store=store, key=lambda text: text[0])) == [2, 1]
    changed = list(pool.map(len, ["axxx", "c"], store=store, key=lambda text: text[0], resume=True))
    assert changed == [2, 1]  # the first is known by its key


def test_a_graph_goes_on_where_it_was(pool: Pool, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()

    def mark(name: str, value: int) -> int:
        (marks / f"{name}-{len(list(marks.iterdir()))}").touch()
        return value + 1

    def build(resume: bool, stop_after: int) -> list[int]:
        with pool.graph(store=tmp_path / "graph.sqlite", resume=resume) as graph:
            one = graph.add(mark, "one", 0)
            two = graph.add(mark, "two", one, when=lambda value: value == 1)
            graph.add(mark, "three", two)
            return [outcome.value for (_, outcome), _ in zip(graph.stream(), range(stop_after), strict=False)]

    assert build(False, 2) == [1, 2]
    assert build(True, 3) == [1, 2, 3]
    names = sorted(path.name.split("-")[0] for path in marks.iterdir())
    assert names.count("one") == 1 and names.count("two") == 1
    assert names.count("three") in (1, 2)  # it may have begun when the first run was left


def test_one_scheduler_at_a_time_and_no_other_file(pool: Pool, tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    with pool.map(lambda x: x, [1, 2], store=store) as results:
        next(results)
        began = time.monotonic()
        with pytest.raises(FolderError, match="in use"):
            pool.map(len, [1], store=store, resume=True)
        assert time.monotonic() - began < 30
    with pytest.raises(FolderError, match="holds results of"):
        pool.map(len, ["a"], store=store, resume=True)
    (tmp_path / "text").write_text("this is no data base, but long enough to be looked at" * 100)
    with pytest.raises(FolderError, match="no store of tasks"):
        tasks.map(len, ["a"], store=tmp_path / "text")


class Scale:
    def __init__(self, by: int) -> None:
        self.by = by

    def of(self, x: int) -> int:
        return self.by * x

    __call__ = of


def times(by: int, x: int) -> int:
    return by * x


def around(by: int) -> Callable[[int], int]:
    def work(x: int) -> int:
        return by * x

    return work


@pytest.mark.parametrize(
    "make",
    [
        lambda by: partial(times, by),
        lambda by: Scale(by).of,
        Scale,
        around,
        lambda by: lambda x, by=by: by * x,
        lambda by: (lambda x: x) if by == 1 else (lambda x: 2 * x),
    ],
    ids=["partial", "method", "callable", "closure", "default", "lambda"],
)
def test_what_is_bound_to_a_function_is_part_of_its_tasks(
    make: Callable[[int], Callable[[int], int]], pool: Pool, tmp_path: Path
) -> None:
    store = tmp_path / "store.sqlite"
    for key in (None, str):
        for by in (1, 2, 1):
            assert list(pool.map(make(by), [1, 2], store=store, resume=True, key=key)) == [by, 2 * by]
    ended = list(pool.map(make(2), [1, 2], store=store, resume=True).outcomes())
    assert [outcome.restored for outcome in ended] == [True, True]


def test_sets_inside_of_what_is_bound_are_the_same_in_every_process() -> None:
    """Their order is another one, and so is what pickle makes of them."""
    script = """if True:
        from functools import partial
        from types import SimpleNamespace
        from shardwise.tasks.identity import identity_of
        words = {f"word {number}" for number in range(2000)}
        for held in (words, SimpleNamespace(few=set("abcdef")), [SimpleNamespace(all=frozenset(words))] * 1001, set("abcdeg")):
            print(identity_of(partial(print, held)).bound)
    """
    told = {
        subprocess.check_output([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert len(set(told.pop().split())) == 4


def test_a_changed_function_and_results_of_other_tasks_are_told(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def first() -> Callable[[int], int]:
        def work(x: int) -> int:
            return x

        work.__qualname__ = "work"
        return work

    def second() -> Callable[[int], int]:
        def work(x: int) -> int:
            return -x

        work.__qualname__ = "work"
        return work

    store = tmp_path / "store.sqlite"
    assert list(pool.map(first(), [1, 2], store=store)) == [1, 2]
    assert list(pool.map(first(), [1, 2], store=store, resume=True)) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(pool.map(second(), [1, 2, 3], store=store, resume=True)) == [1, 2, -3]
    assert "the code of" in capsys.readouterr().err
    assert list(pool.map(second(), [7], store=store, resume=True)) == [-7]
    assert "held 3 results and none was of these tasks" in capsys.readouterr().err


def test_two_items_with_one_key_are_refused(pool: Pool, tmp_path: Path) -> None:
    items = [("a", 1), ("a", 2)]
    results = pool.map(lambda item: item[1], items, store=tmp_path / "one.sqlite", key=lambda item: item[0])
    with pytest.raises(UserError, match="'a' for two items"):
        list(results)
    assert list(results) == []  # and it does not wait for what will never come
    names = ["x#2", "x", "x"]
    for order in (1, -1):
        with pool.graph(store=tmp_path / "graph.sqlite", resume=True) as graph:
            handles = [graph.add(times, 1, place, name=name) for place, name in enumerate(names)][::order]
            graph.run()
            assert [graph.result(handle) for handle in handles] == [0, 1, 2][::order]


def test_a_task_of_a_graph_is_known_by_what_it_comes_from(pool: Pool, tmp_path: Path) -> None:
    mended = tmp_path / "mended"

    def second_fails(x: int) -> int:
        if x == 2 and not mended.exists():
            raise ValueError("two")
        return x

    def run(start: int, shared: int) -> tuple[int, int, list[int | None]]:
        with pool.graph(store=tmp_path / "graph.sqlite", resume=True) as graph:
            far = graph.add(times, 2, graph.add(times, 1, start, name=f"start at {start}"))
            other = graph.add(times, 3, graph.share(shared))
            parts = [graph.add(second_fails, x) for x in (1, 2, 3)]
            joined = graph.add(lambda *parts: list(parts), *parts, needs_all=False)
            graph.run()
            return graph.result(far), graph.result(other), graph.result(joined)

    assert run(1, 1) == (2, 3, [1, None, 3])
    assert run(5, 1) == (10, 3, [1, None, 3])
    mended.touch()
    assert run(5, 4) == (10, 12, [1, 2, 3])


def test_a_full_disk_is_told_and_what_was_told_before_is_kept(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import resource, signal, sys, numpy as np\nfrom shardwise import tasks\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "from shardwise.errors import RunFailed\n"
        "def work(x):\n    return x + np.zeros(10_000)\n"
        "try:\n"
        # Of two at a time, the first are told long before the disk is full, whoever is faster.
        "    for one in tasks.map(work, range(20), workers=2, window=2, store=sys.argv[1], resume=True):\n"
        "        print(int(one[0]), flush=True)\n"
        "except RunFailed as error:\n    print(error)\n"
    )

    def run(limit: int) -> tuple[list[str], str]:
        command = [sys.executable, str(program), str(tmp_path / "store.sqlite"), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.splitlines(), done.stderr

    told, errors = run(700_000)
    assert "cannot be written" in told[-1] and "resume=True" in told[-1] and errors == ""
    kept = len(told) - 1
    with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as base:
        assert 0 < kept <= base.execute("SELECT COUNT(*) FROM tasks").fetchone()[0] < 20
    assert run(10_000_000) == ([str(x) for x in range(20)], "")


def test_a_result_is_kept_before_it_is_given_whoever_let_it_end(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom shardwise import tasks\n"
        "pool = tasks.Pool(workers=1)\n"
        "kept = pool.map(len, ['a', 'bb'], store=sys.argv[1])\n"
        "graph = pool.graph(store=sys.argv[2])\nhandle = graph.add(len, 'abc')\n"
        "kept._feed()\nlist(pool.map(len, ['x'] * 5, priority=-1))\n"
        "stream = graph.stream()\n"
        "print(next(kept), next(stream)[1].value, flush=True)\nos._exit(0)\n"
    )
    paths = [str(tmp_path / "map.sqlite"), str(tmp_path / "graph.sqlite")]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "1 3\n"
    for path, count in zip(paths, (2, 1), strict=True):
        with contextlib.closing(sqlite3.connect(path)) as base:
            assert base.execute("SELECT COUNT(*) FROM tasks WHERE state = 'done'").fetchone()[0] == count
