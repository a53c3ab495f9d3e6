"""What a person sees while tasks run: how many run, wait (and for what), are done and failed. Goes to stderr."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from shardwise.run.progress import LINE_SECONDS, tell
from shardwise.units import format_seconds

if TYPE_CHECKING:
    from rich.live import Live

    from shardwise.tasks.task import Ending

_REDRAW_SECONDS = 0.25


@final
@dataclass
class Counts:
    """How far the tasks are.

    Attributes:
        total: of all tasks, None where unknown.
        waiting: what ready tasks wait for -> how many.
    """

    total: int | None = None
    running: int = 0
    waiting: dict[str, int] = field(default_factory=dict)
    done: int = 0
    failed: int = 0
    skipped: int = 0
    restored: int = 0
    began: float = field(default_factory=time.monotonic)

    def note(self, ending: Ending, *, restored: bool = False) -> None:
        if ending.state == "done":
            self.done += 1
            self.restored += restored
        elif ending.state == "failed":
            self.failed += 1

    def line(self) -> str:
        """One line: `12 of 40 done (3 from the store), 2 running, 26 waiting (26 for cores), 1 failed, 1 min left`."""
        of_all = f" of {self.total:,}" if self.total is not None else ""
        parts = [f"{self.done:,}{of_all} done" + (f" ({self.restored:,} from the store)" if self.restored else "")]
        parts.append(f"{self.running:,} running")
        waiting = sum(self.waiting.values())
        if waiting:
            why = ", ".join(f"{count:,} for {what}" for what, count in sorted(self.waiting.items()))
            parts.append(f"{waiting:,} waiting ({why})")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.skipped:
            parts.append(f"{self.skipped:,} skipped")
        now_done = self.done + self.failed - self.restored
        if self.total is not None and now_done:
            left = self.total - self.done - self.failed - self.skipped
            seconds = (time.monotonic() - self.began) / now_done * left
            parts.append(
                f"about {format_seconds(seconds)} left" if left else format_seconds(time.monotonic() - self.began)
            )
        return ", ".join(parts)


class Meter(ABC):
    """Shows counts."""

    @property
    @abstractmethod
    def patience(self) -> float | None:
        """Seconds after which it wants to be updated; None for never."""

    @abstractmethod
    def update(self, counts: Counts) -> None:
        """These are the counts now."""

    @abstractmethod
    def close(self, counts: Counts) -> None:
        """These are the last ones."""


@final
class Silent(Meter):
    """Shows nothing."""

    patience = None

    def update(self, counts: Counts) -> None:
        """Nothing."""

    def close(self, counts: Counts) -> None:
        """Nothing."""


@final
class Lines(Meter):
    """A plain line now and then."""

    patience = LINE_SECONDS

    def __init__(self, name: str) -> None:
        self._name = name
        self._last = time.monotonic()

    def update(self, counts: Counts) -> None:
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            tell(f"{self._name}: {counts.line()}")

    def close(self, counts: Counts) -> None:
        tell(f"{self._name}: {counts.line()}")


@final
class Line(Meter):
    """One line that is drawn anew, on a terminal."""

    patience = _REDRAW_SECONDS

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self._name = name
        self._last = 0.0
        self._live: Live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)
        self._live.start()

    def update(self, counts: Counts) -> None:
        if time.monotonic() - self._last >= _REDRAW_SECONDS:
            self._last = time.monotonic()
            self._live.update(f"{self._name}: {counts.line()}", refresh=True)

    def close(self, counts: Counts) -> None:
        self._live.stop()
        tell(f"{self._name}: {counts.line()}")


def make_meter(*, show: bool, name: str) -> Meter:
    """One line redrawn where stderr is a terminal, plain lines elsewhere, nothing with `show=False`."""
    import os

    if not show:
        return Silent()
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown"):
        return Line(name)
    return Lines(name)
