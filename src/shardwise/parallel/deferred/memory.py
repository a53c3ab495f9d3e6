"""Memory for as long as weights are made in parts: what is let go goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of glibc's malloc.h."""

_MOST = 32 << 20
"""Bytes up to which glibc raises its threshold by itself as large blocks are freed (mallopt(3), 64 bits); it trims at twice."""


def fresh_storage(size_bytes: int) -> torch.UntypedStorage:
    """Zeros, straight from the system, and back there as soon as nobody uses them."""
    if not size_bytes:
        return torch.UntypedStorage(0)
    return torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8).untyped_storage()


@contextmanager
def garbage_found_soon() -> Iterator[Callable[[], object]]:
    """Gives a function that collects the garbage which was made in the block, and looks at nothing older.

    FSDP2 leaves the whole parameters that it has split in cycles of references, where they wait for the collector.
    """
    gc.freeze()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()


@contextmanager
def memory_given_back(block_bytes: int) -> Iterator[None]:
    """New blocks of at least `block_bytes`, of torch's own as well, come from the system one by one, and go back when freed.

    glibc keeps freed blocks of up to 32 MiB, and torch asks for aligned ones, for which a freed block of the same size is a
    few bytes too short: making and dropping weights one after the other, a process grows by all of them. Afterwards blocks
    are kept as glibc does in a process that has freed large ones. With other allocators this does nothing.
    """
    mallopt = None
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            library = ctypes.CDLL(None)
            library.gnu_get_libc_version  # noqa: B018  # raises where it is another C library
            mallopt = library.mallopt
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, block_bytes)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _MOST)
        mallopt(_TRIM_THRESHOLD, 2 * _MOST)
