"""The process group: none for one worker, gloo for several, and timeouts that say who waited."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from shardwise import errors
from shardwise.dist.group import await_idle_threads, process_group
from shardwise.spec.rank import SERIAL, Rank


def in_ranks(
    function: Callable[[Rank], Any], restarts: tuple[int | tuple[int, int], ...] = (0,), launcher: Literal["local", "torchrun"] = "local"
) -> list[list[Any]]:
    """Runs function in two forked ranks, once per number of restarts (both ranks' or each one's), over ONE store; results by
    round, then rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    context = multiprocessing.get_context("fork")
    rounds = []
    for number in restarts:
        pipes, processes = [], []
        for index in range(2):
            rank = Rank(
                rank=index,
                local_rank=index,
                workers=2,
                local_workers=2,
                restarts=number if isinstance(number, int) else number[index],
                launcher=launcher,
                endpoint=f"127.0.0.1:{store.port}" if launcher == "local" else None,
            )
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=lambda r, p: p.send(function(r)), args=(rank, theirs))
            process.start()
            pipes.append(ours)
            processes.append(process)
        answers = []
        for pipe in pipes:
            assert pipe.poll(20.0), "a rank gave no answer"
            answers.append(pipe.recv())
        for process in processes:  # only now: the other rank may still be joining this one
            process.kill()
            process.join()
        rounds.append(answers)
    return rounds


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")  # put back at the end


def test_one_worker_has_no_group() -> None:
    with process_group(SERIAL, "cpu", 5.0):
        assert not dist.is_initialized()


def meet(rank: Rank) -> tuple[str, float, bool]:
    with process_group(rank, "cpu", 15.0):
        backend = dist.get_backend()
        x = torch.tensor([rank.rank + 1.0])
        dist.all_reduce(x)
    return backend, x.item(), dist.is_initialized()


def test_two_workers_meet_and_part() -> None:
    assert in_ranks(meet) == [[("gloo", 3.0, False)] * 2]


def test_a_restarted_group_does_not_meet_its_predecessor_in_the_same_store() -> None:
    """Without keys of its own, round 1 would find the addresses of round 0, whose ranks have been killed."""

    def meet_and_stay(rank: Rank) -> float:
        group = process_group(rank, "cpu", 15.0)
        group.__enter__()
        x = torch.tensor([rank.rank + 1.0])
        dist.all_reduce(x)
        return x.item()

    assert in_ranks(meet_and_stay, restarts=(0, 1, 2)) == [[3.0, 3.0]] * 3
    # torchrun keeps one store too, and counts restarts for each node by itself.
    assert in_ranks(meet_and_stay, restarts=(0, (0, 1), (1, 1), (2, 1)), launcher="torchrun") == [[3.0, 3.0]] * 4


@pytest.mark.parametrize("alone", [0, 1])
def test_a_rank_that_only_said_hello_before_it_ended_does_not_count(alone: int) -> None:
    def meet_late(rank: Rank) -> float | str:
        try:
            return meet_if_here(rank)
        except errors.RunFailed as error:
            return str(error)

    def meet_if_here(rank: Rank) -> float:
        if rank.restarts == 0 and rank.rank != alone:
            return 0.0  # ended before the group was there
        with process_group(rank, "cpu", 1.0 if rank.restarts == 0 else 15.0):
            x = torch.ones(1)
            dist.all_reduce(x)
        return x.item()

    first, second = in_ranks(meet_late, restarts=(0, 1), launcher="torchrun")
    assert f"rank {alone} timed out" in first[alone]
    assert second == [2.0, 2.0]


def test_a_rank_that_is_not_joined_says_who_waited() -> None:
    def wait_alone(rank: Rank) -> Any:
        try:
            with process_group(rank, "cpu", 1.0):
                if rank.rank == 1:
                    time.sleep(3.0)
                    return None
                dist.barrier()
        except errors.RunFailed as error:
            return str(error), error.rank, error.details

    ((answer, _),) = in_ranks(wait_alone)
    message, rank, details = answer
    assert message.startswith("rank 0 timed out: the other ranks did not all come to its collective within 1 s.")
    assert rank == 0
    assert "dist.barrier()" in details


def test_a_rank_that_nobody_joins_at_the_start_says_who_waited() -> None:
    def come_alone(rank: Rank) -> Any:
        if rank.rank == 1:
            time.sleep(3.0)
            return None
        with pytest.raises(errors.RunFailed, match="rank 0 timed out") as caught, process_group(rank, "cpu", 1.0):
            pass
        return caught.value.rank

    assert in_ranks(come_alone) == [[0, None]]


def test_other_errors_pass_unchanged() -> None:
    def fail(rank: Rank) -> str:
        try:
            with process_group(rank, "cpu", 15.0):
                raise ZeroDivisionError("boom")
        except ZeroDivisionError as error:
            return str(error)

    assert in_ranks(fail) == [["boom", "boom"]]


def test_a_group_that_is_there_is_used_and_left() -> None:
    def take_and_leave(rank: Rank) -> Any:
        host, _, port = str(rank.endpoint).rpartition(":")
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=2)
        return [meet(rank), meet(rank)]

    assert in_ranks(take_and_leave) == [[[("gloo", 3.0, True)] * 2] * 2]


def test_a_group_of_other_ranks_or_without_the_backend_is_refused() -> None:
    def refuse(rank: Rank) -> Any:
        host, _, port = str(rank.endpoint).rpartition(":")
        messages = []
        for backend, number in (("gloo", 1 - rank.rank), ("cuda:gloo", rank.rank)):
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
            dist.init_process_group(backend, store=PrefixStore(backend, store), rank=number, world_size=2)
            with pytest.raises(errors.UserError) as caught, process_group(rank, "cpu", 5.0):
                pass
            dist.destroy_process_group()
            messages.append(str(caught.value))
        return messages

    ((first, second), _) = in_ranks(refuse)[0]
    assert first.startswith("the process group that is there already makes this process rank 1 of 2, but RANK and WORLD_SIZE")
    assert "(backend cuda:gloo) cannot send tensors on cpu" in second
    assert second.endswith("Make it with backend 'gloo'.")


LATE = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from shardwise.dist.group import await_idle_threads, process_group
from shardwise.spec.rank import Rank

rank = Rank(rank=int(sys.argv[1]), local_rank=int(sys.argv[1]), workers=2, local_workers=2, endpoint=sys.argv[2])
with process_group(rank, "cpu", 60.0):
    kept = dist.group.WORLD
    dist.all_reduce(torch.ones(3))
    for thread in Path("/proc/self/task").iterdir():
        if "gloo" in (thread / "comm").read_text():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(50):
        dist.all_reduce(torch.ones(3))
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system cannot hold single threads up")
def test_a_process_ends_well_where_its_threads_are_late(tmp_path: Path) -> None:
    """gloo's threads drop tensors after the collective is over: where they are held up, that was after Python's end."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", LATE, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        ended = [(rank.communicate(timeout=100)[1], rank.returncode) for rank in ranks]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert ended == [("", 0), ("", 0)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the states of threads from /proc")
def test_a_thread_of_gloo_that_runs_is_waited_for() -> None:
    begun, done, over = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        ctypes.CDLL(None).prctl(15, b"pt_gloo_runloop", 0, 0, 0)  # PR_SET_NAME, prctl(2)
        begun.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # runs without Python's lock, as gloo does
        done.set()
        over.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(20.0)
        await_idle_threads()
        assert done.is_set()
    finally:
        over.set()
        thread.join()
