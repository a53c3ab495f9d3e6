"""Several nodes: two launchers on loopback, and in two network namespaces where this machine allows them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise import errors
from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.jobs.digits import digits
from shardwise.run import choose, rendezvous
from shardwise.run.claim import open_folder
from shardwise.run.folder import RunFolder
from shardwise.run.launch import Nodes, launch
from shardwise.run.network import interface_towards
from shardwise.run.pulse import Pulse
from shardwise.spec.rank import Rank

SECONDS = 20.0
CLONE_NEWNET = 0x40000000  # linux/sched.h

Node = tuple[BaseProcess, Connection]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_node(
    worker: Callable[[Rank], Any],
    nodes: Nodes,
    namespace: str | None = None,
    report: Callable[[str], None] = lambda _: None,
    **arguments: Any,
) -> Node:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def main() -> None:
        if namespace is not None:
            with Path(f"/var/run/netns/{namespace}").open() as handle:
                assert ctypes.CDLL(None).setns(handle.fileno(), CLONE_NEWNET) == 0
        try:
            answer: Any = launch(worker, threads=1, nodes=nodes, report=report, **{"workers": 2, **arguments})
        except errors.ShardwiseError as error:
            answer = error
        theirs.send_bytes(pickle.dumps(answer))

    process = context.Process(target=main)
    process.start()
    theirs.close()
    return process, ours


@contextlib.contextmanager
def two_nodes(
    worker: Callable[[Rank], Any],
    endpoint: str | None = None,
    namespaces: tuple[str, str] | None = None,
    **arguments: Any,
) -> Iterator[list[Node]]:
    endpoint = endpoint or f"127.0.0.1:{free_port()}"
    started: list[Node] = []
    try:
        for node in range(2):
            nodes = Nodes(count=2, node_rank=node, endpoint=endpoint, join_seconds=10.0, lost_after_seconds=2.0)
            started.append(start_node(worker, nodes, namespaces[node] if namespaces else None, **arguments))
        yield started
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def answer_of(node: Node) -> Any:
    assert node[1].poll(SECONDS), "the launcher did not end"
    return pickle.loads(node[1].recv_bytes())


def total_of_ranks(rank: Rank) -> tuple[Rank, float]:
    with process_group(rank, "cpu", SECONDS):
        x = torch.tensor([float(rank.rank + 1)])
        dist.all_reduce(x)
    return rank, float(x)


@pytest.mark.parametrize("workers", [2, 4])
def test_two_nodes_meet(workers: int) -> None:
    with two_nodes(total_of_ranks, workers=workers) as nodes:
        answers = [answer_of(node) for node in nodes]
    for node, (rank, total) in enumerate(answers):
        assert total == workers * (workers + 1) / 2
        assert (rank.node, rank.nodes, rank.workers, rank.local_workers) == (node, 2, workers, workers // 2)
        assert (rank.rank, rank.local_rank) == (node * workers // 2, 0)


def fail_on_rank_1(rank: Rank) -> None:
    with process_group(rank, "cpu", 10 * SECONDS):
        if rank.rank == 1:
            raise ZeroDivisionError("boom")
        dist.barrier()


def test_a_failure_on_one_node_is_told_on_both() -> None:
    with two_nodes(fail_on_rank_1) as nodes:
        answers = [answer_of(node) for node in nodes]
    for answer in answers:
        assert isinstance(answer, errors.RunFailed)
        assert answer.rank == 1
        assert str(answer) == "rank 1 failed with ZeroDivisionError: boom"
        assert "raise ZeroDivisionError" in answer.details


def die_on_rank_1(rank: Rank, kills: int) -> tuple[int, float]:
    with process_group(rank, "cpu", 10 * SECONDS):
        x = torch.ones(1)
        dist.all_reduce(x)
        if rank.rank == 1 and rank.restarts < kills:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(x)
    return rank.restarts, float(x)


def test_both_nodes_restart_together() -> None:
    with two_nodes(functools.partial(die_on_rank_1, kills=3), max_restarts=3) as nodes:
        answers = [answer_of(node) for node in nodes]
    assert answers == [(3, 4.0), (3, 4.0)]


def sit(rank: Rank, folder: Path) -> None:
    (folder / f"{rank.rank}.part").write_text(str(os.getpid()))
    (folder / f"{rank.rank}.part").rename(folder / f"{rank.rank}.pid")
    with process_group(rank, "cpu", 10 * SECONDS):
        dist.barrier()
        (folder / f"{rank.rank}.met").touch()
        if rank.rank == 0:
            dist.barrier()  # the other never comes
        time.sleep(10 * SECONDS)


def wait_for(folder: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + SECONDS
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.02)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_launcher_ends_the_other_node(tmp_path: Path, gone: Callable[[int], bool], dead: int) -> None:
    with two_nodes(functools.partial(sit, folder=tmp_path)) as nodes:
        wait_for(tmp_path, "*.met", 2)
        began = time.monotonic()
        nodes[dead][0].kill()
        answer = answer_of(nodes[1 - dead])
    assert time.monotonic() - began < SECONDS
    assert isinstance(answer, errors.RunFailed)
    assert f"node {dead} gave no sign of life for 2 s" in str(answer)
    assert answer.rank == dead
    assert all(gone(int(path.read_text())) for path in tmp_path.glob("*.pid"))


def test_a_node_that_comes_back_is_taken_into_the_next_round() -> None:
    def die_with_the_launcher(rank: Rank) -> tuple[int, float]:
        if rank.rank == 1 and rank.restarts == 0:
            os.kill(os.getppid(), signal.SIGKILL)
        return rank.restarts, total_of_ranks(rank)[1]

    endpoint = f"127.0.0.1:{free_port()}"
    with two_nodes(die_with_the_launcher, endpoint, max_restarts=1) as nodes:
        nodes[1][0].join(SECONDS)
        back = Nodes(count=2, node_rank=1, endpoint=endpoint, join_seconds=10.0, lost_after_seconds=2.0)
        nodes.append(start_node(die_with_the_launcher, back, max_restarts=1))
        assert [answer_of(nodes[0]), answer_of(nodes[2])] == [(1, 3.0), (1, 3.0)]


def test_a_node_that_does_not_come_is_named() -> None:
    nodes = Nodes(count=2, node_rank=0, endpoint=f"127.0.0.1:{free_port()}", join_seconds=0.5)
    with pytest.raises(errors.RunFailed, match=r"node 1 of 2 nodes did not come within 0\.5 s"):
        launch(total_of_ranks, workers=2, threads=1, nodes=nodes)


def test_a_node_without_node_0_says_so() -> None:
    nodes = Nodes(count=2, node_rank=1, endpoint=f"127.0.0.1:{free_port()}", join_seconds=0.5)
    with pytest.raises(errors.RunFailed, match="nobody answers at the rendezvous endpoint"):
        launch(total_of_ranks, workers=2, threads=1, nodes=nodes)


def test_nodes_that_start_other_numbers_of_workers_are_told() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = [Nodes(count=2, node_rank=node, endpoint=endpoint, join_seconds=10.0) for node in range(2)]
    started = [start_node(total_of_ranks, here, workers=2 + 2 * here.node_rank) for here in nodes]
    answers = [str(answer_of(node)) for node in started]
    assert answers[0].startswith("workers a node is 1 on node 0 and 2 on node 1. Start all nodes with the same")
    assert answers[1].startswith("workers a node is 2 on node 1 and 1 on node 0.")


def test_a_node_is_told_that_node_0_left_while_it_waited_for_others() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    first = start_node(total_of_ranks, Nodes(count=3, endpoint=endpoint, join_seconds=1.0), workers=3)
    later = start_node(total_of_ranks, Nodes(count=3, node_rank=1, endpoint=endpoint, join_seconds=SECONDS), workers=3)
    assert "node 2 of 3 nodes did not come within 1 s" in str(answer_of(first))
    answer = answer_of(later)
    assert isinstance(answer, errors.RunFailed)
    assert f"node 0, which hosts the store at {endpoint}, ended while this node waited" in str(answer)


def test_whoever_waits_long_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_QUIET_SECONDS", 0.1)
    said: list[str] = []
    endpoint = f"127.0.0.1:{free_port()}"
    for node in (0, 1):
        nodes = Nodes(count=2, node_rank=node, endpoint=endpoint, join_seconds=0.5)
        with pytest.raises(errors.RunFailed):
            launch(total_of_ranks, workers=2, threads=1, nodes=nodes, report=said.append)
    assert said == [
        f"waiting for node 1 to come at {endpoint}, up to 0.5 s",
        f"waiting for node 0 to answer at {endpoint}, up to 0.5 s",
    ]


def test_node_0_keeps_the_store_until_all_know_that_all_are_done() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set("here/0", "1")
    store.set("here/1", "1")
    first = Pulse(store, node=0, nodes=2, workers_per_node=1, lost_after_seconds=SECONDS)
    store.set("done/1", "1")
    while not first.all_done():
        time.sleep(0.01)
    ending = threading.Thread(target=first.end)
    ending.start()
    ending.join(0.5)
    assert ending.is_alive()
    store.set("heard/1", "1")
    ending.join(SECONDS)
    assert not ending.is_alive()


def open_from(rank: Rank, places: list[Path]) -> None:
    os.chdir(places[rank.rank])
    with process_group(rank, "cpu", SECONDS), open_folder("run", "job", Group.world(), resume=False):
        raise AssertionError("a folder that one rank does not see was opened")


def test_a_run_folder_that_one_machine_does_not_see_is_refused(tmp_path: Path) -> None:
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    with pytest.raises(
        errors.FolderError, match="rank 1 does not see the run folder run, which rank 0 has made: --out"
    ):
        launch(functools.partial(open_from, places=places), workers=2, threads=1)


def goes_on(rank: Rank, place: Path) -> bool:
    with (
        process_group(rank, "cpu", SECONDS),
        open_folder(place, "job", Group.world(), resume=rank.rank == 1) as (_, resume),
    ):
        return resume


def test_a_run_goes_on_where_one_rank_knows_that_it_was_restarted(tmp_path: Path) -> None:
    place = RunFolder.create(tmp_path / "run", "job").path
    assert launch(functools.partial(goes_on, place=place), workers=2, threads=1) is True


@pytest.mark.parametrize(("cores", "batch_size", "nodes", "workers"), [(2, 50, 2, 2), (2, 64, 2, 4), (4, 8, 3, 3)])
def test_nodes_get_the_same_number_of_workers(
    monkeypatch: pytest.MonkeyPatch, cores: int, batch_size: int, nodes: int, workers: int
) -> None:
    monkeypatch.setattr(choose, "usable_cores", lambda: cores)
    job = replace(digits(), batch_size=batch_size)
    assert choose.choose_plan(job, workers=None, threads=None, device="cpu", nodes=nodes).layout.workers == workers


def test_a_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        nodes = Nodes(count=2, endpoint=f"127.0.0.1:{taken.getsockname()[1]}", join_seconds=5.0)
        with pytest.raises(errors.RunFailed, match="node 0 cannot host the store at"):
            launch(total_of_ranks, workers=2, threads=1, nodes=nodes)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_interface_towards_a_host_is_found(host: str) -> None:
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("NOT TESTED: IPv6, which this machine has not")
    assert interface_towards(host) == "lo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "at least one node"),
        ({"count": 2, "node_rank": 2, "endpoint": "h:1"}, "numbered from 0 to 1"),
        ({"count": 2}, "place to meet"),
        ({"count": 2, "endpoint": "host"}, "must be HOST:PORT"),
        ({"count": 2, "endpoint": "host:99999"}, "must be HOST:PORT"),
    ],
)
def test_wrong_nodes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        Nodes(**arguments)


def test_workers_that_do_not_divide_over_the_nodes_are_refused() -> None:
    with pytest.raises(errors.UserError, match="3 workers do not divide over 2 nodes"):
        launch(total_of_ranks, workers=3, threads=1, nodes=Nodes(count=2, endpoint="127.0.0.1:1234"))


# Two network namespaces ----------------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces that see each other as 10.213.77.1 and .2, fd77::1 and ::2."""
    names = (f"sw{os.getpid()}a", f"sw{os.getpid()}b")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "addr", "add", f"10.213.77.{number}/24", "dev", name)
                ip("-n", name, "addr", "add", f"fd77::{number}/64", "dev", name, "nodad")
                ip("-n", name, "link", "set", name, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"NOT TESTED: nodes in separate networks; this machine makes no network namespaces: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)


@pytest.mark.parametrize("host", ["10.213.77.1", "[fd77::1]"])
def test_nodes_in_separate_networks_meet(namespaces: tuple[str, str], host: str) -> None:
    with two_nodes(total_of_ranks, endpoint=f"{host}:29500", namespaces=namespaces, workers=4) as nodes:
        answers = [answer_of(node) for node in nodes]
    assert [(rank.rank, total) for rank, total in answers] == [(0, 10.0), (2, 10.0)]


def test_a_cut_cable_ends_both_nodes(tmp_path: Path, namespaces: tuple[str, str]) -> None:
    worker = functools.partial(sit, folder=tmp_path)
    with two_nodes(worker, endpoint="10.213.77.1:29500", namespaces=namespaces) as nodes:
        wait_for(tmp_path, "*.met", 2)
        ip("-n", namespaces[0], "link", "set", namespaces[0], "down")
        answers = [answer_of(node) for node in nodes]
    assert "node 1 gave no sign of life for 2 s" in str(answers[0])
    assert "node 0 gave no sign of life for 2 s, and it hosts the store of the run" in str(answers[1])
