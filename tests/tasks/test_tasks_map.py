"""tasks.map: results, order, resources, arrays, back-pressure."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardwise import tasks
from shardwise.errors import UserError
from shardwise.tasks.need import Capacity
from shardwise.tasks.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(workers=2, tokens={"licences": 2}) as made:
        yield made


def double(x: Any) -> Any:
    return x * 2


def test_results_come_in_the_order_of_the_items(pool: Pool) -> None:
    def uneven(x: int) -> int:
        time.sleep(0.05 if x == 0 else 0)
        return x * 2

    assert list(pool.map(uneven, range(20))) == [2 * x for x in range(20)]
    unordered = list(pool.map(uneven, range(20), ordered=False))
    assert sorted(unordered) == [2 * x for x in range(20)]
    assert unordered[0] != 0  # the slow one is not waited for


def test_ten_thousand_small_tasks(pool: Pool) -> None:
    assert list(pool.map(double, range(10_000))) == [2 * x for x in range(10_000)]


def test_map_ends_its_own_pool() -> None:
    before = _processes_below(os.getpid())
    assert list(tasks.map(lambda x: x + 1, [1, 2, 3], workers=1)) == [2, 3, 4]
    assert _processes_below(os.getpid()) == before


def test_workers_are_warm(pool: Pool) -> None:
    first = set(pool.map(lambda _: os.getpid(), range(50)))
    again = set(pool.map(lambda _: os.getpid(), range(50)))
    assert again <= first | again
    assert len(first | again) <= 2
    assert os.getpid() not in first


def test_functions_of_any_kind_travel(pool: Pool) -> None:
    offset = 5

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    assert list(pool.map(lambda x: x + offset, [1])) == [6]
    assert list(pool.map(functools.partial(pow, 2), [3])) == [8]
    (back,) = pool.map(lambda x: Local(x.value + 1), [Local(1)])
    assert isinstance(back, Local) and back.value == 2


def test_large_arrays_arrive_whole_and_are_the_tasks_own(pool: Pool) -> None:
    array = np.arange(1 << 20, dtype=np.float64)

    def work(one: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        one[0] = -1  # its own copy, as with any other process
        return one * 2

    for result in pool.map(work, [array] * 3):
        assert result[0] == -2 and np.array_equal(result[1:], array[1:] * 2)
        result[0] = 7  # ours
    assert array[0] == 0


def test_tensors_travel_like_arrays(pool: Pool) -> None:
    tensor = torch.arange(100_000, dtype=torch.float32)
    with_gradient = torch.ones(3, requires_grad=True)
    (back, other) = next(pool.map(lambda pair: (pair[0] + 1, pair[1]), [(tensor, with_gradient)]))
    assert torch.equal(back, tensor + 1)
    assert other.requires_grad and torch.equal(other, with_gradient)


def test_a_large_argument_without_arrays(pool: Pool) -> None:
    assert list(pool.map(len, ["x" * 3_000_000, b"y" * 400_000])) == [3_000_000, 400_000]


def test_an_array_in_the_function_is_stored_once(pool: Pool) -> None:
    array = np.ones(1 << 21)

    def own_bytes() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous"))

    def grows_by(_: int) -> tuple[float, int]:
        before = own_bytes()
        total = sum(array[::512])  # touches every page
        return total, own_bytes() - before

    for total, grown in pool.map(grows_by, range(4)):
        assert total == array.size // 512
        assert grown < array.nbytes // 4


def _slow(x: int) -> int:
    time.sleep(0.01)
    return x


def test_an_unbounded_input_is_read_only_as_needed(pool: Pool) -> None:
    taken = itertools.count()
    results = pool.map(double, (next(taken) for _ in itertools.count()), window=5)
    assert [next(results) for _ in range(20)] == [2 * x for x in range(20)]
    results.close()
    assert next(taken) <= 25
    with pool.map(_slow, itertools.count()) as endless:
        assert next(endless) == 0


def test_a_failing_item_raises_in_its_place_or_is_returned(pool: Pool) -> None:
    def odd(x: int) -> int:
        if x == 2:
            raise ValueError("two is even")
        return x

    results = pool.map(odd, range(5))
    assert next(results) == 0 and next(results) == 1
    with pytest.raises(tasks.TaskFailed, match="two is even") as caught:
        next(results)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "in odd" in str(caught.value) and __file__ in str(caught.value)
    assert list(results) == []  # the rest was cancelled
    returned = list(pool.map(odd, range(5), errors="return"))
    assert [type(x) for x in returned] == [int, int, tasks.TaskFailure, int, int]


def test_what_cannot_be_sent_fails_alone(pool: Pool) -> None:
    results = list(pool.map(double, [1, threading.Lock(), 3], errors="return"))
    assert results[0] == 2 and results[2] == 6
    assert results[1].kind == "input" and "cannot be sent" in results[1].message
    (result,) = pool.map(lambda _: threading.Lock(), [0], errors="return")
    assert result.kind == "error" and "pickle" in result.message


def test_threads_follow_the_cores(pool: Pool) -> None:
    def threads(_: int) -> str:
        return os.environ["OMP_NUM_THREADS"]

    assert list(pool.map(threads, [0])) == ["1"]
    assert list(pool.map(lambda _: torch.get_num_threads(), [0], cores=2)) == [2]
    assert list(pool.map(threads, [0], cores=2)) == ["2"]
    assert list(pool.map(threads, [0], cores=0.5)) == ["1"]


def _overlaps(spans: list[tuple[float, float]]) -> int:
    """The most spans at one moment."""
    return max(sum(1 for begin, end in spans if begin <= at < end) for at, _ in spans)


def _span(_: int) -> tuple[float, float]:
    began = time.monotonic()
    time.sleep(0.05)
    return began, time.monotonic()


def _meet(place: Path, together: int) -> tuple[float, float]:
    """Ends only when as many have begun: on a busy machine a span alone may be over before the next one begins."""
    began = time.monotonic()
    (place / uuid.uuid4().hex).touch()
    while len(list(place.iterdir())) < together and time.monotonic() < began + 60:
        time.sleep(0.005)
    time.sleep(0.05)
    return began, time.monotonic()


@pytest.mark.parametrize(
    ("resources", "at_once"),
    [({}, 2), ({"cores": 2}, 1), ({"cores": 0.25}, 3), ({"cores": 0.25, "tokens": {"licences": 1}}, 2)],
)
def test_as_many_tasks_at_once_as_resources_allow(
    pool: Pool, tmp_path: Path, resources: dict[str, Any], at_once: int
) -> None:
    overlaps = _overlaps(list(pool.map(functools.partial(_meet, tmp_path), [at_once] * 8, **resources)))
    assert overlaps >= at_once if resources == {"cores": 0.25} else overlaps == at_once


def test_each_gpu_task_sees_its_devices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")

    def see(_: int) -> tuple[str, float, float]:
        return (os.environ["CUDA_VISIBLE_DEVICES"], *_span(0))

    with Pool(workers=8) as gpus:
        whole = list(gpus.map(see, range(6), gpus=1))
        assert {device for device, *_ in whole} == {"3", "5"}
        for name in ("3", "5"):  # never two tasks on one device
            assert _overlaps([(begin, end) for device, begin, end in whole if device == name]) == 1
        halves = list(gpus.map(see, range(8), gpus=0.5))
        for name in ("3", "5"):
            assert _overlaps([(begin, end) for device, begin, end in halves if device == name]) <= 2
        assert {see[0] for see in gpus.map(see, range(2), gpus=2)} == {"3,5"}
        assert {see[0] for see in gpus.map(see, range(2))} == {""}


def test_a_task_that_can_never_start_is_refused(pool: Pool) -> None:
    for options, words in (
        ({"cores": 3}, "3 cores, and there are 2"),
        ({"gpus": 9}, "9 GPUs"),
        ({"memory": "900TiB"}, "900 TiB"),
        ({"tokens": {"licences": 3}}, "3 of 'licences'"),
        ({"cores": 0}, "more than 0 cores"),
        ({"retries": -1}, "retries=-1"),
        ({"retry_on": ("bad luck",)}, "bad luck"),
        ({"timeout": 0}, "timeout"),
        ({"colour": 1}, "no option 'colour'"),
    ):
        with pytest.raises(UserError, match=words):
            pool.map(double, [1], **options)


def test_capacity_reads_the_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 4,7")
    assert Capacity.of_this_machine(workers=2, gpus=2).gpus == ("1", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(UserError, match="shows 0"):
        Capacity.of_this_machine(gpus=1)


def test_the_engine_needs_no_torch() -> None:
    code = (
        "import sys\nfrom shardwise import tasks\n"
        "loaded = list(tasks.map(lambda x: 'torch' in __import__('sys').modules, [1], workers=1))\n"
        "assert loaded == [False], loaded\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def _processes_below(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found |= {int(child) for child in (task / "children").read_text().split()}
    return found


def test_workers_draw_numbers_of_their_own() -> None:
    """What was imported before they were forked has the state of its generators in all of them."""

    def draw(_: int) -> tuple[float, float, float]:
        import random

        import torch

        time.sleep(0.05)
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002  # what users do

    with Pool(workers=2, preload=["torch", "numpy.random"]) as made:
        drawn = list(made.map(draw, range(4)))
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == 4


def test_a_slow_input_holds_up_no_results(pool: Pool) -> None:
    taken = 0

    def arrivals() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 501):
            time.sleep(0.01)
            yield taken

    list(pool.map(len, ["warm"]))
    with pool.map(str, arrivals(), window=500) as results:
        assert next(results) == "1"
        assert taken < 500


def test_a_live_source_may_wait_for_the_results_of_its_own_items(pool: Pool) -> None:
    told = threading.Event()
    answers = []

    def asks() -> Iterator[int]:
        for item in range(3):
            yield item
            answers.append(told.wait(30))
            told.clear()

    got = []
    for result in pool.map(double, tasks.live(asks())):
        got.append(result)
        told.set()
    assert got == [0, 2, 4]
    assert answers == [True, True, True]


def test_a_live_source_is_read_no_further_than_the_window(pool: Pool) -> None:
    taken = 0

    def counted() -> Iterator[int]:
        nonlocal taken
        for number in range(1, 51):
            taken = number
            yield number

    with pool.map(double, tasks.live(counted()), window=3) as results:
        for given, result in enumerate(results):
            assert result == 2 * (given + 1)
            assert taken <= given + 3
    assert taken == 50


def test_a_live_source_that_breaks_raises_after_the_results_of_what_it_gave(pool: Pool) -> None:
    def arrivals() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the connection was lost")

    got = []
    with pytest.raises(OSError, match="connection was lost"):
        for result in pool.map(str, tasks.live(arrivals())):
            got.append(result)  # what comes before the error
    assert got == ["1", "2"]
    assert list(pool.map(str, tasks.live([]))) == []


def test_a_live_source_goes_to_one_map(pool: Pool) -> None:
    source = tasks.live(itertools.count())
    with pool.map(double, source) as results:
        assert next(results) == 0
    with pytest.raises(UserError, match="make another"):
        pool.map(double, source)


def test_a_live_source_that_waits_for_ever_does_not_hold_up_the_end_of_the_program() -> None:
    script = """
import threading
from shardwise import tasks

def arrivals():
    yield 1
    threading.Event().wait()

with tasks.map(str, tasks.live(arrivals()), workers=1) as results:
    print(next(results))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "1\n", "")


def test_tasks_share_what_a_manager_of_the_program_holds() -> None:
    with multiprocessing.get_context("spawn").Manager() as manager, Pool(workers=1) as one:
        queue = manager.Queue()
        list(one.map(queue.put, [1, 2, 3]))
        assert [queue.get(timeout=20) for _ in range(3)] == [1, 2, 3]


def test_a_closed_pool_says_so() -> None:
    with Pool(workers=1) as one:
        late, graph = one.map(double, range(3)), one.graph()
    with pytest.raises(UserError, match="this pool is closed"):
        list(late)
    with pytest.raises(UserError, match="this pool is closed"):
        graph.add(double, 1)
        graph.run()


def test_results_that_are_given_up_cancel_what_has_not_ended(tmp_path: Path) -> None:
    def mark(x: int) -> int:
        (tmp_path / str(x)).touch()
        time.sleep(0.05)
        return x

    with Pool(workers=1) as one:
        for _ in one.map(mark, range(20)):
            break
        with pytest.raises(RuntimeError, match="mine"):
            for _ in one.map(mark, range(20, 40)):
                raise RuntimeError("mine")
        list(one.map(double, range(3)))
        one.engine.step(0)
        assert not one.engine.busy
    assert len(list(tmp_path.iterdir())) < 20


def test_an_input_that_breaks_raises_after_the_results_of_what_it_gave(pool: Pool) -> None:
    def arrivals() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the connection was lost")

    got = []
    with pytest.raises(OSError, match="connection was lost"):
        for result in pool.map(str, arrivals()):
            got.append(result)  # what comes before the error
    assert got == ["1", "2"]


def test_a_task_that_changes_its_folder_changes_no_others(tmp_path: Path) -> None:
    def move(path: Path) -> str:
        before = str(Path.cwd())
        os.chdir(path)
        return before

    assert list(tasks.map(move, [tmp_path, tmp_path], workers=1)) == [str(Path.cwd())] * 2
