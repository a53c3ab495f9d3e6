"""RunState: what a run is doing, folded from its events. Everything that is shown or exported is read from here."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any, final

from shardwise.monitor.history import Curve
from shardwise.monitor.notes import Note, note_of
from shardwise.monitor.straggler import slowest
from shardwise.spec.events import (
    EpochEvent,
    EvaluationEvent,
    Event,
    FailureEvent,
    RunEvent,
    StepsEvent,
    SummaryEvent,
)
from shardwise.spec.observations import (
    PHASES,
    ExpertsEvent,
    RanksEvent,
    RecoveryEvent,
    StallEvent,
    StragglerEvent,
    SweepEvent,
)

SILENT_SECONDS = 30.0
"""A run without news for so long is called silent: it is killed, hangs, or does something long between steps."""

_RECENT_STEPS = 200  # over which the current speed is taken
_RECENT_TABLES = 8  # `ranks` events over which the current split of time is taken
_NOTES = 200


@final
@dataclass
class RunState:
    """Give it every event of a run, in order, with `apply`."""

    path: str
    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    host: str = ""
    device: str = ""
    ranks: int = 0
    batch_size: int | None = None
    first_step: int = 0
    total_steps: int | None = None
    step: int = 0
    epoch: int = 0
    started: float | None = None
    begun: float | None = None
    last: float | None = None
    end: str = ""
    message: str = ""
    error: str = ""
    gradient_norm: float | None = None
    learning_rates: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    experts: ExpertsEvent | None = None
    stall: StallEvent | None = None
    straggler: StragglerEvent | None = None
    sweep: SweepEvent | None = None
    malformed: int = 0
    objectives: dict[str, float] = field(default_factory=dict)
    losses: Curve = field(default_factory=Curve)
    objective_curves: dict[str, Curve] = field(default_factory=dict)
    step_curve: Curve = field(default_factory=Curve)
    norms: Curve = field(default_factory=Curve)
    metric_curves: dict[str, Curve] = field(default_factory=dict)
    notes: deque[Note] = field(default_factory=lambda: deque(maxlen=_NOTES))
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _samples: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT_TABLES))
    _tables: deque[RanksEvent] = field(default_factory=lambda: deque(maxlen=_RECENT_TABLES))
    _epochs: list[tuple[int, int]] = field(default_factory=list)
    _evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def apply(self, event: Event) -> bool:
        """Take in one event. One whose fields do not go together is counted in `malformed`, and is not half taken."""
        try:
            self._apply(event)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError):
            self.malformed += 1
            return False
        return True

    def _apply(self, event: Event) -> None:
        t = float(event.t)
        if isinstance(event, RunEvent):
            self._begin(event)
        elif isinstance(event, StepsEvent):
            self._steps(event)
        elif isinstance(event, RanksEvent):
            self._table(event)
        elif isinstance(event, EpochEvent):
            self.epoch = int(event.epoch) + 1
            self._epochs.append((int(event.step), self.epoch))
        elif isinstance(event, EvaluationEvent):
            self._evaluations.append((event.step, event.metrics))
            self.metrics.update(event.metrics)
            for name, value in event.metrics.items():
                self.metric_curves.setdefault(name, Curve()).add(event.step - 1, value)
        elif isinstance(event, ExpertsEvent):
            self.experts = event
        elif isinstance(event, SummaryEvent):
            self.end = "stopped" if event.summary.get("stopped") else "finished"
            self.stall = self.straggler = None
        elif isinstance(event, FailureEvent):
            self.end, self.message, self.stall = "failed", str(event.message), None
        elif isinstance(event, StallEvent):
            self.stall = event
        elif isinstance(event, RecoveryEvent):
            self.stall = None
        elif isinstance(event, StragglerEvent):
            self.straggler = event
        elif isinstance(event, SweepEvent):
            self.sweep = event
        note = note_of(event)
        if note is not None:
            self.notes.append(note)
        self.last = t if self.last is None else max(self.last, t)

    def _begin(self, event: RunEvent) -> None:
        first_step = int(event.first_step)
        curves = (*self.objective_curves.values(), *self.metric_curves.values())
        for curve in (self.losses, self.step_curve, self.norms, *curves):
            curve.forget_from(first_step)
        self._epochs = [each for each in self._epochs if each[0] <= first_step]
        self.epoch = self._epochs[-1][1] if self._epochs else 0
        self._evaluations = [each for each in self._evaluations if each[0] <= first_step]
        self.metrics = {name: value for _, each in self._evaluations for name, value in each.items()}
        self.name, self.settings, self.plan = str(event.name), dict(event.settings), dict(event.plan)
        self.host, self.device, self.ranks = str(event.host), str(event.device), int(event.ranks)
        self.batch_size, self.total_steps = event.batch_size, event.total_steps
        self.first_step = self.step = first_step
        self.begun, self.started = event.t, event.t if self.started is None else self.started
        self.end, self.message, self.stall, self.straggler = "", "", None, None
        self._seconds.clear()
        self._samples.clear()
        self._tables.clear()

    def _steps(self, event: StepsEvent) -> None:
        losses, seconds = [float(loss) for loss in event.losses], [float(each) for each in event.seconds]
        first = int(event.first_step)
        named = [
            (name, offset, float(loss))
            for name, each in event.objectives.items()
            for offset, loss in enumerate(each)
            if loss is not None
        ]
        for offset, (loss, each) in enumerate(zip(losses, seconds, strict=True)):
            self.losses.add(first + offset, loss)
            self.step_curve.add(first + offset, each)
        for name, offset, loss in named:
            self.objectives[name] = loss
            self.objective_curves.setdefault(name, Curve()).add(first + offset, loss)
        self._seconds.extend(seconds)
        self._samples.append((int(event.samples), sum(seconds)))
        self.step = first + len(losses)
        if losses:
            self.loss = losses[-1]
        self.gradient_norm = event.gradient_norm
        if event.gradient_norm is not None:
            self.norms.add(self.step - 1, float(event.gradient_norm))
        self.learning_rates = [float(rate) for rate in event.learning_rates]
        self.stall = None

    def _table(self, event: RanksEvent) -> None:
        columns = [*event.phase_seconds.values(), *(each for each in vars(event).values() if isinstance(each, list))]
        if any(len(column) != len(event.samples) for column in columns):
            raise ValueError("lists of different lengths")
        self._tables.append(event)
        self._settle_straggler()

    def _settle_straggler(self) -> None:
        """A straggler that was told once and is no slower than the others any more is none any more."""
        if self.straggler is None or len(self._tables) < _RECENT_TABLES:
            return
        now = slowest(list(self._tables))
        if now is None or now[0] != self.straggler.rank or now[2] < self.straggler.lost_seconds / 4:
            self.straggler = None

    # What is asked of it -----------------------------------------------------------------------------------------

    def status(self, now: float | None = None) -> str:
        """`finished`, `stopped`, `failed`, `stalled`, `silent` (no news for long), `running`, `empty`, or `unreadable`."""
        if self.error:
            return "unreadable"
        if self.end:
            return self.end
        if self.last is None:
            return "empty"
        if self.stall is not None:
            return "stalled"
        longest = max(SILENT_SECONDS, 10 * (self.step_seconds or 0.0))
        return "silent" if (time.time() if now is None else now) - self.last > longest else "running"

    @property
    def step_seconds(self) -> float | None:
        """Median over the last steps."""
        return median(self._seconds) if self._seconds else None

    @property
    def samples_per_second(self) -> float | None:
        """Over the last settlements."""
        seconds = sum(each for _, each in self._samples)
        return sum(count for count, _ in self._samples) / seconds if seconds else None

    @property
    def left_seconds(self) -> float | None:
        """Until the last step, at the current speed; evaluations and checkpoints not counted. Of a sweep, all its trials."""
        if self.sweep is not None:
            return None if self.end else self.sweep.left_seconds
        if self.total_steps is None or self.step_seconds is None or self.end:
            return None
        return max(0, self.total_steps - self.step) * self.step_seconds

    @property
    def predicted_seconds(self) -> float | None:
        """Of a step, as the plan's prediction says."""
        prediction = self.plan.get("prediction")
        value = prediction.get("step_seconds") if isinstance(prediction, dict) else None
        return float(value) if isinstance(value, int | float) else None

    @property
    def predicted_bytes(self) -> int | None:
        """Of the fullest rank, as the plan's prediction says."""
        prediction = self.plan.get("prediction")
        value = prediction.get("memory_bytes") if isinstance(prediction, dict) else None
        return int(value) if isinstance(value, int | float) else None

    def rank_rows(self) -> list[dict[str, Any]]:
        """One row a rank: milliseconds of a step by phase, arrival, memory, and how busy its processor was."""
        tables = list(self._tables)
        if not tables:
            return []
        timed = max(1, sum(int(each.timed_steps) for each in tables))
        steps = max(1, sum(int(each.steps) for each in tables))
        seconds = sum(float(each.seconds) for each in tables)
        rows = []
        for rank in range(len(tables[-1].samples)):
            same = [each for each in tables if len(each.samples) > rank]
            phases = {
                phase: 1e3
                * sum(each.phase_seconds[phase][rank] for each in same if phase in each.phase_seconds)
                / timed
                for phase in PHASES
            }
            rows.append({
                "rank": rank,
                "phase_ms": phases,
                "step_ms": sum(phases.values()),
                "late_ms": 1e3 * sum(each.late_seconds[rank] * each.steps for each in same) / steps,
                "samples": sum(each.samples[rank] for each in same) / steps,
                "sent_bytes": sum(each.sent_bytes[rank] for each in same) / steps,
                "memory_bytes": tables[-1].memory_bytes[rank],
                "peak_memory_bytes": tables[-1].peak_memory_bytes[rank],
                "cpu": sum(each.cpu_seconds[rank] for each in same) / seconds if seconds else 0.0,
                "core_wait": sum(each.core_wait_seconds[rank] for each in same) / seconds if seconds else 0.0,
            })  # fmt: skip
        return rows

    def snapshot(self, now: float | None = None, *, curves: bool = True) -> dict[str, Any]:
        """All of it as JSON data. Times are unix seconds, durations seconds, unless a name says otherwise."""
        experts = self.experts
        record: dict[str, Any] = {
            "path": self.path,
            "name": self.name,
            "status": self.status(now),
            "message": self.message,
            "error": self.error,
            "plan": str(self.plan.get("layout", "")),
            "device": self.device,
            "host": self.host,
            "ranks": self.ranks,
            "batch_size": self.batch_size,
            "step": self.step,
            "first_step": self.first_step,
            "total_steps": self.total_steps,
            "epoch": self.epoch,
            "started": self.started,
            "last": self.last,
            "loss": self.loss,
            "objectives": dict(self.objectives),
            "metrics": dict(self.metrics),
            "samples_per_second": self.samples_per_second,
            "step_seconds": self.step_seconds,
            "left_seconds": self.left_seconds,
            "predicted": {"step_seconds": self.predicted_seconds, "memory_bytes": self.predicted_bytes},
            "gradient_norm": self.gradient_norm,
            "learning_rates": self.learning_rates,
            "rank_rows": self.rank_rows(),
            "experts": None if experts is None else {"tokens": experts.tokens, "dropped": experts.dropped},
            "sweep": None if self.sweep is None else _plain(self.sweep),
            "straggler": None if self.straggler is None else _plain(self.straggler),
            "stall": None if self.stall is None else _plain(self.stall),
            "malformed": self.malformed,
            "notes": [vars(note) for note in self.notes],
            "settings": {key: _value(item) for key, item in self.settings.items()},
        }
        if curves:
            record["curves"] = {
                "loss": self.losses.points(),
                **{f"loss {name}": curve.points() for name, curve in self.objective_curves.items()},
                "step_seconds": self.step_curve.points(),
                "gradient_norm": self.norms.points(),
                **{f"test {name}": curve.points() for name, curve in self.metric_curves.items()},
            }
        return record


def differing_settings(states: list[RunState]) -> dict[str, list[Any]]:
    """Settings whose values are not the same in all runs: name -> value in each run, None where a run lacks it.

    A sweep itself is no run: it has None everywhere, and makes no difference.
    """
    runs = [state for state in states if state.sweep is None]
    names = dict.fromkeys(name for state in runs for name in state.settings if name != "out")
    differing = [name for name in names if len({repr(_value(state.settings.get(name))) for state in runs}) > 1]
    return {
        name: [None if state.sweep is not None else _value(state.settings.get(name)) for state in states]
        for name in differing
    }


def _value(item: Any) -> Any:
    return item.get("value") if isinstance(item, dict) else item


def _plain(event: Event) -> dict[str, Any]:
    return {"kind": event.kind, **vars(event)}
