"""Seconds of messages between the workers of a job: measured ones on the machine at hand, formulas on a catalogued one."""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

from shardwise.planner import collectives
from shardwise.planner.closedform import Wire
from shardwise.planner.collectives import Group, Network, network
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.spec.layout import AXES, Layout
from shardwise.spec.machine import Machine
from shardwise.spec.measured import EXCHANGE_BYTES, Way


@dataclass(frozen=True)
class Links:
    """The connections between the ranks of one layout on one machine.

    Attributes:
        nodes: measured machines that the ranks are spread over, evenly and in order.
    """

    machine: Machine
    layout: Layout
    constants: Constants = DEFAULT
    nodes: int = 1

    def seconds(self, collective: str, size_bytes: float, axes: tuple[str, ...]) -> float:
        """One collective of `size_bytes` over the ranks along `axes`; 0 where there is a single one."""
        degrees = self.layout.degrees
        ranks = 1
        for axis in axes:
            ranks *= degrees[axis]
        if ranks <= 1 or size_bytes <= 0:
            return 0.0
        if self.machine.measured is None:
            return self._formula(collective, size_bytes, ranks, axes)
        touched = self._touched(axes)
        if touched == 1:
            return self._inside(collective, size_bytes, ranks, axes)
        return self._across(collective, size_bytes, ranks, touched, axes)

    def wire(self, forward_bytes: float, backward_bytes: float, source: int, target: int) -> Wire:
        """A message of each size between two neighbours along the pipeline, given by their places in it.

        A message takes latency and, for the rest, fills its direction of the link. Ranks that share their machine's network send
        at the same time, as replicas and tensor ranks do, and have a part of its bandwidth each.
        """
        least = self._message(1.0, source, target)
        ahead, back = (self._message(size, source, target) for size in (forward_bytes, backward_bytes))
        return Wire(least, max(0.0, ahead - least), max(0.0, back - least))

    def host_seconds(self, size_bytes: float, source: int, target: int) -> float:
        """What sending or receiving one message along the pipeline takes of a rank that computes; places as for `wire`."""
        measured = self.machine.measured
        if measured is None or size_bytes <= 0:
            return 0.0
        found, size_bytes = None, min(size_bytes, EXCHANGE_BYTES)
        if self._away(source, target):
            found = measured.message_seconds("exchange", size_bytes, ranks=self.nodes, way="gloo", nodes=self.nodes)
        if found is None:
            found = measured.message_seconds("exchange", size_bytes, ranks=self.layout.workers, way="gloo")
        return 0.5 * (found or 0.0)

    def _message(self, size_bytes: float, source: int, target: int) -> float:
        if size_bytes <= 0:
            return 0.0
        measured = self.machine.measured
        if measured is None:
            return self._formula("send", size_bytes, self.layout.pipeline, ("pipeline",))
        away, local = self._away(source, target), self.layout.workers // self.nodes
        if not away:
            return self._inside("send", size_bytes, self.layout.pipeline, ("pipeline",))
        crossing = max(sum(start // local == node for start in away) for node in range(self.nodes))
        # One rank of each machine has the network for itself; all of them at once share it.
        placement = "strided" if crossing == local > 1 else "all"
        found = measured.message_seconds(
            "send", size_bytes, ranks=self.nodes, way="gloo", placement=placement, nodes=self.nodes
        )
        start = measured.message_seconds(
            "send", 1.0, ranks=self.nodes, way="gloo", placement=placement, nodes=self.nodes
        )
        if found is not None and start is not None:
            return found if placement == "strided" else start + crossing * (found - start)
        inter = self.machine.inter
        port = inter.bytes_per_second.value * self.machine.gpus_per_node
        inside = self._inside("send", size_bytes, self.layout.pipeline, ("pipeline",))
        return inside + inter.latency_seconds.value + crossing * size_bytes / port

    def _away(self, source: int, target: int) -> list[int]:
        """Ranks at one place of the pipeline whose partner at another is on another machine."""
        stride, local = self._stride(("pipeline",)), self.layout.workers // self.nodes
        starts = [rank for rank in range(self.layout.workers) if rank // stride % self.layout.pipeline == source]
        return [start for start in starts if start // local != (start + (target - source) * stride) // local]

    def _inside(self, collective: str, size_bytes: float, ranks: int, axes: tuple[str, ...]) -> float:
        """On one machine."""
        measured = self.machine.measured
        assert measured is not None
        way: Way = "gloo"
        if collective == "all_reduce" and ranks == self.layout.workers and self.nodes == 1:
            way = "shared memory"
        placement = "all" if ranks == self.layout.workers else self._placement(axes)
        for choice in (way, "gloo", None):
            found = measured.message_seconds(collective, size_bytes, ranks=ranks, way=choice, placement=placement)
            if found is not None:
                return found
        return self._formula(collective, size_bytes, ranks, axes)

    def _across(self, collective: str, size_bytes: float, ranks: int, touched: int, axes: tuple[str, ...]) -> float:
        """Over several machines: as it was measured over so many; else what it takes inside of one, and the wire."""
        measured = self.machine.measured
        assert measured is not None
        placement = "all" if ranks == self.layout.workers or self.layout.workers == self.nodes else "strided"
        found = measured.message_seconds(
            collective, size_bytes, ranks=ranks, way="gloo", placement=placement, nodes=touched
        )
        if found is not None:
            return found
        inter = self.machine.inter
        # Each rank's share of the network is that of a full machine; fewer ranks have more of it.
        local = self.layout.workers / self.nodes
        bandwidth = inter.bytes_per_second.value * self.machine.gpus_per_node * (ranks / touched) / local
        hops = 2 * (touched - 1) if collective == "all_reduce" else touched - 1
        wire = hops * inter.latency_seconds.value + _sent(collective, touched) * size_bytes / bandwidth
        return self._inside(collective, size_bytes, ranks, axes) + wire

    def _touched(self, axes: tuple[str, ...]) -> int:
        """Machines that the group of rank 0 along `axes` is spread over."""
        if self.nodes == 1:
            return 1
        strides = [(self.layout.degrees[axis], self._stride((axis,))) for axis in axes if self.layout.degrees[axis] > 1]
        local = self.layout.workers // self.nodes
        places = product(*(range(0, degree * stride, stride) for degree, stride in strides))
        return len({sum(place) // local for place in places})

    def _placement(self, axes: tuple[str, ...]) -> str:
        inner = self._stride(axes)
        return "consecutive" if inner == 1 else "strided"

    def _stride(self, axes: tuple[str, ...]) -> int:
        """Ranks between two neighbours along the innermost of `axes`."""
        present = [axis for axis in axes if self.layout.degrees[axis] > 1]
        innermost = max(present, key=AXES.index)
        stride = 1
        for axis in AXES[AXES.index(innermost) + 1 :]:
            stride *= self.layout.degrees[axis]
        return stride

    @cached_property
    def _network(self) -> Network:
        return network(self.machine, self.constants)

    def _formula(self, collective: str, size_bytes: float, ranks: int, axes: tuple[str, ...]) -> float:
        net = self._network
        per_node = max(1, min(ranks, self.machine.gpus_per_node // self._stride(axes)))
        group = Group(ranks, per_node)
        if collective == "all_reduce":
            return collectives.all_reduce(size_bytes, group, net)
        if collective == "all_gather":
            return collectives.all_gather(size_bytes, group, net)
        if collective == "reduce_scatter":
            return collectives.reduce_scatter(size_bytes, group, net)
        if collective == "all_to_all":
            return collectives.all_to_all(size_bytes, group, net)
        return collectives.send(size_bytes, group.nodes > 1, net)


def _sent(collective: str, nodes: int) -> float:
    """Bytes that a node sends over the network for each byte of a message (rings, as in collectives.py)."""
    if collective == "send":
        return 1.0
    return (2.0 if collective == "all_reduce" else 1.0) * (nodes - 1) / nodes
