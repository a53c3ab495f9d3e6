"""What happened in a run, event by event, as lines for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from shardwise.spec.events import (
    CheckpointEvent,
    EvaluationEvent,
    Event,
    FailureEvent,
    RestartEvent,
    RunEvent,
    SummaryEvent,
    WarningEvent,
)
from shardwise.spec.observations import (
    BalanceEvent,
    BottleneckEvent,
    RecoveryEvent,
    StallEvent,
    StragglerEvent,
    SweepEvent,
    TraceEvent,
)
from shardwise.units import format_seconds


@final
@dataclass(frozen=True)
class Note:
    """Something that happened, for the list of events.

    Attributes:
        t: unix seconds.
        kind: of the event.
        text: one or a few sentences.
        grave: it needs somebody's attention.
    """

    t: float
    kind: str
    text: str
    grave: bool = False


def note_of(event: Event) -> Note | None:
    """The line of an event in the list of what happened; None for those that are shown otherwise."""
    t = float(event.t)
    text, grave = "", False
    if isinstance(event, SweepEvent):
        text, grave = _of_trial(event), event.state == "failed"
    elif isinstance(event, RunEvent):
        how = f"goes on at step {event.first_step}" if event.first_step else "starts"
        text = f"{event.name} {how}: {event.ranks} {'rank' if event.ranks == 1 else 'ranks'}, plan {event.plan.get('layout')}"
    elif isinstance(event, CheckpointEvent):
        text = f"checkpoint after step {event.step} ({format_seconds(event.seconds)})"
    elif isinstance(event, RestartEvent):
        text, grave = f"restart {event.attempt} from step {event.step}: {event.reason}", True
    elif isinstance(event, EvaluationEvent):
        numbers = ", ".join(f"{name} {float(value):.4f}" for name, value in event.metrics.items())
        text = f"{event.split} after step {event.step}: {numbers}"
    elif isinstance(event, SummaryEvent):
        text = "stopped on request, saved" if event.summary.get("stopped") else "finished"
    elif isinstance(event, RecoveryEvent):
        text = f"the stalled step ended after {format_seconds(event.waited_seconds)}"
    elif isinstance(event, BalanceEvent):
        text = "the global batch is divided anew: " + ", ".join(map(str, event.samples))
    elif isinstance(event, TraceEvent):
        text = f"trace of steps {event.first_step} to {event.first_step + event.steps - 1}: {event.path}"
    elif isinstance(event, WarningEvent | FailureEvent | StragglerEvent | BottleneckEvent | StallEvent):
        text, grave = str(event.message), not isinstance(event, BottleneckEvent)
    return Note(t, event.kind, text, grave) if text else None


def _of_trial(event: SweepEvent) -> str:
    """What happened to a trial; empty where nothing did."""
    if event.number is None:
        return ""
    what = f"trial {event.number} ({' '.join(f'{name}={text}' for name, text in event.setting.items())})"
    if event.state == "failed":
        return f"{what} failed: {event.failure}"
    best = ", the best so far" if event.best == event.number else ""
    after = f" after {event.trained}, paused" if event.state == "paused" else ""
    return f"{what}{after}: {event.metric} {float('nan') if event.value is None else event.value:.4f}{best}"
