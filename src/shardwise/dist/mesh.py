"""The mesh: every rank's place along every axis of the layout, and the groups of ranks along them.

Axes are ordered as in `shardwise.spec.layout.AXES`, the outermost first: ranks that differ only in the innermost axis
are neighbours, so that the axes that talk most (tensor, expert) stay inside a machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import final

import torch.distributed as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwise.dist.collectives import Group
from shardwise.dist.meter import Meter
from shardwise.spec.layout import AXES, Layout

SAMPLE_AXES = ("data", "shard", "expert")
"""Axes whose ranks hold different samples of the global batch."""

PARTS = "parts"
"""Name of the mesh dim that is `PART_AXES` put together: FSDP2 shards over one dim only."""

PART_AXES = ("shard", "context", "expert")
"""Axes whose ranks need the same sums of gradients, so that parameters can be sharded over all of them."""


@final
@dataclass
class Mesh:
    """All ranks, arranged by the layout.

    Attributes:
        layout: the degree of each axis.
        rank: this process's global rank.
        device_type: `cpu`, `cuda`, ...
        meter: notes what this rank sends and where it waits, in all groups.
    """

    layout: Layout
    rank: int
    device_type: str = "cpu"
    meter: Meter = field(default_factory=Meter)
    _groups: dict[tuple[str, ...], Group] = field(default_factory=dict)
    _device_mesh: DeviceMesh | None = None
    _world: Group | None = None

    def coordinate(self, axis: str) -> int:
        """This rank's index along an axis."""
        degrees = self.layout.degrees
        inner = prod(degrees[other] for other in AXES[AXES.index(axis) + 1 :])
        return self.rank // inner % degrees[axis]

    def group(self, *axes: str) -> Group:
        """Ranks that differ from this one only along `axes`, in rank order. Collective on first use for each `axes`.

        Every rank of the run must ask for the same groups in the same order.
        """
        key = tuple(axis for axis in AXES if axis in axes and self.layout.degrees[axis] > 1)
        if key not in self._groups:
            self._groups[key] = self._make(key)
        return self._groups[key]

    @property
    def samples(self) -> Group:
        """Ranks that share out the samples of a global batch."""
        return self.group(*SAMPLE_AXES)

    @property
    def world(self) -> Group:
        """All ranks."""
        if self._world is None:
            self._world = Group.world(self.meter)
        return self._world

    def share_memory(self, timeout_seconds: float) -> None:
        """Let the group of all ranks sum and gather through shared memory, where all are on one machine. Collective.

        Call it before any group is taken from the mesh.
        """
        if self.device_type == "cpu":
            self._world = self.world.with_shared_memory(timeout_seconds)

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """torch's DeviceMesh over the given axes with a degree above 1, in mesh order. Collective on first use.

        Raises:
            ValueError: none of the axes has a degree above 1.
        """
        wanted = tuple(axis for axis in AXES if axis in axes and self.layout.degrees[axis] > 1)
        if not wanted:
            raise ValueError(f"no axis of {axes} has a degree above 1 in {self.layout}")
        if self._device_mesh is None:
            named = [(axis, degree) for axis, degree in self.layout.degrees.items() if degree > 1]
            self._device_mesh = init_device_mesh(
                self.device_type,
                tuple(degree for _, degree in named),
                mesh_dim_names=tuple(axis for axis, _ in named),
            )
        return self._device_mesh[wanted]

    def _make(self, key: tuple[str, ...]) -> Group:
        degrees = self.layout.degrees
        size = prod(degrees[axis] for axis in key)
        if size == 1:
            return Group()
        if size == self.layout.workers:
            return self.world
        # Every rank makes all groups along these axes, in the same order, and keeps the one it is in.
        outside = [axis for axis in AXES if axis not in key]
        mine = Group()
        for fixed in product(*(range(degrees[axis]) for axis in outside)):
            place = dict(zip(outside, fixed, strict=True))
            members = []
            for free in product(*(range(degrees[axis]) for axis in key)):
                members.append(self._rank_at({**place, **dict(zip(key, free, strict=True))}))
            handle = c10d.new_group(members)
            if self.rank in members:
                mine = Group(members.index(self.rank), size, handle, meter=self.meter, name=",".join(key))
        return mine

    def _rank_at(self, place: dict[str, int]) -> int:
        rank = 0
        for axis in AXES:
            rank = rank * self.layout.degrees[axis] + place[axis]
        return rank
