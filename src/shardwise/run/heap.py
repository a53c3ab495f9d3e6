"""How long this process keeps the memory that it frees, where glibc is its allocator; elsewhere nothing here does anything.

A step wants it kept: glibc hands freed memory back when there is enough of it, and large tensors come from the system one by
one. The next step asks for the same again, and the system clears every page anew. Which sizes suffer depends on what was
allocated before; an LSTM with a batch of 32 took 6.4 ms a step or 3.5 ms, with the same operations (docs/notes.md).

Making weights in parts wants it given back: a process that makes and drops them one after the other must not grow by all.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BYTES = 512 * 2**20
"""Freed memory at the end of the heap that is kept. What a step needed at once stays with the process, and no more than that."""

OWN_BYTES = 32 * 2**20
"""Tensors from this size on come from the system and go back to it: the most that glibc allows here, and what it raises its
threshold to by itself as large blocks are freed (mallopt(3), 64 bits); it trims at twice."""


def keep_freed_memory() -> bool:
    """Ask this process's allocator to do so; False where it is not glibc's."""
    mallopt = _mallopt()
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, OWN_BYTES))


@contextmanager
def memory_given_back(block_bytes: int) -> Iterator[None]:
    """New blocks of at least `block_bytes`, of torch's own as well, come from the system one by one, and go back when freed.

    glibc keeps freed blocks of up to 32 MiB, and torch asks for aligned ones, for which a freed block of the same size is a
    few bytes too short. Afterwards blocks are kept as glibc does in a process that has freed large ones.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, block_bytes)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, OWN_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * OWN_BYTES)


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # raises where it is another C library
        found: Callable[[int, int], int] = library.mallopt
    except (OSError, AttributeError):
        return None
    return found
