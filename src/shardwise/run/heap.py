"""How long this process keeps the memory that it frees, where glibc is its allocator; elsewhere nothing here does anything.

A step wants it kept: glibc hands freed memory back when there is enough of it, and large tensors come from the system one by
one. The next step asks for the same again, and the system clears every page anew. Which sizes suffer depends on what was
allocated before; an LSTM with a batch of 32 took 6.4 ms a step or 3.5 ms, with the same operations. A convolutional network
took 740 ms a step on a forked worker, and takes 400 with all that is done here (docs/notes.md, `benchmarks/heaps.py`).

Making weights in parts wants it given back: a process that makes and drops them one after the other must not grow by all.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from shardwise.run.available import available_memory
from shardwise.run.groups import PROC

# malloc.h of glibc; a threshold of -1 is the largest there is: nothing is handed back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_NEVER, _MOST_MAPPED = -1, 65536  # the second is glibc's own M_MMAP_MAX
_MADV_HUGEPAGE = 14  # asm-generic/mman-common.h of Linux
_HUGE_PAGE = 2 * 2**20

OWN_BYTES = 32 * 2**20
"""Tensors from this size on that do not fit into the heap come from the system and go back to it: the most that glibc allows
here, and what it raises its threshold to by itself as large blocks are freed (mallopt(3), 64 bits); it trims at twice."""

HEAP_SHARE = 0.5
"""How much of the memory that is left now may become heap before large tensors come from the system again. Blocks of many sizes
leave gaps in a heap: a network with tensors of 64 MiB took a quarter more memory, for a fifth less time a step."""


def keep_freed_memory() -> bool:
    """Ask this process's allocator to do so; False where it is not glibc's.

    Room is made in the heap, in huge pages where the system has them to offer; it takes no memory until it is used.
    """
    library = _library()
    if library is None:
        return False
    room = room_bytes(max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)))
    if room:
        _make_room(library, room)
    return bool(library.mallopt(_M_TRIM_THRESHOLD, _NEVER)) and bool(library.mallopt(_M_MMAP_THRESHOLD, OWN_BYTES))


def room_bytes(processes: int, proc: Path = PROC) -> int:
    """How much address space to take for the heap of each of `processes` processes of this machine.

    None where it counts as used: where the process has a limit (`ulimit -v`, `ulimit -d`), for mapped files, threads and
    libraries must fit in as well, and where the system promises no more than it has (overcommit_memory 2), which counts it
    once more for every process that is forked from this one.
    """
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return 0
    with suppress(OSError):
        if (proc / "sys" / "vm" / "overcommit_memory").read_text(encoding="ascii").strip() == "2":
            return 0
    return int(HEAP_SHARE * available_memory(proc) / processes)


def give_freed_memory_back() -> None:
    """The opposite, at once and for what is freed from now on."""
    library = _library()
    if library is not None:
        library.mallopt(_M_TRIM_THRESHOLD, 2 * OWN_BYTES)
        library.malloc_trim(0)


def use_one_heap(environment: Mapping[str, str] = os.environ) -> bool:
    """Let threads that have not allocated anything share the heap of the main thread; False where they may not.

    glibc gives every thread a heap of its own, of parts of 64 MiB, which go back to the system as soon as they are empty,
    whatever was asked to be kept. A worker that is forked from a thread inherits the heap of that thread. Who sets the number
    of heaps in the environment keeps it.
    """
    library = _library()
    if library is None or "MALLOC_ARENA_MAX" in environment or "arena_max" in environment.get("GLIBC_TUNABLES", ""):
        return False
    return bool(library.mallopt(_M_ARENA_MAX, 1))


@contextmanager
def memory_given_back(block_bytes: int) -> Iterator[None]:
    """New blocks of at least `block_bytes`, of torch's own as well, come from the system one by one, and go back when freed.

    glibc keeps freed blocks of up to 32 MiB, and torch asks for aligned ones, for which a freed block of the same size is a
    few bytes too short. Afterwards blocks are kept as glibc does in a process that has freed large ones.
    """
    library = _library()
    if library is None:
        yield
        return
    library.malloc_trim(0)  # what room there is would be taken first
    library.mallopt(_M_MMAP_THRESHOLD, block_bytes)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, OWN_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * OWN_BYTES)


def _make_room(library: ctypes.CDLL, size: int) -> None:
    """Let the heap grow by `size` bytes; a system that refuses them leaves it as it is."""
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    library.mallopt(_M_MMAP_MAX, 0)
    block = library.malloc(size)
    if block:
        begin = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        whole = (block + size - begin) // _HUGE_PAGE * _HUGE_PAGE
        if whole > 0:
            library.madvise(begin, whole, _MADV_HUGEPAGE)  # fails on kernels without huge pages, which may be
        library.free(block)
    library.mallopt(_M_MMAP_MAX, _MOST_MAPPED)


@cache
def _library() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # raises where it is another C library
        library.malloc.restype = ctypes.c_void_p
        library.malloc.argtypes = [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        library.malloc_trim.argtypes = [ctypes.c_size_t]
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return library
