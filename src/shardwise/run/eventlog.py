"""EventLog: appends events to `events.jsonl` and never disturbs the training."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import TracebackType
from typing import final

from shardwise.spec.events import Event

_log = logging.getLogger("shardwise")


@final
class EventLog:
    """Writer of one `events.jsonl`; one process writes, any number may read meanwhile.

    Every event is one `write` of a whole line to a file opened for appending, so that readers and a second writer
    never see lines mixed, and a killed run loses at most the line it was writing. A failing write (a full disk, a
    folder that went away) drops the event, counts it in `dropped`, and is told once in the log; it never raises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped = 0
        self._told = False
        self._torn = False
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._descriptor).st_size
            # A line torn by a kill gets its line end now, so that it does not swallow the next event.
            self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError as error:
            self._tell(error)

    def write(self, event: Event) -> None:
        """Append one event."""
        if self._descriptor is None:
            self.dropped += 1
            return
        try:
            line = (("\n" if self._torn else "") + event.to_line() + "\n").encode("utf-8", "backslashreplace")
            written = os.write(self._descriptor, line)
        except (OSError, ValueError, TypeError) as error:
            self.dropped += 1
            self._tell(error)
            return
        self._torn = written < len(line)
        if self._torn:  # a disk that fills up takes a part of the line
            self.dropped += 1
            self._tell(OSError(f"only {written} of {len(line)} bytes were taken"))

    def close(self) -> None:
        """Close the file; later events are dropped."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            _log.warning(
                "events are being lost: cannot write %s (%s); the training goes on without them", self.path, error
            )
