"""One call of each collective, as the mesh axes use it, for whoever wants to know how long it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as c10d

from shardwise.dist.collectives import Group
from shardwise.dist.p2p import Transfer, start_receive, start_send


# Torch 2.13 gave them new names and warns about the old ones, which are all that earlier versions have.
_gather: Callable[..., object] = getattr(c10d, "all_gather_single", None) or c10d.all_gather_into_tensor
_scatter: Callable[..., object] = getattr(c10d, "reduce_scatter_single", None) or c10d.reduce_scatter_tensor


class SampleExchange:
    """A message out and one in between ranks 2 n and 2 n + 1, begun and ended as pipelines do it: `begin` before a rank computes,
    and `end` when it has."""

    def __init__(self, group: Group, size_bytes: int) -> None:
        self._group, self._peer = group, group.rank ^ 1
        self._out, self._in = torch.zeros(size_bytes, dtype=torch.uint8), torch.zeros(size_bytes, dtype=torch.uint8)
        self._transfers: list[Transfer] = []

    def begin(self) -> None:
        """Ask for a message and send one."""
        if self._peer < self._group.size:
            self._transfers = [
                start_receive(self._in, self._group, self._peer),
                start_send(self._out, self._group, self._peer),
            ]

    def end(self) -> None:
        """Wait for both."""
        for transfer in self._transfers:
            transfer.wait()


def sample_calls(group: Group, size_bytes: int) -> dict[str, Callable[[], object]]:
    """Collective -> a function that runs it once over `group`, each rank putting in `size_bytes` (fp32).

    `all_reduce` is `Group.sum_`, so it goes the way gradients go: through shared memory where the group has some. The
    others are what FSDP2 (gather and scatter, whole result or whole input of that size), experts (`all_to_all`) and
    pipelines (`send`, from even to odd ranks) call.
    """
    count = max(group.size, size_bytes // 4 // group.size * group.size)
    whole, other = torch.zeros(count), torch.zeros(count)
    part = torch.zeros(count // group.size)

    def send() -> None:
        peer = group.rank ^ 1
        if peer >= group.size:
            return
        if group.rank % 2 == 0:
            c10d.send(whole, group=group.handle, group_dst=peer)
            c10d.recv(other, group=group.handle, group_src=peer)
        else:
            c10d.recv(other, group=group.handle, group_src=peer)
            c10d.send(whole, group=group.handle, group_dst=peer)

    return {
        "all_reduce": lambda: group.sum_(whole),
        "all_gather": lambda: _gather(whole, part, group=group.handle),
        "reduce_scatter": lambda: _scatter(part, whole, group=group.handle),
        "all_to_all": lambda: c10d.all_to_all_single(other, whole, group=group.handle),
        "send": send,
    }
