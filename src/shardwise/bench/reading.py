"""What one finished run says of itself: its records and events, as numbers of the steady state."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from shardwise.bench.result import PARTS, Bar, Course
from shardwise.errors import RunFailed
from shardwise.run.folder import RunFolder
from shardwise.run.record import record_path
from shardwise.spec.events import EvaluationEvent, StepsEvent, read_events

_COURSE_POINTS = 400
"""Points of a loss curve that are kept: more than a chart has pixels for."""


@final
@dataclass(frozen=True, kw_only=True)
class RankReading:
    """One rank of one run: means over the steady steps, in seconds. See `RankSplit` for the fields.

    Attributes:
        slowest: fraction of the steps in which this rank had the most work of its own.
    """

    seconds: dict[str, float]
    late_seconds: float
    slowest: float
    core_seconds: float
    queue_seconds: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Reading:
    """One run.

    Attributes:
        step_seconds: wall time of the steady steps over their number, on the first rank.
        step_low_seconds, step_high_seconds: the 10th and 90th percentile of single steady steps.
        first_step_at: when the first step began, on `time.perf_counter`.
        metrics: of the last evaluation.
    """

    step_seconds: float
    step_low_seconds: float
    step_high_seconds: float
    steady_steps: int
    first_step_at: float
    ranks: list[RankReading]
    peak_memory_bytes: list[int]
    traffic_bytes: float
    payload_bytes: float
    metrics: dict[str, float]
    timeline: list[Bar]
    course: Course


def read_run(out: Path, *, ranks: int, warm_up: int, device: str) -> Reading:
    """Read the folder of a finished run.

    Args:
        warm_up: first steps that are left out of everything but the losses.

    Raises:
        RunFailed: it holds no records, or too few steps.
    """
    folder = RunFolder.open(out)
    try:
        records = [json.loads(record_path(folder, rank).read_text(encoding="utf-8")) for rank in range(ranks)]
    except OSError as error:
        raise RunFailed(f"the run left no record of its steps ({error.strerror}: {error.filename})") from error
    steps = [record["steps"] for record in records]
    count = min(len(rows) for rows in steps)
    if count < 2:
        raise RunFailed(f"the run took {count} steps: a step time needs at least 2")
    warm_up = min(warm_up, count // 2)
    steady = [rows[warm_up:count] for rows in steps]
    walls = [row["ended"] - row["began"] for row in steady[0]]
    tenths = statistics.quantiles(walls, n=10, method="inclusive") if len(walls) > 1 else [walls[0]] * 9
    own = [[_own_seconds(row, device) for row in rows] for rows in steady]
    events = read_events(folder.events_path)
    return Reading(
        step_seconds=statistics.fmean(walls),
        step_low_seconds=tenths[0],
        step_high_seconds=tenths[-1],
        steady_steps=len(walls),
        first_step_at=min(rows[0]["began"] for rows in steps),
        ranks=[_rank(rank, steady, own, records[rank]["machine"], device) for rank in range(ranks)],
        peak_memory_bytes=[int(record.get("peak_memory_bytes", 0)) for record in records],
        traffic_bytes=max(statistics.fmean(row["traffic_bytes"] for row in rows) for rows in steady),
        payload_bytes=max(statistics.fmean(row["payload_bytes"] for row in rows) for rows in steady),
        metrics=next((dict(event.metrics) for event in reversed(events) if isinstance(event, EvaluationEvent)), {}),
        timeline=_timeline(steps),
        course=_course(events),
    )


def _own_seconds(row: Mapping[str, Any], device: str) -> float:
    """What a rank itself did in a step. On an accelerator the phase after the backward pass is waiting, too."""
    own: float = sum(seconds for phase, seconds in row["busy"].items() if phase != "synchronisation" or device == "cpu")
    return own


def _rank(
    rank: int,
    steady: Sequence[Sequence[Mapping[str, Any]]],
    own: Sequence[Sequence[float]],
    machine: Sequence[Sequence[float]],
    device: str,
) -> RankReading:
    rows = steady[rank]
    totals = dict.fromkeys(PARTS, 0.0)
    late, slowest, timed = 0.0, 0, 0
    for index, row in enumerate(rows):
        if not row["busy"]:
            continue  # on an accelerator only every so many steps are timed in parts
        timed += 1
        most = max(each[index] for each in own)
        slowest += own[rank][index] == most
        arrivals = [each[index]["arrived"] for each in steady if each[index]["arrived"] is not None]
        if row["arrived"] is not None:
            late += row["arrived"] - min(arrivals)
        for part, seconds in _parts(row, most - own[rank][index], device).items():
            totals[part] += seconds
    core, queue = _machine(machine, rows)
    return RankReading(
        seconds={part: total / max(1, timed) for part, total in totals.items()},
        late_seconds=late / max(1, timed),
        slowest=slowest / max(1, timed),
        core_seconds=core,
        queue_seconds=queue,
    )


def _parts(row: Mapping[str, Any], behind: float, device: str) -> dict[str, float]:
    """A step of one rank by part; `behind`: how much more the rank with the most work of its own had to do."""
    busy = row["busy"]
    collective = row["waited"].get("collective", 0.0)
    rest = row["ended"] - row["began"] - sum(busy.values()) - sum(row["waited"].values())
    other = busy.get("other", 0.0) + max(0.0, rest)
    if device == "cpu":
        other += busy.get("synchronisation", 0.0)  # copying gradients together and apart
    else:
        collective += busy.get("synchronisation", 0.0)
    waiting = min(collective, behind)
    return {
        "forward": busy.get("forward", 0.0),
        "backward": busy.get("backward", 0.0),
        "data": busy.get("data", 0.0),
        "waiting": waiting,
        "communication": collective - waiting,
        "bubble": row["waited"].get("message", 0.0),
        "optimizer": busy.get("optimizer", 0.0),
        "other": other,
    }


def _machine(samples: Sequence[Sequence[float]], rows: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Processor seconds and seconds without a core, a step; over the whole run where it is too short for two samples.

    A sample is when it was taken, then seconds, processor seconds and seconds without a core, all without evaluations and
    checkpoints. What was between steps counts as the steps do: a second of the clock is never more than one on each core.
    """
    inside = [sample for sample in samples if rows[0]["began"] <= sample[0] <= rows[-1]["ended"]]
    chosen = inside if len(inside) > 1 else list(samples)
    if len(chosen) < 2 or chosen[-1][1] <= chosen[0][1]:
        return 0.0, None
    (_, first, core_first, queue_first), (_, last, core_last, queue_last) = chosen[0], chosen[-1]
    per_step = statistics.fmean(row["ended"] - row["began"] for row in rows) / (last - first)
    queue = queue_last - queue_first
    return (core_last - core_first) * per_step, queue * per_step if queue == queue else None


def _timeline(steps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Bar]:
    """The kept steps of all ranks, on one clock: `perf_counter` counts alike in all processes of a Linux machine."""
    kept = [[row for row in rows if "spans" in row] for rows in steps]
    if not all(kept):
        return []
    zero = min(rows[0]["began"] for rows in kept)
    bars = []
    for rank, rows in enumerate(kept):
        for row in rows:
            for name, began, ended in row["spans"]:
                bars.append(Bar(rank=rank, lane="work", name=name, began=began - zero, ended=ended - zero))
            for kind, began, waited, ended in row["flights"]:
                bars.append(Bar(rank=rank, lane="flight", name=kind, began=began - zero, ended=ended - zero))
                bars.append(Bar(rank=rank, lane="wait", name=kind, began=waited - zero, ended=ended - zero))
    return bars


def _course(events: Sequence[Any]) -> Course:
    losses: list[float] = []
    seconds: list[float] = []
    samples: list[int] = []
    now, seen = 0.0, 0
    for event in events:
        if isinstance(event, StepsEvent):
            each = event.samples / max(1, len(event.losses))
            for index, (loss, took) in enumerate(zip(event.losses, event.seconds, strict=True), start=1):
                now += took
                losses.append(loss)
                seconds.append(round(now, 6))
                samples.append(round(seen + each * index))
            seen += int(event.samples)
    stride = max(1, -(-len(losses) // _COURSE_POINTS))
    chosen = slice(stride - 1, None, stride)
    return Course(losses=losses[chosen], seconds=seconds[chosen], samples=samples[chosen])
