"""launch() on one machine: results, failures, kills, restarts. Real processes throughout."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._inductor import config as inductor
from torch._inductor.async_compile import AsyncCompile

from shardwise import errors
from shardwise.dist.group import process_group
from shardwise.run.launch import launch
from shardwise.spec.rank import SERIAL, Rank

SECONDS = 20.0  # no rank of these tests needs as long; a test that waits for it fails


def total_of_ranks(rank: Rank) -> tuple[Rank, float, int, int]:
    with process_group(rank, "cpu", SECONDS):
        x = torch.tensor([float(rank.rank + 1)])
        if rank.workers > 1:
            dist.all_reduce(x)
    return rank, float(x), torch.get_num_threads(), os.getpid()


def test_one_worker_runs_in_the_calling_process() -> None:
    before = torch.get_num_threads()
    rank, total, threads, pid = launch(total_of_ranks, workers=1, threads=before + 1)
    assert (rank.rank, rank.workers, rank.launcher, total) == (0, 1, "inline", 1.0)
    assert threads == before + 1
    assert torch.get_num_threads() == before
    assert pid == os.getpid()
    assert not dist.is_initialized()


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_meet_and_rank_0_answers(workers: int) -> None:
    rank, total, threads, pid = launch(total_of_ranks, workers=workers, threads=1)
    assert total == workers * (workers + 1) / 2
    assert (rank.rank, rank.local_rank, rank.workers, rank.local_workers) == (0, 0, workers, workers)
    assert (rank.nodes, rank.restarts, rank.launcher) == (1, 0, "local")
    assert threads == 1
    assert pid != os.getpid()


def test_forked_workers_inherit_closures_and_share_pages() -> None:
    array = torch.arange(1000.0)
    assert launch(lambda rank: float(array[rank.rank + 7]), workers=2, threads=1) == 7.0


def work_of_a_compiler_thread(rank: Rank) -> int:
    return int(AsyncCompile.pool().submit(int, "7").result(timeout=SECONDS))


def test_workers_of_a_process_that_compiled_have_compiler_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_threads", 2)
    assert work_of_a_compiler_thread(SERIAL) == 7
    try:
        assert launch(work_of_a_compiler_thread, workers=2, threads=1) == 7
    finally:
        AsyncCompile.pool().shutdown()
        AsyncCompile.pool.cache_clear()


def test_spawned_workers_are_sent_what_is_in_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    array = torch.arange(1000.0)
    assert launch(lambda rank: float(array[rank.rank + 7]), workers=2, threads=1, start_method="spawn") == 7.0
    # A class of a notebook: pickle refers to it by the name of a module that a new process has empty.
    session = types.ModuleType("__main__")
    exec(
        "class Net:\n    answer = 7\nclass Of:\n    def __call__(self, rank): return Net.answer + rank.rank",
        vars(session),
    )
    monkeypatch.setitem(sys.modules, "__main__", session)
    assert launch(session.Of(), workers=2, threads=1, start_method="spawn") == 7


def test_spawn_refuses_what_cannot_be_sent() -> None:
    lock = threading.Lock()
    with pytest.raises(errors.UserError, match=r"cannot be sent to them: cannot pickle .* leave open files, locks"):
        launch(lambda rank: lock.locked(), workers=2, threads=1, start_method="spawn")


def heavy(size: int) -> float:
    """Uses OpenMP in element-wise code, matrix multiplication, convolution and a backward pass."""
    x = torch.ones(size, size, requires_grad=True)
    ((x @ x).exp().clamp(max=1.0).sum() + torch.ones(2_000_000).sum()).backward()
    torch.nn.functional.conv2d(torch.ones(8, 3, 32, 32), torch.ones(6, 3, 5, 5))
    return float(torch.ones(size).sum())


def test_workers_use_threads_after_the_parent_used_its_own() -> None:
    """A plain fork of a process whose OpenMP pool runs hangs here; see run/process.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        heavy(400)
        assert launch(lambda rank: heavy(400), workers=2, threads=2) == 400.0
        heavy(400)
    finally:
        torch.set_num_threads(before)


def test_tensors_and_large_results_come_back() -> None:
    result = launch(lambda rank: {"x": torch.full((3_000_000,), 2.0)}, workers=2, threads=1)
    assert float(result["x"].sum()) == 6_000_000.0


def test_a_result_that_cannot_be_sent_is_said() -> None:
    with pytest.raises(errors.RunFailed, match="rank 0 returned a function that cannot be sent"):
        launch(lambda rank: lambda: 0, workers=2, threads=1)


def test_launch_works_outside_the_main_thread() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(launch(total_of_ranks, workers=2, threads=1)[1]))
    thread.start()
    thread.join(SECONDS)
    assert results == [3.0]


def test_launch_inside_a_worker_is_a_launch_of_its_own() -> None:
    def outer(rank: Rank) -> tuple[float, float]:
        inner = launch(total_of_ranks, workers=2, threads=1)[1] if rank.rank == 0 else 0.0
        return inner, launch(total_of_ranks, workers=1, threads=1)[1]

    assert launch(outer, workers=2, threads=1) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "both must be at least 1"),
        ({"threads": 0}, "both must be at least 1"),
        ({"max_restarts": -1}, "--max-restarts is -1"),
    ],
)
def test_wrong_numbers_are_refused(arguments: dict[str, int], message: str) -> None:
    numbers: dict[str, Any] = {"workers": 2, "threads": 1, **arguments}
    with pytest.raises(errors.UserError, match=message):
        launch(total_of_ranks, **numbers)


# Failures ------------------------------------------------------------------------------------------------------------


def fail_on_rank_1(rank: Rank, error: Exception) -> None:
    with process_group(rank, "cpu", 10 * SECONDS):
        if rank.rank == 1:
            raise error
        dist.barrier()


def test_a_rank_that_raises_shows_its_own_traceback_once(children: None) -> None:
    shown: list[str] = []
    began = time.monotonic()
    with pytest.raises(errors.RunFailed, match="rank 1 failed with ZeroDivisionError: boom") as caught:
        launch(
            functools.partial(fail_on_rank_1, error=ZeroDivisionError("boom")),
            workers=3,
            threads=1,
            report=shown.append,
        )
    assert time.monotonic() - began < SECONDS
    assert caught.value.rank == 1
    assert caught.value.details.count("Traceback") == 1
    assert "raise error" in caught.value.details and "process.py" not in caught.value.details
    assert shown == [caught.value.details.rstrip()]


class OwnError(errors.DataError):
    """A user's own refinement of one of our errors."""


def test_a_user_error_comes_out_as_itself() -> None:
    shown: list[str] = []
    with pytest.raises(errors.DataError) as caught:
        launch(
            functools.partial(fail_on_rank_1, error=OwnError("bad file x.csv")),
            workers=2,
            threads=1,
            max_restarts=3,
            report=shown.append,
        )
    assert type(caught.value) is errors.DataError
    assert str(caught.value) == "bad file x.csv"
    assert shown == []


def kill_on_rank_1(rank: Rank, kills: int, signal_number: int = signal.SIGKILL) -> tuple[int, float]:
    with process_group(rank, "cpu", 10 * SECONDS):
        x = torch.ones(1)
        dist.all_reduce(x)
        if rank.rank == 1 and rank.restarts < kills:
            os.kill(os.getpid(), signal_number)
        dist.all_reduce(x)
    return rank.restarts, float(x)


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "is out of memory"), (signal.SIGTERM, "outside the run")]
)
def test_a_killed_rank_is_named(children: None, number: signal.Signals, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(errors.RunFailed) as caught:
        launch(functools.partial(kill_on_rank_1, kills=1, signal_number=number), workers=3, threads=1)
    assert time.monotonic() - began < SECONDS
    assert caught.value.rank == 1
    assert str(caught.value).startswith(f"rank 1 was killed by signal {int(number)} ({number.name})")
    assert words in str(caught.value)


def test_a_rank_that_exits_is_named(children: None) -> None:
    def leave(rank: Rank) -> None:
        if rank.rank == 1:
            os._exit(3)
        time.sleep(10 * SECONDS)

    with pytest.raises(errors.RunFailed, match="rank 1 ended with exit code 3 before it had a result"):
        launch(leave, workers=2, threads=1)


def test_ten_kills_in_a_row_heal(children: None) -> None:
    shown: list[str] = []
    began = time.monotonic()
    restarts, total = launch(
        functools.partial(kill_on_rank_1, kills=10), workers=2, threads=1, max_restarts=10, report=shown.append
    )
    assert (restarts, total) == (10, 4.0)
    assert time.monotonic() - began < 2 * SECONDS
    assert len(shown) == 10
    assert "SIGKILL" in shown[0] and shown[9].endswith("(restart 10 of 10).")


def test_restarts_run_out(children: None) -> None:
    shown: list[str] = []
    with pytest.raises(errors.RunFailed, match="rank 1 was killed"):
        launch(functools.partial(kill_on_rank_1, kills=9), workers=2, threads=1, max_restarts=2, report=shown.append)
    # Where rank 0 had not failed of itself yet, the place it was in is a message of its own.
    assert ["Restarting" in text for text in shown[:2]] == [True, True]
    assert len(shown) <= 3 and all(text.lstrip().startswith("Meanwhile rank 0") for text in shown[2:])


def test_one_worker_can_be_restarted(children: None) -> None:
    def die_once(rank: Rank) -> int:
        if rank.restarts == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return rank.restarts

    assert launch(die_once, workers=1, threads=1, max_restarts=1) == 1


def test_what_a_dead_worker_started_ends_with_it(tmp_path: Path, children: None, gone: Callable[[int], bool]) -> None:
    def start_and_die(rank: Rank) -> None:
        if rank.rank == 0:
            time.sleep(10 * SECONDS)
        if os.fork() == 0:
            (tmp_path / "pid").write_text(str(os.getpid()))
            time.sleep(10 * SECONDS)
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(errors.RunFailed, match="rank 1 was killed"):
        launch(start_and_die, workers=2, threads=1)
    assert gone(int((tmp_path / "pid").read_text()))


def hang_on_rank_1(rank: Rank) -> None:
    with process_group(rank, "cpu", 2.0):
        if rank.rank == 1:
            time.sleep(10 * SECONDS)
        dist.barrier()


def test_a_hang_names_the_rank_that_waited(children: None) -> None:
    began = time.monotonic()
    with pytest.raises(errors.RunFailed, match=r"rank 0 timed out: .* within 2 s") as caught:
        launch(hang_on_rank_1, workers=2, threads=1)
    assert time.monotonic() - began < SECONDS
    assert "dist.barrier()" in caught.value.details
    tail = caught.value.details.partition("Meanwhile rank 1 was here (innermost call first):")[2]
    assert "in hang_on_rank_1" in tail and tail.count("File") == 1


def late_on_rank_1(rank: Rank) -> None:
    if rank.rank == 1:
        time.sleep(10 * SECONDS)
    with process_group(rank, "cpu", 1.0):
        pass


def test_a_rank_that_does_not_come_to_the_start_is_shown(children: None) -> None:
    with pytest.raises(errors.RunFailed, match="rank 0 timed out") as caught:
        launch(late_on_rank_1, workers=2, threads=1)
    assert "in late_on_rank_1" in caught.value.details.partition("Meanwhile rank 1 was here")[2]


def test_many_launches_leave_no_files_or_threads_behind() -> None:
    def open_now() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    launch(total_of_ranks, workers=2, threads=1)
    before = open_now()
    for _ in range(3):
        launch(total_of_ranks, workers=2, threads=1)
        with pytest.raises(errors.RunFailed):
            launch(functools.partial(fail_on_rank_1, error=ValueError()), workers=2, threads=1, report=lambda _: None)
    assert open_now() == before
