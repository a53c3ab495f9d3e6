"""Memory for as long as weights are made in parts: what is let go goes back to the system."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


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
