"""Sums and gathers between processes of one machine through shared memory.

gloo moves every message through sockets and helper threads, which compete with the computation for the same cores: the
sum of LeNet's 248 KB of gradients costs milliseconds inside a busy step. Here every rank copies its tensor into its own
stretch of shared memory, raises a counter, and adds up what the others have put there, in rank order, so that all ranks
get the same bits.

Memory takes anything from anybody. So each message begins with its number and a checksum of what it is, and ranks that
come to different ones (a layer that is left out on one of them) end instead of adding up what does not belong together.

The memory is a ring per rank. A message takes the next stretch of it; a stretch is used again once every rank has said
that it is done with the message that was there. Counters are aligned 64-bit words, one cache line each, written by one
rank only. A reader must not see a counter before the data it announces: x86 processors keep the order of stores, others
need not, so elsewhere this is not used.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwise.errors import RunFailed

LINE = 64
"""Bytes of a cache line."""

PIECE_BYTES = 4 * 1024**2
"""Largest message; larger tensors go in pieces. Small enough to stay in a processor's cache between write and read."""

RING_BYTES = 2 * (PIECE_BYTES + LINE)
"""Room of one rank: a message can be written while the others still read the one before."""

ORDERED_MACHINES = ("x86_64", "AMD64")
"""Processors that keep the order of stores."""

_SPINS = 100
_YIELD_SECONDS = 2e-3
_NAP_SECONDS = 5e-5
_LOOK_SECONDS = 0.5


@final
class Message:
    """A piece of a tensor that this rank has put into shared memory; every rank puts the same pieces in one order."""

    def __init__(self, exchange: Exchange, number: int, start: int, flat: Tensor, what: str) -> None:
        self.number, self.start, self.stop = number, start, start + LINE + flat.numel() * flat.element_size()
        self._exchange, self._what = exchange, what
        self._flat: Tensor | None = flat  # None when it is complete: the ring need not keep the tensor alive

    def sum_(self) -> None:
        """Wait for all ranks and replace the piece by the sum of theirs; nothing if that was done already."""
        flat, self._flat = self._flat, None
        if flat is None:
            return
        first, *others = self._exchange.read(self.number, self.start, flat, self._what)
        torch.add(first, others[0], out=flat)
        for other in others[1:]:
            flat.add_(other)
        self._exchange.done(self.number)

    def gather_into(self, parts: list[Tensor]) -> None:
        """Wait for all ranks and copy their pieces."""
        assert self._flat is not None
        read = self._exchange.read(self.number, self.start, self._flat, self._what)
        for part, theirs in zip(parts, read, strict=True):
            part.copy_(theirs)
        self._flat = None
        self._exchange.done(self.number)


@final
class Exchange:
    """This rank's end of the shared memory.

    Args:
        memory: made by `create_memory` on one rank and opened by the others.
        rank: of this process.
        processes: their numbers, one a rank.
        timeout_seconds: how long to wait for a rank whose process lives.
    """

    def __init__(self, memory: mmap.mmap, rank: int, processes: Sequence[int], timeout_seconds: float) -> None:
        ranks = len(processes)
        self._rank, self._ranks, self._processes = rank, ranks, list(processes)
        self.timeout_seconds = timeout_seconds
        # Views of the mapping keep it alive; it ends with the process.
        words: NDArray[np.int64] = np.frombuffer(memory, dtype=np.int64, count=2 * ranks * LINE // 8)
        self._arrived = words[: ranks * LINE // 8 : LINE // 8]
        self._finished = words[ranks * LINE // 8 :: LINE // 8]
        data = np.frombuffer(memory, dtype=np.uint8, offset=2 * ranks * LINE)
        self._rings = [torch.from_numpy(data[r * RING_BYTES : (r + 1) * RING_BYTES]) for r in range(ranks)]
        self._heads: NDArray[np.int64] = data.view(np.int64).reshape(ranks, -1)
        self._number = 0
        self._next = 0
        self._in_ring: deque[Message] = deque()
        self._done: set[int] = set()
        self._done_up_to = 0

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor can be sent here."""
        return tensor.device.type == "cpu" and tensor.numel() > 0 and tensor.is_contiguous() and not tensor.is_complex()

    def put(self, tensor: Tensor, what: str = "") -> list[Message]:
        """Publish a tensor in pieces. Waits only for room in the ring, and then for ranks that are behind."""
        pieces = tensor.view(-1).split(PIECE_BYTES // tensor.element_size())
        return [self._put(piece, what) for piece in pieces]

    def gather(self, tensor: Tensor, what: str = "") -> Tensor:
        """Every rank's tensor, stacked along a new first dim."""
        gathered = tensor.new_empty((self._ranks, tensor.numel()))
        size = PIECE_BYTES // tensor.element_size()
        for piece, columns in zip(tensor.view(-1).split(size), gathered.split(size, dim=1), strict=True):
            self._put(piece, what).gather_into(list(columns.unbind(0)))
        return gathered.view(self._ranks, *tensor.shape)

    def read(self, number: int, start: int, like: Tensor, what: str) -> list[Tensor]:
        """Wait until every rank has put its message of that number, and return them, in rank order.

        Raises:
            RunFailed: a rank has put another one.
        """
        self._wait(self._arrived, number)
        own = (number, _checksum(like, what))
        for rank, (theirs, checksum) in enumerate(self._heads[:, start // 8 : start // 8 + 2].tolist()):
            if (theirs, checksum) != own:
                raise RunFailed(
                    f"the workers did not come to the same message: of {self._ranks} that share it, number {self._rank} came to "
                    f"{what or f'one of {like.numel()} numbers'}, and number {rank} to another. They took different branches. "
                    "One worker alone calls the model in training mode, or leaves it in evaluation mode: call model.eval() before "
                    "and model.train() after. Or a layer that needs all workers (BatchNorm, experts) is left out at random, or by "
                    "the values of samples: call it on all workers in every step, and multiply what it returns by 0 or 1"
                )
        return [self._view(rank, start, like) for rank in range(self._ranks)]

    def done(self, number: int) -> None:
        """This rank has read everything of a message. Messages may be finished out of order."""
        self._done.add(number)
        while self._done_up_to + 1 in self._done:
            self._done_up_to += 1
            self._done.remove(self._done_up_to)
        self._finished[self._rank] = self._done_up_to

    def _put(self, flat: Tensor, what: str) -> Message:
        start = self._take(LINE - (-flat.numel() * flat.element_size() // LINE) * LINE)
        self._number += 1
        self._heads[self._rank, start // 8 : start // 8 + 2] = self._number, _checksum(flat, what)
        self._view(self._rank, start, flat).copy_(flat)
        message = Message(self, self._number, start, flat, what)
        self._in_ring.append(message)
        self._arrived[self._rank] = self._number
        return message

    def _view(self, rank: int, start: int, like: Tensor) -> Tensor:
        start += LINE
        return self._rings[rank][start : start + like.numel() * like.element_size()].view(like.dtype)

    def _take(self, size: int) -> int:
        """Where a message of that size goes, once nothing that somebody may still read is there."""
        if self._next + size <= RING_BYTES:
            start = self._next
        else:
            start = 0
            # What is left of the lap before lies behind this end, and is older than all that lies at the beginning.
            while self._in_ring and self._in_ring[0].start >= self._next:
                self._retire_oldest()
        self._next = start + size
        # Messages lie in the ring in order: those in the way are the oldest ones.
        while self._in_ring and self._in_ring[0].start < start + size and self._in_ring[0].stop > start:
            self._retire_oldest()
        return start

    def _retire_oldest(self) -> None:
        """All ranks come here with the same messages, so each first finishes its own reading and then waits for the others."""
        oldest = self._in_ring.popleft()
        oldest.sum_()
        self._wait(self._finished, oldest.number)

    def _wait(self, counters: NDArray[np.int64], number: int) -> None:
        for _ in range(_SPINS):
            if counters.min() >= number:
                return
        began = time.monotonic()
        look = _LOOK_SECONDS
        while counters.min() < number:
            waited = time.monotonic() - began
            if waited < _YIELD_SECONDS:
                os.sched_yield()
            else:
                time.sleep(_NAP_SECONDS)
            if waited > look:
                look = waited + _LOOK_SECONDS
                self._check_peers(counters, number)
            if waited > self.timeout_seconds:
                late = [rank for rank in range(self._ranks) if counters[rank] < number]
                raise RuntimeError(f"timed out after {waited:.0f} s waiting for ranks {late} in shared memory")

    def _check_peers(self, counters: NDArray[np.int64], number: int) -> None:
        """Memory does not tell that a peer has ended, as a socket does."""
        gone = [rank for rank, process in enumerate(self._processes) if has_ended(process)]
        late = [rank for rank in gone if counters[rank] < number]  # looked at after: it may have ended with all it owed
        if late:
            raise RuntimeError(
                f"connection closed by peer: the process of rank {late[0]} has ended, and this rank waits for it in shared memory"
            )


def _checksum(tensor: Tensor, what: str) -> int:
    return zlib.crc32(f"{what} {tensor.dtype} {tensor.numel()}".encode())


def has_ended(process: int) -> bool:
    """Whether a process of this machine is gone, or dead and not yet collected by its parent; field 3 of proc(5) stat."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return text.rpartition(")")[2].split()[:1] in (["Z"], ["X"])


def create_memory(ranks: int) -> tuple[int, mmap.mmap]:
    """Anonymous shared memory that needs no room in /dev/shm and leaves no file behind.

    Returns:
        Its file descriptor, under which other processes of the user find it in /proc, and the mapping.

    Raises:
        OSError: the system has none to give.
    """
    descriptor = os.memfd_create("shardwise")
    os.ftruncate(descriptor, memory_bytes(ranks))
    return descriptor, mmap.mmap(descriptor, memory_bytes(ranks))


def open_memory(place: str, ranks: int) -> mmap.mmap:
    """The same memory in another process; `place` is `/proc/PID/fd/N`.

    Raises:
        OSError: it cannot be seen from here (another machine, container or user).
    """
    with Path(place).open("r+b") as file:
        return mmap.mmap(file.fileno(), memory_bytes(ranks))


def memory_bytes(ranks: int) -> int:
    """Two counters and a ring for each rank."""
    return ranks * (2 * LINE + RING_BYTES)


def machine_identity() -> tuple[str, int] | None:
    """Equal for processes that can share memory here: same boot of the kernel, same process namespace.

    None where shared memory cannot be used: another system than Linux, or a processor that reorders stores.
    """
    if platform.system() != "Linux" or platform.machine() not in ORDERED_MACHINES:
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return None
