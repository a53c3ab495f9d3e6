"""Alone: one thread at a time, and the other is told instead of breaking the accounts of the first."""

from __future__ import annotations

import threading
from typing import final

from shardwise.errors import UserError


@final
class Alone:
    """A block that one thread may be in, again within itself too; another one is refused and does not wait."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UserError(
                "another thread is using this pool: give each thread a Pool of its own, or let one thread go over all maps and "
                "graphs"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()
