"""The machine at hand as a `Machine` whose figures were measured."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.probe.busy import MOST_ATTEMPTS, others_running, undisturbed
from shardwise.probe.kernels import call_overheads, kernel_rates
from shardwise.probe.messages import SIZES, message_times, node_message_times, overlap_slowdown
from shardwise.probe.place import memory_bytes, this_place
from shardwise.run.choose import usable_cores
from shardwise.run.heap import keep_freed_memory
from shardwise.run.launch import Nodes, launch
from shardwise.spec.machine import Accelerator, Figure, Link, Machine
from shardwise.spec.measured import METHOD, KernelRate, Measured, MessageTime
from shardwise.spec.rank import Rank

MOST_WORKERS = 8
"""Processes whose messages are timed at most: more take longer than a probe may."""

LEAST_GROUP = 4
"""Groups are timed up to this size even on fewer cores: people do start more workers than cores."""

_TIMEOUT_SECONDS = 60.0

LONGEST_SECONDS = 40.0
"""After this time nothing that others disturbed is measured again."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Alone:
    """What one process measures by itself."""

    kernels: list[KernelRate]
    call_seconds: float
    graph_seconds: float


@dataclass(frozen=True)
class _Together:
    """What a group of processes measures."""

    ready: float
    kernels: list[KernelRate]
    messages: list[MessageTime]
    overlap: float
    resident: float


def probe(*, quick: bool = False, tell: Callable[[str], None] = lambda text: None) -> Machine:
    """Measure this machine. Starts processes and ends them; takes 10 to 40 seconds on two cores, a minute where others use them.

    What others disturbed is measured again, and the figures say how busy the cores were at best.

    Args:
        quick: fewer sizes, for a training that is about to start: a few seconds.
        tell: receives a sentence before each part.

    Raises:
        RunFailed: a process died.
    """
    cores, load, disturbed = usable_cores(), others_running(), [0.0]
    ends = time.monotonic() + LONGEST_SECONDS
    silent: Callable[[str], None] = lambda text: None  # noqa: E731

    def quietly(what: str, measure: Callable[[], T], figures: Callable[[T], Iterable[KernelRate]]) -> T:
        """The least disturbed of a few attempts, with the best rates of all: others only ever make an operation slower."""
        tell(what)
        attempts = 1 if quick else MOST_ATTEMPTS
        found, others = undisturbed(measure, tell, attempts=attempts, may_go_on=lambda: time.monotonic() < ends)
        disturbed.append(others)
        kernels.extend(best_rates([rate for one in found for rate in figures(one)]))
        return found[0]

    kernels: list[KernelRate] = []
    alone = quietly(
        "one process with one thread: operations by kind and size",
        lambda: launch(lambda rank: _alone(rank, quick), workers=1, threads=1, max_restarts=1, report=silent),
        lambda found: found.kernels,
    )
    if cores > 1:
        wide = lambda rank: kernel_rates(1, cores, lambda: None, 2 if quick else 3)  # noqa: E731
        quietly(
            f"one process with {cores} threads: the same",
            lambda: launch(wide, workers=1, threads=cores, max_restarts=1, report=silent),
            lambda found: found,
        )
    messages: list[MessageTime] = []
    ready, overlap, resident = [], 1.0, []
    sizes = sorted({min(cores, MOST_WORKERS)} if quick else {2, LEAST_GROUP, min(cores, MOST_WORKERS)})
    for workers in (size for size in sizes if size > 1):

        def together(workers: int = workers) -> tuple[_Together, float]:
            began = time.time()
            work = lambda rank: _together(rank, quick, workers <= cores)  # noqa: E731
            found = launch(work, workers=workers, threads=1, report=silent)
            return found, found.ready - began

        found, began = quietly(
            f"{workers} processes at once: operations and messages", together, lambda one: one[0].kernels
        )
        messages += found.messages
        resident.append(found.resident)
        if workers <= max(2, cores):
            ready.append(began)
            overlap = found.overlap
    measured = Measured(
        date=date.today().isoformat(),
        place=this_place(),
        cores=cores,
        memory_bytes=memory_bytes(),
        call_seconds=alone.call_seconds,
        graph_seconds=alone.graph_seconds,
        overlap_slowdown=overlap,
        startup_seconds=ready[0] if ready else 1e-3,
        worker_bytes=max(resident) if resident else _resident_bytes(),
        load=round(load, 2),
        others_cores=round(max(disturbed), 2),
        method=METHOD,
        kernels=tuple(kernels),
        messages=tuple(no_faster_with_more(messages)),
    )
    return as_machine(measured)


def best_rates(rates: Iterable[KernelRate]) -> list[KernelRate]:
    """The highest of the rates of each kind and size, in the order in which these come first."""
    best: dict[tuple[object, ...], KernelRate] = {}
    for rate in rates:
        key = (rate.kind, rate.precision, rate.size, rate.workers, rate.threads)
        best[key] = max(rate, best.get(key, rate), key=lambda one: one.per_second)
    return list(best.values())


def probe_nodes(machine: Machine, nodes: Nodes, tell: Callable[[str], None] = lambda text: None) -> Machine:
    """Measure what messages between machines take, and add it to the figures of one. Each machine calls this.

    Args:
        machine: probed, this one.
        nodes: how many there are, and where they meet. They must be alike: the planner takes all for this one.
        tell: receives a sentence before it begins, and one for every way in which another machine differs.

    Raises:
        RunFailed: the others did not come, or a process died.
    """
    measured = machine.measured
    assert measured is not None
    local = min(2, measured.cores)
    tell(f"{nodes.count} machines with {local} {'process' if local == 1 else 'processes'} each: messages")
    messages, places = launch(
        lambda rank: _between_nodes(rank, nodes.count),
        workers=local * nodes.count,
        threads=1,
        nodes=nodes,
        report=lambda text: None,
    )
    for node, place in enumerate(places[::local]):
        for difference in measured.differs_from(place):
            tell(f"machines are not alike, and plans assume that they are: on node {node} {difference}")
    inside = [item for item in measured.messages if item.nodes == 1]
    measured = replace(measured, messages=(*inside, *no_faster_with_more(messages)), nodes=nodes.count)
    return replace(machine, inter=_network(measured, machine.gpus_per_node), measured=measured)


def _between_nodes(rank: Rank, nodes: int) -> tuple[list[MessageTime], list[dict[str, str]]]:
    torch.set_num_threads(1)
    with process_group(rank, "cpu", _TIMEOUT_SECONDS):
        world = Group.world()
        return node_message_times(world, nodes), world.gather_objects(this_place())


def _network(measured: Measured, per_node: int) -> Link:
    """The network as the share of each of a machine's workers, from transfers between two of them."""
    source = f"shardwise probe, {measured.date}"
    sends = [
        item for item in measured.messages if item.collective == "send" and item.nodes > 1 and item.placement == "all"
    ]
    sends = sorted((item for item in sends if item.ranks == item.nodes), key=lambda item: item.message_bytes)
    low, high = sends[0], sends[-1]
    # Where sizes make no difference, latency is all that was seen, and the speed is at least this.
    more, longer = high.message_bytes - low.message_bytes, high.seconds - low.seconds
    speed = more / longer if longer > 0.0 else high.message_bytes / high.seconds
    return Link(
        bytes_per_second=Figure(speed / per_node, "measured", source),
        latency_seconds=Figure(low.seconds, "measured", source),
    )


def no_faster_with_more(messages: list[MessageTime]) -> list[MessageTime]:
    """The same, where a message among more ranks takes at least as long as one among fewer, on one way and alone there."""
    found = []
    for item in messages:
        fewer = [
            other.seconds
            for other in messages
            if (other.collective, other.way, other.placement) == (item.collective, item.way, "all")
            and (other.message_bytes, other.nodes) == (item.message_bytes, item.nodes)
            and other.ranks < item.ranks
        ]
        found.append(replace(item, seconds=max(item.seconds, *fewer)) if fewer else item)
    return found


def as_machine(measured: Measured) -> Machine:
    """The figures as a machine of equal devices, one a core, so that everything that reads machines can use them."""
    source = f"shardwise probe, {measured.date}"

    def figure(value: float) -> Figure:
        return Figure(value, "measured", source)

    peaks = {}
    for precision in ("fp32", "bf16"):
        rates = [
            item.per_second
            for item in measured.kernels
            if item.kind == "matmul" and item.precision == precision and item.threads == 1
        ]
        peaks[precision] = figure(max(rates))
    copies = [(item.size, item.per_second) for item in measured.kernels if item.kind == "copy" and item.threads == 1]
    attention = measured.rate("attention", 1e7, workers=1, threads=1) or peaks["fp32"].value
    large = measured.message_seconds("send", 16 * 2**20, ranks=2)
    small = measured.message_seconds("send", 1024, ranks=2)
    nobody = Figure(1e9, "nominal", "one core: there is no second worker to talk to")
    link = Link(
        bytes_per_second=figure(16 * 2**20 / large) if large else nobody,
        latency_seconds=figure(small) if small else Figure(1e-4, "nominal", nobody.source),
    )
    outside = "one machine: no other node was seen; as inside"
    return Machine(
        name="this-machine",
        accelerator=Accelerator(
            name=f"core of {measured.place.get('processor', 'a processor')}",
            memory_bytes=figure(measured.memory_bytes / measured.cores),
            memory_bytes_per_second=figure(max(copies)[1]),
            peak_flops=peaks,
            matmul_fraction={name: figure(1.0) for name in peaks},
            attention_fraction=figure(min(1.0, attention / peaks["fp32"].value)),
            multiprocessors=Figure(1, "nominal", "one thread"),
        ),
        gpus_per_node=measured.cores,
        intra=link,
        inter=Link(
            bytes_per_second=Figure(link.bytes_per_second.value, "nominal", outside),
            latency_seconds=Figure(link.latency_seconds.value, "nominal", outside),
        ),
        measured=measured,
    )


def _alone(rank: Rank, quick: bool) -> _Alone:
    keep_freed_memory()  # as a training does: what a call costs depends on it
    call, graph = call_overheads()
    return _Alone(kernel_rates(1, 1, lambda: None, 2 if quick else 3), call, graph)


def _together(rank: Rank, quick: bool, busy: bool) -> _Together:
    keep_freed_memory()
    torch.set_num_threads(1)
    with process_group(rank, "cpu", _TIMEOUT_SECONDS):
        world = Group.world().with_shared_memory(_TIMEOUT_SECONDS)
        world.sum_(torch.ones(1))
        ready, resident = time.time(), _resident_bytes()
        kernels = kernel_rates(world.size, 1, world.barrier, 2 if quick else 3) if busy else []
        messages = message_times(world, SIZES[1:3] if quick else SIZES)
        return _Together(ready, kernels, messages, overlap_slowdown(world) if busy else 1.0, resident)


def _resident_bytes() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return float(pages * resource.getpagesize())
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
