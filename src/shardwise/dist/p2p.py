"""Messages from one rank of a group to another."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import final

import torch.distributed as c10d
from torch import Tensor

from shardwise.dist.collectives import Group
from shardwise.dist.meter import Call, Meter


@final
@dataclass(frozen=True)
class Transfer:
    """A message under way; its tensor is kept alive and must not be touched before `wait`."""

    handle: c10d.Work
    tensor: Tensor
    meter: Meter | None = None
    call: Call | None = None

    def wait(self, timeout_seconds: float | None = None) -> Tensor:
        """Block until the message was handed over, and return its tensor.

        Args:
            timeout_seconds: None waits as long as the process group allows.

        Raises:
            RuntimeError: it was not handed over in time, or the peer is gone.
        """
        with self.meter.waiting(self.call) if self.meter is not None and self.call is not None else nullcontext():
            if timeout_seconds is None:
                self.handle.wait()
            else:
                self.handle.wait(timedelta(seconds=timeout_seconds))
        return self.tensor


def start_send(tensor: Tensor, group: Group, peer: int) -> Transfer:
    """Begin to send a contiguous tensor to the group's member `peer`.

    Two ranks must begin the messages between them in the same order.
    """
    call = None
    if group.meter is not None:
        size = tensor.numel() * tensor.element_size()
        call = group.meter.start("message", size, 2, what=f"a send to member {peer}", group=group.name)
    work = c10d.isend(tensor, group=group.handle, group_dst=peer)
    assert work is not None  # None is for ranks outside of the group
    return Transfer(work, tensor, group.meter, call)


def start_receive(tensor: Tensor, group: Group, peer: int) -> Transfer:
    """Begin to receive into a contiguous tensor, from the group's member `peer`."""
    call = None
    if group.meter is not None:  # the sender counts its bytes
        call = group.meter.start("message", 0, 2, what=f"a receive from member {peer}", group=group.name)
    work = c10d.irecv(tensor, group=group.handle, group_src=peer)
    assert work is not None
    return Transfer(work, tensor, group.meter, call)
