"""What a worker is doing right now, in memory that its scheduler sees: it outlives the worker, however that ends."""

from __future__ import annotations

import mmap
import os
import struct
from typing import final

_FORM = struct.Struct("=qd")
IDLE = -1
SIZE = 4096


@final
class Slot:
    """Number of the running task and the monotonic second at which it began; one process writes, another reads."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, SIZE)

    def begin(self, number: int, second: float) -> None:
        _FORM.pack_into(self._map, 0, number, second)

    def rest(self) -> None:
        _FORM.pack_into(self._map, 0, IDLE, 0.0)

    def read(self) -> tuple[int, float] | None:
        """(task number, monotonic second); None between tasks."""
        number, second = _FORM.unpack_from(self._map, 0)
        return None if number == IDLE else (number, second)

    def close(self) -> None:
        self._map.close()


def new_slot_file() -> int:
    """Descriptor of the memory of one slot."""
    fd = os.memfd_create("shardwise-slot")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, _FORM.pack(IDLE, 0.0), 0)
    return fd
