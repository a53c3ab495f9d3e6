"""Seconds of messages between the workers of a job: measured ones on the machine at hand, formulas on a catalogued one."""

from dataclasses import dataclass

from shardwise.planner import collectives
from shardwise.planner.collectives import Group, Network, network
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.spec.layout import AXES, Layout
from shardwise.spec.machine import Machine
from shardwise.spec.measured import Way

BUSY_SECONDS = 1.5e-3
"""What a message through gloo's sockets costs more inside of a step than in a row of messages: its threads must first get a
core that computes (measured on two cores, 2026-11-26; docs/notes.md tells of 2.7 ms for 248 KB)."""


@dataclass(frozen=True)
class Links:
    """The connections between the ranks of one layout on one machine."""

    machine: Machine
    layout: Layout
    constants: Constants = DEFAULT

    def seconds(self, collective: str, size_bytes: float, axes: tuple[str, ...]) -> float:
        """One collective of `size_bytes` over the ranks along `axes`; 0 where there is a single one."""
        degrees = self.layout.degrees
        ranks = 1
        for axis in axes:
            ranks *= degrees[axis]
        if ranks <= 1 or size_bytes <= 0:
            return 0.0
        measured = self.machine.measured
        if measured is not None:
            way: Way = "gloo"
            if collective == "all_reduce" and ranks == self.layout.workers and self._one_machine():
                way = "shared memory"
            placement = "all" if ranks == self.layout.workers else self._placement(axes)
            for choice in (way, "gloo", None):
                found = measured.message_seconds(
                    collective,
                    size_bytes,
                    ranks=ranks,
                    way=choice,
                    placement=placement,
                )
                if found is not None:
                    return found + (0.0 if choice == "shared memory" else BUSY_SECONDS)
        return self._formula(collective, size_bytes, ranks, axes)

    def _one_machine(self) -> bool:
        return self.layout.workers <= max(self.machine.gpus_per_node, 8)

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

    def _formula(self, collective: str, size_bytes: float, ranks: int, axes: tuple[str, ...]) -> float:
        net: Network = network(self.machine, self.constants)
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
