"""The collectives of FSDP2, counted: they do not go through `dist`, but FSDP2 lets its communication be replaced."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch.distributed as c10d
from torch import Tensor

from shardwise.dist.meter import Meter


@final
@dataclass
class Order:
    """In which order this rank gathered and scattered units: a checksum of their names, for comparison with other ranks.

    FSDP2's messages carry no names: ranks that gather different blocks of one size at the same time get each other's parts.
    """

    checksum: int = 0

    def note(self, what: str) -> None:
        """One more."""
        self.checksum = zlib.crc32(what.encode(), self.checksum)

    def take(self) -> tuple[int, int]:
        """Two numbers below 2 ** 15 for the order since the last time, whose sums over 2 ** 16 ranks fit into 32 bits."""
        taken, self.checksum = self.checksum, 0
        return taken & 0x7FFF, (taken >> 15) & 0x7FFF


def meter_collectives(groups: Iterable[Any], meter: Meter, replicas: int, order: Order) -> None:
    """Count and time what FSDP2's parameter groups gather, reduce and scatter.

    Args:
        groups: FSDP2's own records of what it gathers and reduces together.
        meter: of this rank.
        replicas: ranks over which the scattered gradients are summed again (hybrid sharding). That sum is counted, but
            FSDP2 has no place to time it, so its seconds stay in the backward pass.
        order: is told of each.
    """
    for group in groups:
        group._all_gather_comm = _Gather(group._all_gather_comm, meter, group, order)
        group._reduce_scatter_comm = _Scatter(group._reduce_scatter_comm, meter, replicas, group, order)


@final
class _Gather:
    def __init__(self, inner: Any, meter: Meter, unit: Any, order: Order) -> None:
        self._inner, self._meter, self._unit, self._order = inner, meter, unit, order
        self.allocate = inner.allocate

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: c10d.ProcessGroup, async_op: bool = False
    ) -> Any:
        what = f"the parameters of {_unit_name(self._unit)}"
        self._order.note(what)
        size = input_tensor.numel() * input_tensor.element_size()
        with self._meter.waiting(self._meter.start("all_gather", size, group.size(), what=what, group="shard")):
            return self._inner(output_tensor, input_tensor, group, async_op)


@final
class _Scatter:
    def __init__(self, inner: Any, meter: Meter, replicas: int, unit: Any, order: Order) -> None:
        self._inner, self._meter, self._replicas, self._unit, self._order = inner, meter, replicas, unit, order
        self.allocate = inner.allocate

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: c10d.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        what = f"the gradients of {_unit_name(self._unit)}"
        self._order.note(what)
        size = input_tensor.numel() * input_tensor.element_size()
        with self._meter.waiting(self._meter.start("reduce_scatter", size, group.size(), what=what, group="shard")):
            result = self._inner(output_tensor, input_tensor, group, op, async_op)
        if self._replicas > 1:
            self._meter.start("all_reduce", output_tensor.numel() * output_tensor.element_size(), self._replicas)
        return result


def _unit_name(unit: Any) -> str:
    """FSDP2 names its units when the first forward pass begins."""
    return str(unit._module_fqn or "the root module")
