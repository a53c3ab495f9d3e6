"""Seconds of collectives by size, number of ranks and placement, on the ways that trainings really use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Literal

import torch

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.dist.sample import sample_calls
from shardwise.probe.kernels import seconds_of
from shardwise.spec.layout import Layout
from shardwise.spec.measured import MessageTime, Way

SIZES = (1024, 64 * 1024, 1024**2, 16 * 1024**2)
"""Bytes: a flag, a small model's gradients, a layer's, a bucket's."""

ENOUGH_SECONDS = 0.02
"""Time spent on one figure."""

Placement = Literal["all", "consecutive", "strided"]


def message_times(world: Group, sizes: tuple[int, ...] = SIZES) -> list[MessageTime]:
    """All collectives over all ranks and, where there are four, over neighbouring and over strided pairs. Collective."""
    found = []
    for group, way, placement in _groups(world):
        for size in sizes:
            for name, call in sample_calls(group, size).items():
                if way == "shared memory" and name != "all_reduce":
                    continue  # what goes through sockets in any case is timed with them
                seconds = _seconds(call, world)
                # The slowest rank is what the others wait for.
                slowest = max(float(item) for item in world.gather_objects(seconds))
                found.append(
                    MessageTime(
                        collective=name,
                        way=way,
                        ranks=group.size,
                        placement=placement,
                        message_bytes=size,
                        seconds=slowest / 2 if name == "send" else slowest,  # there and back
                    )
                )
    return found


def _seconds(call: Callable[[], object], world: Group) -> float:
    """Seconds of one call; every rank makes the same number of them. Collective."""
    call()
    world.barrier()
    began = time.perf_counter()
    call()
    once = max(float(item) for item in world.gather_objects(time.perf_counter() - began))
    repeats = max(2, min(50, round(ENOUGH_SECONDS / max(once, 1e-6))))
    times = []
    world.barrier()
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 4]  # other programs on the machine only ever make a message slower


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


def _groups(world: Group) -> Iterator[tuple[Group, Way, Placement]]:
    yield replace(world, memory=None), "gloo", "all"
    if world.memory is not None:
        yield world, "shared memory", "all"
    if world.size == 4:
        mesh = Mesh(Layout(data=2, tensor=2), world.rank)
        yield mesh.group("tensor"), "gloo", "consecutive"
        yield mesh.group("data"), "gloo", "strided"
