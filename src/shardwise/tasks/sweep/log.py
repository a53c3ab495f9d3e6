"""The events of a sweep itself, beside those of its trainings: what `shardwise watch` shows of it."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

from shardwise.run.eventlog import EventLog
from shardwise.spec.events import FailureEvent, RunEvent, SummaryEvent
from shardwise.spec.observations import SweepEvent

BEAT_SECONDS = 10.0
"""So often there is an event at least, so that a sweep that was killed can be told from one with long trainings."""


def left_seconds(began: float, ended: int, trials: int) -> float | None:
    """Until the last trial has ended, if the rest goes as fast as those so far; `began` is of the monotonic clock."""
    if not ended or ended >= trials:
        return None
    return (time.monotonic() - began) / ended * (trials - ended)


@final
class SweepLog:
    """Writes `events.jsonl` of the sweep's folder. Used as a context: an exception ends it with a failure."""

    def __init__(self, folder: Path, *, metric: str, maximize: bool, trials: int) -> None:
        self._log = EventLog(folder / "events.jsonl")
        self._metric, self._maximize, self._trials = metric, maximize, trials
        self._began = time.monotonic()
        self._last = 0.0
        self._ended = self._failed = self._running = 0
        self._values: dict[int, tuple[float, dict[str, str]]] = {}

    def begin(
        self, name: str, *, settings: Mapping[str, Any], plan: str, threads: int, device: str, cores: int
    ) -> None:
        """The sweep starts, or goes on."""
        event = RunEvent(
            name=name,
            settings={key: {"value": value, "source": "sweep"} for key, value in settings.items()},
            plan={"layout": plan, "threads": threads},
            versions={"python": platform.python_version()},
            host=socket.gethostname(),
            ranks=cores,
            device=device,
            cores=cores,
        )
        self._log.write(event)
        self._write()

    def came(
        self,
        number: int,
        setting: Mapping[str, str],
        *,
        value: float | None,
        trained: int,
        state: str,
        failure: str = "",
    ) -> None:
        """A trial came to the end of its training, or of a part of it, or failed."""
        self._ended += state != "paused"
        self._failed += state == "failed"
        if value is not None:
            self._values[number] = (value, dict(setting))
        self._write(number=number, setting=dict(setting), value=value, trained=trained, state=state, failure=failure)

    def beat(self, running: int) -> None:
        """So many trainings run; an event now and then."""
        self._running = running
        if time.monotonic() - self._last >= BEAT_SECONDS:
            self._write()

    def end(self, summary: dict[str, Any]) -> None:
        """The sweep ended."""
        if summary["failed"] == summary["combinations"]:
            self._log.write(FailureEvent(message="every trial failed"))
        else:
            self._log.write(SummaryEvent(summary={**summary, "trials": summary["trials"][:1]}))

    def __enter__(self) -> SweepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            message = str(value).strip().splitlines()[0] if str(value).strip() else ""
            self._log.write(FailureEvent(message=f"{kind.__name__}: {message}" if message else kind.__name__))
        self._log.close()

    def _write(self, **what: Any) -> None:
        self._last = time.monotonic()
        best = min(self._values, key=self._place, default=None)
        value, setting = self._values[best] if best is not None else (None, {})
        self._log.write(
            SweepEvent(
                metric=self._metric,
                goal="max" if self._maximize else "min",
                trials=self._trials,
                ended=self._ended,
                failed=self._failed,
                running=self._running,
                best=best,
                best_value=value,
                best_setting=setting,
                left_seconds=left_seconds(self._began, self._ended, self._trials),
                **what,
            )
        )

    def _place(self, number: int) -> tuple[float, int]:
        value = self._values[number][0]
        return (-value if self._maximize else value), number
