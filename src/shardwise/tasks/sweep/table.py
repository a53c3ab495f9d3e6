"""What a person sees of a sweep while it runs: each trial as it ends, the best so far, and how much is left."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, final

from shardwise.run.progress import LINE_SECONDS, tell
from shardwise.tasks.progress import Counts, Meter
from shardwise.tasks.sweep.log import BEAT_SECONDS, SweepLog, left_seconds
from shardwise.tasks.sweep.space import brief
from shardwise.units import format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

SHOWN = 8
"""Trials of the live table."""

_REDRAW_SECONDS = 0.25


@final
class Board(Meter):
    """A live table on a terminal, a line for each trial elsewhere, nothing with `show=False`."""

    def __init__(self, *, show: bool, live: bool, metric: str, maximize: bool, trials: int, log: SweepLog) -> None:
        self._log = log
        self._show, self._metric, self._maximize, self._trials = show, metric, maximize, trials
        self._best: list[tuple[float, int, str]] = []
        self._ended = 0
        self._began = time.monotonic()
        self._last = 0.0
        self._live: Live | None = None
        if live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)
            self._live.start()

    @property
    def patience(self) -> float | None:
        if not self._show:
            return BEAT_SECONDS
        return _REDRAW_SECONDS if self._live is not None else LINE_SECONDS

    def say(self, text: str) -> None:
        if not self._show:
            return
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            tell(text)

    def trial(
        self,
        *,
        number: int,
        text: str,
        value: float | None,
        spread: float | None,
        after: str,
        failure: str | None,
        ended: bool,
    ) -> None:
        """A trial came to the end of its training, or of a part of it."""
        self._ended += ended or failure is not None
        place = f" after {after}" if after else ""
        if value is None:
            self.say(f"trial {number}  {text}{place}  failed: {brief(failure or 'its metric is no number')}")
            return
        line = f"{text}{place}"
        shown = f"{self._metric} {value:.4f}" + (f" +- {spread:.4f}" if spread is not None else "")
        self._best = [item for item in self._best if item[1] != number]
        self._best.append((value, number, f"{shown}  {line}"))
        self._best.sort(key=lambda item: (-item[0] if self._maximize else item[0], item[1]))
        leads = self._best[0][1] == number
        self.say(f"trial {number}  {line}  {shown}{'  (best so far)' if leads else ''}")

    def update(self, counts: Counts) -> None:
        self._log.beat(counts.running)
        now = time.monotonic()
        if not self._show or now - self._last < (self.patience or 0.0):
            return
        self._last = now
        if self._live is not None:
            self._live.update(self._table(counts), refresh=True)
        elif counts.running:
            tell(f"  {self._progress(counts)}")

    def close(self, counts: Counts) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _progress(self, counts: Counts) -> str:
        seconds = left_seconds(self._began, self._ended, self._trials)
        left = f", about {format_seconds(seconds)} left" if seconds is not None else ""
        waiting = sum(counts.waiting.values())
        why = ", ".join(f"{count} for {what}" for what, count in sorted(counts.waiting.items()))
        return (
            f"{self._ended} of {self._trials} combinations trained to the end, {counts.running} trainings running"
            + (f", {waiting} waiting ({why})" if waiting else "")
            + (f", {counts.failed} failed" if counts.failed else "")
            + left
        )

    def _table(self, counts: Counts) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        lines = [f"{'best' if not place else '    '}  trial {number}  {text}" for place, (_, number, text) in
                 enumerate(self._best[:SHOWN])]  # fmt: skip
        return Group(*(Text(line) for line in [*lines, self._progress(counts)]))


def make_board(*, show: bool, metric: str, maximize: bool, trials: int, log: SweepLog) -> Board:
    """A live table where stderr is a terminal that can move its cursor."""
    import os

    live = show and sys.stderr.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown")
    return Board(show=show, live=live, metric=metric, maximize=maximize, trials=trials, log=log)
