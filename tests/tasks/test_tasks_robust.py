"""A task that fails, hangs, is killed, fills memory or leaks processes fails alone, with its cause; the others go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise import tasks
from shardwise.errors import UserError
from shardwise.tasks.local import LocalBackend
from shardwise.tasks.options import Options
from shardwise.tasks.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(workers=2) as made:
        yield made


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _soon(condition: Any) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def misbehave(how: str) -> str:
    if how == "raise":
        raise KeyError("missing")
    if how == "hang":
        time.sleep(60)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit":
        os._exit(7)
    if how == "quit":
        sys.exit("enough")
    if how == "fill":
        return str(len(bytearray(1 << 30)))
    return how


def test_each_fails_alone_with_its_cause(pool: Pool) -> None:
    ways = ["fine", "raise", "fine", "hang", "kill", "fine", "exit", "quit", "fill", "fine"]
    ended = list(pool.map(misbehave, ways, errors="return", timeout=0.5, memory="300MiB").outcomes())
    assert [outcome.value for outcome in ended if outcome.state == "done"] == ["fine"] * 4
    failures = {way: outcome.failure for way, outcome in zip(ways, ended, strict=True) if outcome.failure is not None}
    kinds = {way: failure.kind for way, failure in failures.items()}
    assert kinds == {
        "raise": "error", "hang": "timeout", "kill": "killed", "exit": "exit", "quit": "exit", "fill": "memory"
    }  # fmt: skip
    assert "KeyError: 'missing'" in failures["raise"].message and "in misbehave" in failures["raise"].details
    assert failures["kill"].signal_number == 9 and "9 (SIGKILL)" in failures["kill"].message
    assert "code 7" in failures["exit"].message and "enough" in failures["quit"].message
    assert "300 MiB" in failures["fill"].message
    # where it hung, and nothing of the worker around it
    assert "in misbehave" in failures["hang"].details and "worker.py" not in failures["hang"].details


def test_a_crash_names_its_signal(pool: Pool) -> None:
    (failure,) = pool.map(misbehave, ["crash"], errors="return")
    assert failure.kind == "killed" and "SIGSEGV" in failure.message


def test_retries(pool: Pool, tmp_path: Path) -> None:
    def third_time(name: str) -> int:
        count = tmp_path / name
        tries = int(count.read_text()) + 1 if count.exists() else 1
        count.write_text(str(tries))
        if tries < 3:
            if name == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("not yet")
        return tries

    ended = list(pool.map(third_time, ["raised", "killed"], retries=2).outcomes())
    assert [(outcome.value, outcome.attempts) for outcome in ended] == [(3, 3), (3, 3)]
    (failed,) = pool.map(third_time, ["raised again"], errors="return", retries=1).outcomes()
    assert failed.state == "failed" and failed.attempts == 2
    (failed,) = pool.map(third_time, ["not worth it"], errors="return", retries=5, retry_on=("killed",)).outcomes()
    assert failed.attempts == 1


def test_a_killed_worker_takes_no_other_task_along(pool: Pool, tmp_path: Path) -> None:
    """Many short tasks lie ready at a worker when it is killed in one of them: that one is blamed, and no other."""
    counts = tmp_path / "counts"
    counts.mkdir()

    def work(x: int) -> int:
        if x == 1500:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    ended = list(pool.map(work, range(3000), errors="return").outcomes())
    assert [outcome.index for outcome in ended if outcome.state != "done"] == [1500]
    assert [outcome.value for outcome in ended if outcome.state == "done"] == [x for x in range(3000) if x != 1500]


def test_a_worker_killed_from_outside_while_idle_costs_nothing(pool: Pool) -> None:
    (pid,) = set(pool.map(lambda _: os.getpid(), [0]))
    os.kill(pid, signal.SIGKILL)
    assert list(pool.map(misbehave, ["a", "b", "c"])) == ["a", "b", "c"]


def test_the_process_that_starts_the_workers_is_killed() -> None:
    with Pool(workers=2) as pool:
        parents = set(pool.map(lambda _: os.getppid(), range(2)))

        def kill_nursery(x: int) -> int:
            if x == 0 and os.getppid() in parents:
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(10)
            return x

        assert list(pool.map(kill_nursery, range(4))) == [0, 1, 2, 3]


def test_a_death_that_nobody_hears_of_any_more(capfd: pytest.CaptureFixture[str]) -> None:
    """The scheduler has gone for the process that starts the workers: it leaves without a word."""
    with Pool(workers=1) as pool:
        (worker,) = pool.map(lambda _: os.getpid(), range(1))
        backend = pool.engine.backend
        assert isinstance(backend, LocalBackend) and backend._line is not None and backend._nursery is not None
        backend._line.shutdown(socket.SHUT_RD)
        os.kill(worker, signal.SIGKILL)
        nursery = backend._nursery
        assert _soon(lambda: nursery.poll() is not None)
    assert capfd.readouterr().err == ""


def test_processes_that_a_task_leaves_are_ended(pool: Pool) -> None:
    def leave(detached: bool) -> int:
        return subprocess.Popen(["sleep", "300"], start_new_session=detached).pid

    for detached in (False, True):
        (outcome,) = pool.map(leave, [detached]).outcomes()
        assert outcome.state == "done"
        assert "left 1 process running" in outcome.remarks[0]
        assert _soon(lambda pid=outcome.value: not _alive(pid))


def test_a_task_that_leaves_processes_fails_alone_where_that_is_asked_for(pool: Pool) -> None:
    def leave(number: int) -> int:
        if number == 1:
            child = subprocess.Popen(["sleep", "300"])
            name = Path(f"/proc/{child.pid}/comm")
            assert _soon(lambda: name.read_text().strip() == "sleep")  # it has its parent's name until it has started
        return number

    outcomes = list(pool.map(leave, range(4), leaks="fail", retries=1).outcomes())
    assert [outcome.state for outcome in outcomes] == ["done", "failed", "done", "done"]
    failure = outcomes[1].failure
    assert failure is not None and failure.kind == "leak" and failure.message.endswith("sleep")
    assert outcomes[1].attempts == 2 and outcomes[1].value is None
    with pytest.raises(UserError, match="leaks='ignore'"):
        Options(leaks="ignore")  # type: ignore[arg-type]


def test_a_killed_task_takes_its_processes_along(pool: Pool, tmp_path: Path) -> None:
    def start_and_die(detached: bool) -> None:
        child = subprocess.Popen(["sleep", "300"], start_new_session=detached)
        (tmp_path / str(detached)).write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    for detached in (False, True):
        (failure,) = pool.map(start_and_die, [detached], errors="return")
        assert failure.kind == "killed"
        assert _soon(lambda place=tmp_path / str(detached): not _alive(int(place.read_text())))


def test_memory_is_learned(pool: Pool) -> None:
    def fill(size: int) -> tuple[float, float]:
        data = bytearray(size)
        data[::4096] = b"1" * len(data[::4096])
        began = time.monotonic()
        time.sleep(0.05)
        return began, time.monotonic()

    ended = list(pool.map(fill, [200 << 20]).outcomes())
    assert ended[0].peak_bytes is not None and ended[0].peak_bytes >= 195 << 20
    with Pool(workers=4, memory="500MiB") as small:
        spans = list(small.map(fill, [200 << 20] * 12))
    # The first ones start before anything is known; from then on two at a time fit into 500 MiB.
    later = spans[4:]
    assert max(sum(1 for begin, end in later if begin <= at < end) for at, _ in later) <= 2


def test_closing_cancels_what_runs(pool: Pool, tmp_path: Path) -> None:
    def mark(x: int) -> int:
        if x:
            (tmp_path / str(x)).write_text(str(os.getpid()))
            time.sleep(60)
        return x

    with pool.map(mark, [0, 1, 2], ordered=False) as results:
        assert next(results) == 0
        while not (tmp_path / "1").exists():
            pool.engine.step(0.05)
    assert _soon(lambda: not _alive(int((tmp_path / "1").read_text() or "0")))
    assert list(pool.map(misbehave, ["still", "works"])) == ["still", "works"]


def test_the_scheduler_is_killed_and_its_workers_end(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\nfrom shardwise import tasks\n"
        "def work(x):\n    os.write(1, f'{os.getpid()} {os.getppid()}\\n'.encode())\n    time.sleep(60)\n"
        "list(tasks.map(work, [1, 2], workers=2))\n"
    )
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        pids = {int(pid) for _ in range(2) for pid in process.stdout.readline().split()}
    assert len(pids) == 3 and all(map(_alive, pids))
    process.kill()
    process.wait()
    assert _soon(lambda: not any(map(_alive, pids)))


def test_failed_is_a_run_failed() -> None:
    error = tasks.TaskFailure(kind="error", message="no", details="lines").raised("x")
    assert error.kind == "error" and "task x failed: no" in str(error) and "lines" in str(error)


def test_a_second_thread_in_a_pool_is_refused_and_results_may_change_hands(pool: Pool, tmp_path: Path) -> None:
    inside, free = threading.Event(), threading.Event()

    def hold(_: object) -> bool:
        inside.set()
        return free.wait(60)

    graph = pool.graph(store=tmp_path / "store.sqlite")
    first = graph.add(misbehave, "well")
    second = graph.add(misbehave, "too", after=[first], when=hold)
    thread = threading.Thread(target=graph.run)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(UserError, match="another thread is using this pool"):
        list(pool.map(len, ["aa"]))
    free.set()
    thread.join(60)
    assert (graph.result(first), graph.result(second)) == ("well", "too")
    graph.close()
    assert list(pool.map(len, ["aa"])) == [2]


def test_the_workers_end_with_the_scheduler_though_a_child_of_it_lives_on(tmp_path: Path) -> None:
    """A process that the program forked has the ends of its sockets, so that the nursery does not see them close."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nfrom shardwise import tasks\n"
        "pool = tasks.Pool(workers=1)\npid = next(pool.map(lambda _: os.getpid(), [1]))\nchild = os.fork()\n"
        "if not child:\n    time.sleep(60)\n    os._exit(0)\n"
        "print(pid, child, flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker, child = (int(word) for word in process.stdout.readline().split())
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        assert _soon(lambda: not _alive(worker))
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_pool_ends_though_a_child_of_the_program_lives_on() -> None:
    program = (
        "import os, time\nfrom shardwise import tasks\n"
        "with tasks.Pool(workers=1) as pool:\n    list(pool.map(len, ['a']))\n    child = os.fork()\n"
        "    if not child:\n        time.sleep(60)\n        os._exit(0)\n"
        "    print(child, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.stdout.close()
    try:
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)
