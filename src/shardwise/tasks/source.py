"""live: an input that makes us wait, read by a thread of its own, so that tasks and results go on meanwhile."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

from shardwise.errors import UserError


@final
class Live:
    """Items of a source, read no further ahead than is asked for. Made by `live`; one `map` goes over it, once."""

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = iter(source)
        self._changed = threading.Condition()
        self._there: deque[Any] = deque()
        self._wanted = 0
        self._claimed = self._told = self._ended = self._closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._heard: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Any]:
        """The source itself, for the one that goes over it.

        Raises:
            UserError: another one does.
        """
        if self._claimed:
            raise UserError("this live source has been given to a map already: make another with tasks.live(source)")
        self._claimed = True
        return self._source

    def take(self, most: int, heard: Callable[[], None]) -> list[Any]:
        """At most so many items, of those that are there; `heard` is called in the thread when there is more."""
        with self._changed:
            taken = [self._there.popleft() for _ in range(min(max(0, most), len(self._there)))]
            self._wanted, self._heard, self._told = most - len(taken), heard, False
            if self._thread is None:
                # A daemon: one that waits in the source for ever must not hold up the end of the program.
                self._thread = threading.Thread(target=self._read, name="live source", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return taken

    @property
    def ended(self) -> bool:
        """Whether all that will ever come has been taken."""
        with self._changed:
            return self._ended and not self._there

    @property
    def error(self) -> BaseException | None:
        """What the source raised."""
        return self._error

    def wait(self, timeout_seconds: float | None) -> None:
        """Until something is there or it has ended, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._there or self._ended or self._wanted <= 0, timeout_seconds)

    def close(self) -> None:
        """Ask for nothing more. The thread ends when the source gives its next item."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._there) < self._wanted)
                if self._closed:
                    return
            try:
                item = next(self._source)
            except StopIteration:
                self._end(None)
                return
            except BaseException as error:  # noqa: BLE001  # the user's own code; raised where the results are read
                self._end(error)
                return
            with self._changed:
                self._there.append(item)
                told, self._told = self._told, True
                self._changed.notify_all()
            if not told:  # once for each `take`, which takes all there is
                self._heard()

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()
        self._heard()


def live(source: Iterable[Any]) -> Live:
    """A source that waits for its items, such as a connection or a queue, for `map` to read in a thread of its own.

    Each task starts as soon as its item is there, and each result is given as soon as it is there, whatever the source
    waits for; it may wait for results of its own earlier items. The source runs in another thread, so it must neither use
    the pool itself nor what is bound to a thread, such as a connection to SQLite.
    """
    return Live(source)
