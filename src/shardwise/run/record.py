"""What every rank of a measured run keeps about its steps: where their time went, what they sent, when they waited.

The seconds of a phase are divided into *busy* ones, in which this rank did something, and those in which it stood still
for other ranks (see `shardwise.dist.meter`). A collective makes the slow rank's delay everybody's, so wall seconds of
phases look alike on all ranks; busy seconds do not.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time, time
from typing import Any, final

from shardwise.dist.meter import Meter
from shardwise.run.folder import RunFolder, write_aside

_SAMPLE_SECONDS = 0.25
"""How often the system is asked how long this process stood in line for a core: seldom enough to cost nothing."""


@final
@dataclass(frozen=True)
class Recording:
    """What to keep beside the seconds of every step.

    Attributes:
        first, last: global numbers of the steps of which every phase and message is kept; the first of a run is 0.
        all_steps: keep the seconds of all other steps too.
    """

    first: int
    last: int
    all_steps: bool = True


@final
@dataclass
class Recorder:
    """The record of one rank. `PhaseClock` and `Meter` tell it what happens."""

    recording: Recording
    rank: int
    meter: Meter
    rows: list[dict[str, Any]] = field(default_factory=list)
    _row: dict[str, Any] = field(default_factory=dict)
    _spans: list[tuple[str, float, float]] | None = None
    _waited: dict[str, float] = field(default_factory=dict)
    _sent: tuple[float, int, int] = (0.0, 0, 0)
    _machine: list[tuple[float, float, float, float]] = field(default_factory=list)
    _away: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def begin_step(self, now: float, step: int) -> None:
        """A step may begin: at the end of an epoch it turns out that there was none."""
        meter = self.meter
        keep = self.recording.first <= step <= self.recording.last
        meter.begin_step(keep=keep)
        self._spans = [] if keep else None
        self._row = {"step": step, "began": now, "busy": {}, "waited": {}}
        self._waited = dict(meter.waited_seconds)
        self._sent = (meter.traffic_bytes, meter.payload_bytes, meter.calls)
        if self.recording.all_steps and (not self._machine or now - self._machine[-1][0] >= _SAMPLE_SECONDS):
            self._sample(now)

    def away(self, seconds: float, cpu_seconds: float, core_wait_seconds: float) -> None:
        """Something that is no step took these: they are left out of what the machine is asked for."""
        one, two, three = self._away
        self._away = (one + seconds, two + cpu_seconds, three + core_wait_seconds)

    def _sample(self, now: float) -> None:
        """When, and without what was away: seconds, processor seconds, seconds without a core."""
        seconds, cpu, core_wait = self._away
        self._machine.append((now, now - seconds, process_time() - cpu, waiting_for_core_seconds() - core_wait))

    def phase(self, name: str, began: float, ended: float) -> None:
        """A phase ended, or a piece of it."""
        if not self._row:
            return
        waited = {kind: seconds - self._waited[kind] for kind, seconds in self.meter.waited_seconds.items()}
        self._waited = dict(self.meter.waited_seconds)
        for kind, seconds in waited.items():
            self._row["waited"][kind] = self._row["waited"].get(kind, 0.0) + seconds
        busy = max(0.0, ended - began - sum(waited.values()))
        self._row["busy"][name] = self._row["busy"].get(name, 0.0) + busy
        if self._spans is not None:
            self._spans.append((name, began, ended))

    def end_step(self, now: float) -> None:
        """The step is over."""
        if not self._row:
            return
        meter, row = self.meter, self._row
        row["ended"] = now
        row["arrived"] = meter.first_arrival
        row["traffic_bytes"] = meter.traffic_bytes - self._sent[0]
        row["payload_bytes"] = meter.payload_bytes - self._sent[1]
        row["calls"] = meter.calls - self._sent[2]
        if self._spans is not None:
            row["spans"] = self._spans
            row["flights"] = [(each.kind, each.began, each.waited, each.ended) for each in meter.flights or ()]
            row["whats"] = [each.what for each in meter.flights or ()]
        if self.recording.all_steps or self._spans is not None:
            self.rows.append(row)
        self._row = {}

    def write(self, folder: RunFolder, *, peak_memory_bytes: int) -> None:
        """Keep it with the run, where `record_path` says.

        Args:
            peak_memory_bytes: most memory this rank held.
        """
        self._sample(perf_counter())
        record = {
            "version": 2,
            "rank": self.rank,
            "pid": os.getpid(),
            "clock": {"unix": time(), "perf_counter": perf_counter()},
            "peak_memory_bytes": peak_memory_bytes,
            "steps": self.rows,
            "machine": self._machine,
        }
        path = record_path(folder, self.rank)
        path.parent.mkdir(exist_ok=True)
        write_aside(path, json.dumps(record, separators=(",", ":")).encode() + b"\n")


def record_path(folder: RunFolder, rank: int) -> Path:
    """Where a rank's record is."""
    return folder.path / "records" / f"rank-{rank:05d}.json"


def waiting_for_core_seconds() -> float:
    """Seconds that this process's first thread was ready to run and had no core (Linux); nan where nobody counts them.

    The first thread takes the steps; helper threads that wait in line while it waits for them would count twice. It is the
    second number of /proc/self/schedstat, in nanoseconds (Linux, Documentation/scheduler/sched-stats.rst).
    """
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return float("nan")
