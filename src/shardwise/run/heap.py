"""Keep the memory that a step frees for the next step, instead of giving it back to the system in between.

glibc hands freed memory back when there is enough of it, and large tensors come from the system one by one. The next step asks
for the same again, and the system clears every page anew. Which sizes suffer depends on what was allocated before; an LSTM
with a batch of 32 took 6.4 ms a step or 3.5 ms, with the same operations (docs/notes.md).
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BYTES = 512 * 2**20
"""Freed memory at the end of the heap that is kept. What a step needed at once stays with the process, and no more than that."""

OWN_BYTES = 32 * 2**20
"""Tensors from this size on come from the system and go back to it: the most that glibc allows here."""


@cache
def keep_freed_memory() -> bool:
    """Ask this process's allocator to do so, once; False where it is not glibc's."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, OWN_BYTES))
