"""A trace of some steps: every phase and every communication of all ranks on one clock, for Perfetto or Chrome.

Format: the Trace Event Format of Chromium (complete events `X` and metadata `M`; times in microseconds), which
https://ui.perfetto.dev and chrome://tracing open.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, final

from shardwise.dist.collectives import Group
from shardwise.errors import UserError
from shardwise.run.folder import RunFolder, write_aside
from shardwise.run.record import Recorder, Recording
from shardwise.spec.event import Event
from shardwise.spec.observations import TraceEvent

_LANES = {"step": 0, "phase": 1, "communication": 2}


def parse_trace(text: str) -> Recording:
    """`"100:105"` is the steps 100 to 104, as in Python; the first step of a run is 0.

    Raises:
        UserError: it is something else, or no step.
    """
    first, colon, stop = text.partition(":")
    if not colon or not first.strip().isdecimal() or not stop.strip().isdecimal() or int(first) >= int(stop):
        raise UserError(f"--trace {text!r}: write FIRST:STOP, such as 100:105 for the steps 100 to 104")
    return Recording(int(first), int(stop) - 1, all_steps=False)


@final
class Tracer:
    """Writes the trace once its last step is over, or the run.

    Args:
        recorder: of this rank, which keeps the chosen steps.
        folder: of the run.
        tell: writes an event, on rank 0.
    """

    def __init__(self, recorder: Recorder, folder: RunFolder, tell: Callable[[Event], None]) -> None:
        self._recorder, self._folder, self._tell = recorder, folder, tell
        self._written = False

    def settled(self, world: Group, step: int, offset_seconds: float, *, ended: bool = False) -> None:
        """Some steps were settled. All ranks call it alike, with the same number of steps done.

        Args:
            world: all ranks.
            step: steps done; the last one may not be recorded yet.
            offset_seconds: how far this rank's clock is ahead of the others'.
            ended: there will be no more steps.
        """
        if self._written or not (ended or step > self._recorder.recording.last + 1):
            return
        self._written = True
        parts = world.gather_objects((self._recorder.rows, offset_seconds), "the trace")
        self._recorder.rows = []
        if world.rank == 0 and any(rows for rows, _ in parts):
            steps = sorted({int(row["step"]) for rows, _ in parts for row in rows})
            name = f"traces/steps-{steps[0]}-{steps[-1]}.json"
            with suppress(OSError):  # a full disk does not end a training
                (self._folder.path / "traces").mkdir(exist_ok=True)
                write_aside(self._folder.path / name, json.dumps(chrome_trace(parts)).encode())
                self._tell(TraceEvent(first_step=steps[0], steps=len(steps), path=name))


def chrome_trace(parts: list[tuple[list[dict[str, Any]], float]]) -> dict[str, Any]:
    """The trace of all ranks: a process a rank, with a lane for steps, one for phases and one for communication.

    Args:
        parts: of each rank, its records and how far its clock is ahead.
    """
    events: list[dict[str, Any]] = []
    for rank, (rows, offset) in enumerate(parts):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
        events += [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": lane, "args": {"name": name}}
            for name, lane in _LANES.items()
        ]

        for row in rows:
            events.append(
                _span(rank, "step", f"step {row['step']}", row["began"] - offset, row["ended"] - row["began"])
            )
            events[-1]["args"] = {"sent_bytes": row["traffic_bytes"]}
            for name, began, ended in row.get("spans", ()):
                events.append(_span(rank, "phase", name, began - offset, ended - began))
            for (kind, began, waited, ended), what in zip(row.get("flights", ()), row.get("whats", ()), strict=True):
                events.append(_span(rank, "communication", kind, began - offset, ended - began))
                events[-1]["args"] = {"what": what, "waited_us": round(1e6 * (ended - waited), 1)}
    zero = min(event["ts"] for event in events if event["ph"] == "X")
    for event in events:
        if event["ph"] == "X":
            event["ts"] = round(event["ts"] - zero, 1)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _span(rank: int, lane: str, name: str, began: float, seconds: float) -> dict[str, Any]:
    place = {"ph": "X", "name": name, "cat": lane, "pid": rank, "tid": _LANES[lane]}
    return {**place, "ts": round(1e6 * began, 1), "dur": round(1e6 * max(0.0, seconds), 1)}
