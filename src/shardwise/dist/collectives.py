"""Collectives over one group of ranks, which are no-ops where the group has a single member.

Serial code and parallel code call the same functions, so a run on one worker needs neither a process group nor branches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.distributed as c10d
from torch import Tensor

from shardwise.dist.exchange import Exchange, Message, create_memory, machine_identity, open_memory
from shardwise.dist.meter import Call, Kind, Meter


@final
@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other along one mesh axis.

    Attributes:
        rank: this process's index in the group.
        size: number of members.
        handle: torch's process group; None for a group of one, or for the default group of all ranks.
        memory: shared memory of the members, where they are processes of one machine; see `with_shared_memory`.
        meter: notes what this rank sends, where it waits and how long; None where nobody looks.
        name: axes of the mesh that the members lie along; "" for all ranks.

    The argument `what` of a collective is a short name of the tensor or module it is about, for people.
    """

    rank: int = 0
    size: int = 1
    handle: c10d.ProcessGroup | None = None
    memory: Exchange | None = None
    meter: Meter | None = None
    name: str = ""

    @classmethod
    def world(cls, meter: Meter | None = None) -> Group:
        """All ranks of the run; a group of one where no process group was started."""
        if not c10d.is_available() or not c10d.is_initialized():
            return cls(meter=meter)
        return cls(rank=c10d.get_rank(), size=c10d.get_world_size(), meter=meter)

    def sum_(self, tensor: Tensor, what: str = "") -> Tensor:
        """Replace `tensor` by its sum over the members, in place."""
        self.start_sum_(tensor, what).wait()
        return tensor

    def start_sum_(self, tensor: Tensor, what: str = "") -> Work:
        """Begin `sum_` and return at once; the tensor holds the sum after `Work.wait`."""
        if self.size == 1:
            return Work(None)
        call = self._start("all_reduce", tensor, what)
        if self.memory is not None and self.memory.takes(tensor):
            if self.meter is not None:
                self.meter.inside = call  # it may wait for room, where other ranks are behind
            messages = self.memory.put(tensor, what)
            if self.meter is not None:
                self.meter.inside = None
            return Work(None, messages, self.meter, call)
        return Work(c10d.all_reduce(tensor, group=self.handle, async_op=True), (), self.meter, call)

    def gather(self, tensor: Tensor, what: str = "") -> Tensor:
        """Every member's tensor (all of one shape), stacked along a new first dim of length `size`."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        with self._blocking("all_gather", tensor, what):
            if self.memory is not None and self.memory.takes(tensor):
                return self.memory.gather(tensor, what)
            gathered = tensor.new_empty((self.size, *tensor.shape))
            c10d.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=self.handle)
            return gathered

    def gather_uneven(self, tensor: Tensor, what: str = "") -> list[Tensor]:
        """Every member's tensor, whose first dims may differ in length; the other dims agree."""
        if self.size == 1:
            return [tensor]
        lengths = self.gather(torch.tensor([tensor.shape[0]], device=tensor.device), what).flatten().tolist()
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        return [part[:length] for part, length in zip(self.gather(padded, what), lengths, strict=True)]

    def exchange(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int], what: str = "") -> Tensor:
        """Rows for every member, for rows from every member: an all-to-all of uneven parts.

        Args:
            tensor: contiguous, of shape (sum(send), *any): first the rows for member 0, then those for member 1, ...
            send: rows for each member; 0 is allowed.
            receive: rows from each member, which the members must agree on beforehand.

        Returns:
            Tensor of shape (sum(receive), *any), rows from member 0 first.
        """
        if self.size == 1:
            return tensor
        received = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        rows = sum(send)
        others = _bytes(tensor) * (rows - send[self.rank]) // rows if rows else 0
        with self._blocking("all_to_all", tensor, what, others_bytes=others):
            c10d.all_to_all_single(received, tensor, list(receive), list(send), group=self.handle)
        return received

    def with_shared_memory(self, timeout_seconds: float) -> Group:
        """The same group, with sums and gathers of CPU tensors through shared memory. Collective.

        Where a member is on another machine, or the system does not allow it, the group stays as it is.
        """
        if self.size == 1 or self.memory is not None:
            return self
        identities = self.gather_objects(machine_identity())
        if None in identities or len(set(identities)) != 1:
            return self
        memory, descriptor, place = None, -1, ""
        if self.rank == 0:
            with suppress(OSError):
                descriptor, memory = create_memory(self.size)
                place = f"/proc/{os.getpid()}/fd/{descriptor}"
        place = self.gather_objects(place)[0]
        if place and self.rank:
            with suppress(OSError, ValueError):
                memory = open_memory(place, self.size)
        everyone = all(self.gather_objects(memory is not None))
        if descriptor >= 0:
            os.close(descriptor)
        if not everyone or memory is None:
            return self
        processes = self.gather_objects(os.getpid())
        return replace(self, memory=Exchange(memory, self.rank, processes, timeout_seconds))

    def twin(self) -> Group:
        """Another group of the same members. Collective over the members.

        Members must start the collectives of one group in the same order. Two groups have an order each, so what is
        sent at fixed points of the model need not be in step with gradients that are sent when they are ready.
        """
        if self.size == 1:
            return self
        members = c10d.get_process_group_ranks(self.handle)
        handle = c10d.new_group(members, use_local_synchronization=True)
        twin = Group(self.rank, self.size, handle, meter=self.meter, name=self.name)
        return twin if self.memory is None else twin.with_shared_memory(self.memory.timeout_seconds)

    def gather_objects(self, value: Any, what: str = "") -> list[Any]:
        """Every member's picklable value, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._blocking("all_gather", None, what):
            c10d.all_gather_object(values, value, group=self.handle)
        return values

    def broadcast_(self, tensor: Tensor, what: str = "") -> Tensor:
        """Overwrite `tensor` with that of member 0, in place."""
        if self.size > 1:
            with self._blocking("broadcast", tensor, what):
                c10d.broadcast(tensor, group=self.handle, group_src=0)
        return tensor

    def barrier(self, what: str = "") -> None:
        """Wait until every member has come here."""
        if self.size > 1:
            with self._blocking("barrier", None, what):
                c10d.barrier(group=self.handle)

    def _start(
        self, kind: Kind, tensor: Tensor | None, what: str = "", *, others_bytes: int | None = None
    ) -> Call | None:
        if self.meter is None:
            return None
        size = _bytes(tensor) if tensor is not None else 0
        return self.meter.start(kind, size, self.size, others_bytes=others_bytes, what=what, group=self.name)

    def _blocking(
        self, kind: Kind, tensor: Tensor | None, what: str = "", *, others_bytes: int | None = None
    ) -> AbstractContextManager[None]:
        """Around a collective that returns when it is over."""
        call = self._start(kind, tensor, what, others_bytes=others_bytes)
        return nullcontext() if self.meter is None or call is None else self.meter.waiting(call)


@final
@dataclass(frozen=True)
class Work:
    """A collective under way."""

    handle: c10d.Work | None
    messages: Sequence[Message] = ()
    meter: Meter | None = None
    call: Call | None = None

    def wait(self) -> None:
        """Block until the result is there (on an accelerator: until the stream is ordered after it)."""
        if self.meter is None or self.call is None:
            self._wait()
            return
        with self.meter.waiting(self.call):
            self._wait()

    def _wait(self) -> None:
        if self.handle is not None:
            self.handle.wait()
        for message in self.messages:
            message.sum_()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
