"""What collectives add to a step, by size, number of ranks and placement, on the ways that trainings really use.

A message in a row of messages finds every rank waiting for it. In a step it finds ranks that compute, helper threads that
first need a core, and, where workers outnumber cores, ranks that are not running at all. So each call is timed between
products: seconds of a loop that computes and sends, less those of a loop that only computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median
from typing import Literal

import torch

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.dist.sample import SampleExchange, sample_calls
from shardwise.probe.kernels import seconds_of
from shardwise.run.choose import usable_cores
from shardwise.spec.layout import Layout
from shardwise.spec.measured import EXCHANGE_BYTES, MessageTime, Way

SIZES = (1024, 64 * 1024, 1024**2, 16 * 1024**2)
"""Bytes: a flag, a small model's gradients, a layer's, a bucket's."""

ENOUGH_SECONDS = 0.012
"""Length of one loop."""

LOOPS = 3
"""The fastest of so many loops counts: other programs on the machine only ever make one slower."""

LONGEST_SECONDS = 0.05
"""Where a collective takes longer, larger ones of its kind are not timed: what is left is bandwidth."""

LEAST_SECONDS = 1e-6

WORK_EDGE = 256
"""Edge of the product between messages: a third of a millisecond on a core of today."""

EXCHANGE_SIZES = (1024, EXCHANGE_BYTES)
"""Bytes: what small passes of a pipeline hand on."""

EXCHANGE_SECONDS = 1e-3
"""Length of the computation beside an exchange."""

EXCHANGES, EXCHANGE_LOOPS = 16, 6
"""Exchanges of a loop, and loops, of which the cheapest counts. Its mean does: gloo's thread spins on a lock only now and then,
and that is part of what exchanges cost."""

Placement = Literal["all", "consecutive", "strided"]


@dataclass(frozen=True)
class Members:
    """Ranks whose collectives are timed while all others of the world wait; None for a rank that waits."""

    group: Group | None
    way: Way
    placement: Placement
    ranks: int
    nodes: int = 1


def message_times(world: Group, sizes: tuple[int, ...] = SIZES) -> list[MessageTime]:
    """All collectives over all ranks and, where there are four, over neighbouring and over strided pairs. Collective."""
    return [time for members in _inside(world) for time in _of_members(members, world, sizes)]


def node_message_times(world: Group, nodes: int) -> list[MessageTime]:
    """All collectives over machines: one rank of each, all ranks, and each rank with those of its place. Collective.

    Args:
        world: as many ranks on each machine, machine after machine, without shared memory between them.
        nodes: machines.
    """
    return [time for members in _across(world, nodes) for time in _of_members(members, world, SIZES)]


def _of_members(members: Members, world: Group, sizes: tuple[int, ...]) -> list[MessageTime]:
    found: list[MessageTime] = []
    a = torch.ones(WORK_EDGE, WORK_EDGE)

    def work() -> None:
        torch.mm(a, a)

    if (members.way, members.placement) == ("gloo", "all") and world.size <= usable_cores() * members.nodes:
        found += _exchanges(members, world, work)  # ranks that take turns on a core would wait for each other
    loops = _Loops(world, work)
    names = ("all_reduce",) if members.way == "shared memory" else tuple(sample_calls(Group(), 4))
    for name in names:  # what goes through sockets in any case is timed with them
        times = []
        for size in sizes:
            calls = sample_calls(members.group, size) if members.group is not None else {}
            seconds = loops.added(calls.get(name))
            times.append(seconds / 2 if name == "send" else seconds)  # there and back
            if seconds > LONGEST_SECONDS:
                break
        # A smaller message takes no longer than a larger one: where it seems to, other programs were in the way.
        fastest = list(accumulate(reversed(times), min))[::-1]
        found += [
            MessageTime(
                collective=name,
                way=members.way,
                ranks=members.ranks,
                placement=members.placement,
                message_bytes=size,
                seconds=seconds,
                nodes=members.nodes,
            )
            for size, seconds in zip(sizes, fastest, strict=False)
        ]
    return found


def _exchanges(members: Members, world: Group, work: Callable[[], object]) -> list[MessageTime]:
    """What a message out and one in take of a rank that computes meanwhile: processor time, of gloo's threads as well."""
    once = max(float(item) for item in world.gather_objects(seconds_of(work)))
    repeats = max(1, round(EXCHANGE_SECONDS / once))

    def fastest(exchange: SampleExchange | None) -> float:
        times = []
        for _ in range(EXCHANGE_LOOPS):
            world.barrier()
            began = time.process_time()
            for _ in range(EXCHANGES if members.group is not None else 0):
                if exchange is not None:
                    exchange.begin()
                for _ in range(repeats):
                    work()
                if exchange is not None:
                    exchange.end()
            times.append((time.process_time() - began) / EXCHANGES)
        least: float = min(max(loop) for loop in zip(*world.gather_objects(times), strict=True))
        return least

    alone = fastest(None)
    found: list[MessageTime] = []
    for size in EXCHANGE_SIZES:
        exchange = SampleExchange(members.group, size) if members.group is not None else None
        added = max(LEAST_SECONDS, fastest(exchange) - alone)
        found.append(
            MessageTime(
                collective="exchange",
                way=members.way,
                ranks=members.ranks,
                placement=members.placement,
                message_bytes=size,
                seconds=max([added, *(item.seconds for item in found)]),
                nodes=members.nodes,
            )
        )
    return found


class _Loops:
    """Loops over a product, with and without a collective."""

    def __init__(self, world: Group, work: Callable[[], object]) -> None:
        self._world, self._work = world, work
        work()
        self._alone = self._fastest(work, self._repeats(work))

    def added(self, call: Callable[[], object] | None) -> float:
        """Seconds that a call adds to a loop; None for a rank that takes no part and waits. Collective over the world."""

        def both() -> None:
            self._work()
            if call is not None:
                call()

        doing = both if call is not None else lambda: None
        doing()
        repeats = self._repeats(doing)
        added = self._fastest(doing, repeats) - self._alone
        # A row of messages finds all ranks waiting: in a step none takes less, whatever a noisy difference says.
        row = call if call is not None else lambda: None
        return max(added, self._fastest(row, repeats, loops=1), LEAST_SECONDS)

    def _repeats(self, call: Callable[[], object]) -> int:
        self._world.barrier()
        began = time.perf_counter()
        call()
        once = max(float(item) for item in self._world.gather_objects(time.perf_counter() - began))
        return max(1, min(100, round(ENOUGH_SECONDS / max(once, 1e-6))))

    def _fastest(self, call: Callable[[], object], repeats: int, loops: int = LOOPS) -> float:
        """Seconds of one call in the fastest loop; in each loop, of the slowest rank, which the others wait for."""
        times = []
        for _ in range(loops):
            self._world.barrier()
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            times.append((time.perf_counter() - began) / repeats)
        fastest: float = min(max(loop) for loop in zip(*self._world.gather_objects(times), strict=True))
        return fastest


def overlap_slowdown(world: Group) -> float:
    """How many times as long a matrix product takes while a large sum is under way. Collective."""
    a = torch.ones(256, 256)
    sockets = replace(world, memory=None)
    alone = seconds_of(lambda: a @ a, world.barrier)
    message = torch.zeros(4 * 1024**2)
    world.barrier()
    work = sockets.start_sum_(message)
    beside = seconds_of(lambda: a @ a, enough_seconds=0.01)
    work.wait()
    slowdowns = [float(item) for item in world.gather_objects(beside / alone)]
    return max(1.0, median(slowdowns))


def _inside(world: Group) -> Iterator[Members]:
    yield Members(replace(world, memory=None), "gloo", "all", world.size)
    if world.memory is not None:
        yield Members(world, "shared memory", "all", world.size)
    if world.size == 4:
        mesh = Mesh(Layout(data=2, tensor=2), world.rank)
        yield Members(mesh.group("tensor"), "gloo", "consecutive", 2)
        yield Members(mesh.group("data"), "gloo", "strided", 2)


def _across(world: Group, nodes: int) -> Iterator[Members]:
    local = world.size // nodes
    if local == 1:
        yield Members(world, "gloo", "all", nodes, nodes)
        return
    mesh = Mesh(Layout(data=nodes, tensor=local), world.rank)
    mine = mesh.group("data")
    yield Members(mine if mesh.coordinate("tensor") == 0 else None, "gloo", "all", nodes, nodes)
    yield Members(replace(world, memory=None), "gloo", "all", world.size, nodes)
    yield Members(mine, "gloo", "strided", nodes, nodes)
