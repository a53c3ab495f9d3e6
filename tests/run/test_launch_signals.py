"""Stop signals, and the end of the launcher itself. The launcher is a forked process here."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise import errors
from shardwise.dist.group import process_group
from shardwise.run.launch import launch, print_report
from shardwise.run.signals import StopRequest
from shardwise.spec.rank import Rank

SECONDS = 20.0

Launcher = tuple[BaseProcess, Connection, list[int]]


def tell(folder: Path, rank: Rank) -> None:
    """Leaves the pid of this rank where the test looks for it."""
    (folder / f"{rank.rank}.part").write_text(str(os.getpid()))
    (folder / f"{rank.rank}.part").rename(folder / f"{rank.rank}.pid")


@contextlib.contextmanager
def launcher(folder: Path, worker: Callable[[Rank], Any], **arguments: Any) -> Iterator[Launcher]:
    """A process that runs launch(worker, workers=2); (process, pipe with its answer, pids of the ranks)."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def main() -> None:
        sys.stderr = (folder / "stderr").open("w")
        try:
            answer: Any = launch(worker, workers=2, threads=1, report=print_report, **arguments)
        except errors.ShardwiseError as error:
            answer = error
        theirs.send_bytes(pickle.dumps(answer))

    process = context.Process(target=main)
    process.start()
    theirs.close()
    try:
        deadline = time.monotonic() + SECONDS
        while len(list(folder.glob("*.pid"))) < 2:
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.01)
        yield process, ours, [int((folder / f"{rank}.pid").read_text()) for rank in range(2)]
    finally:
        process.kill()
        process.join()


def answer_of(pipe: Connection) -> Any:
    assert pipe.poll(SECONDS), "the launcher did not end"
    return pickle.loads(pipe.recv_bytes())


def loop_until_stopped(rank: Rank, folder: Path, *, raises: bool = False) -> str:
    """A training loop in small: all ranks stop at the same step, because they agree on the flag."""
    with StopRequest() as stop, process_group(rank, "cpu", SECONDS):
        step = 0
        while True:
            flag = torch.tensor([float(stop.requested)])
            dist.all_reduce(flag)
            step += 1
            if step == 2:
                tell(folder, rank)
            if flag.item() > 0:
                break
            time.sleep(0.005)
    time.sleep(0.2)  # saving
    (folder / f"{rank.rank}.saved").write_text(str(step))
    if raises:
        raise errors.Stopped(f"saved at step {step}")
    return f"saved at step {step}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_lets_the_ranks_save(tmp_path: Path, gone: Callable[[int], bool], number: signal.Signals) -> None:
    with launcher(tmp_path, lambda rank: loop_until_stopped(rank, tmp_path)) as (process, pipe, pids):
        assert process.pid is not None
        os.kill(process.pid, number)
        answer = answer_of(pipe)
    assert answer == f"saved at step {(tmp_path / '0.saved').read_text()}"
    assert (tmp_path / "0.saved").read_text() == (tmp_path / "1.saved").read_text()
    assert all(gone(pid) for pid in pids)
    assert f"{number.name}: the workers have 60 s to save" in (tmp_path / "stderr").read_text()


def test_stopped_in_the_ranks_is_stopped_in_the_launcher(tmp_path: Path) -> None:
    with launcher(tmp_path, lambda rank: loop_until_stopped(rank, tmp_path, raises=True)) as (process, pipe, _):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        answer = answer_of(pipe)
    assert type(answer) is errors.Stopped
    assert str(answer) == f"saved at step {(tmp_path / '0.saved').read_text()}"


def test_a_stop_is_no_failure_to_restart_from(tmp_path: Path) -> None:
    def stop_while_peer_works(rank: Rank) -> int:
        tell(tmp_path, rank)
        time.sleep(10 * SECONDS)  # no handler: the signal ends it
        return rank.restarts

    with launcher(tmp_path, stop_while_peer_works, max_restarts=5) as (process, pipe, _):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        answer = answer_of(pipe)
    assert type(answer) is errors.Stopped
    assert "before they could save" in str(answer)


def ignore_stop(rank: Rank, folder: Path) -> None:
    with StopRequest() as stop:
        tell(folder, rank)
        end = time.monotonic() + 10 * SECONDS
        while time.monotonic() < end:
            time.sleep(0.05)
        assert stop.requested


def test_a_second_signal_ends_ranks_at_once(tmp_path: Path, gone: Callable[[int], bool]) -> None:
    with launcher(tmp_path, lambda rank: ignore_stop(rank, tmp_path)) as (process, pipe, pids):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        assert not pipe.poll(0.5)
        os.kill(process.pid, signal.SIGINT)
        answer = answer_of(pipe)
    assert type(answer) is errors.RunFailed
    assert "ranks 0, 1 were ended by a second SIGINT" in str(answer)
    assert all(gone(pid) for pid in pids)


def test_ranks_that_do_not_stop_in_time_are_ended(tmp_path: Path, gone: Callable[[int], bool]) -> None:
    with launcher(tmp_path, lambda rank: ignore_stop(rank, tmp_path), grace_seconds=0.5) as (process, pipe, pids):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        answer = answer_of(pipe)
    assert "did not stop within 0.5 s" in str(answer)
    assert all(gone(pid) for pid in pids)


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path, gone: Callable[[int], bool]) -> None:
    with launcher(tmp_path, lambda rank: ignore_stop(rank, tmp_path)) as (process, _, pids):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        assert all(gone(pid) for pid in pids)


def test_stop_request_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        seen = [stop.requested]
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(stop.requested)
    assert seen == [False, True]
    assert stop.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
