"""Made runs for the tests of the monitor: event files as a training writes them, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwise.spec.event import Event
from shardwise.spec.events import EvaluationEvent, RunEvent, StepsEvent, SummaryEvent
from shardwise.spec.observations import PHASES, RanksEvent


def run_event(t: float = 1000.0, **changes: Any) -> RunEvent:
    values: dict[str, Any] = {
        "name": "digits",
        "settings": {"set.lr": {"value": 0.1, "source": "job"}, "seed": {"value": 0, "source": "default"}},
        "plan": {"layout": "data=2", "threads": 1, "prediction": {"step_seconds": 0.008, "memory_bytes": 1 << 27}},
        "versions": {"torch": "2.13.0"},
        "host": "here",
        "ranks": 2,
        "total_steps": 100,
        "device": "cpu",
        "cores": 2,
        "batch_size": 32,
    }
    return RunEvent(t=t, **{**values, **changes})


def steps_event(first: int, count: int = 10, *, t: float = 1001.0, loss: float | None = None) -> StepsEvent:
    losses = [2.0 / (1 + step) if loss is None else loss for step in range(first, first + count)]
    return StepsEvent(
        t=t,
        first_step=first,
        losses=losses,
        seconds=[0.01] * count,
        samples=32 * count,
        gradient_norm=0.5,
        learning_rates=[0.1],
    )


def ranks_event(first: int, count: int = 10, *, t: float = 1001.0, slow: float = 0.0) -> RanksEvent:
    """Rank 1 is slower in the backward pass by `slow` seconds a step."""
    table = {phase: [0.001 * count, 0.001 * count] for phase in PHASES}
    table["backward"][1] += slow * count
    table["synchronisation"][0] += slow * count
    return RanksEvent(
        t=t,
        first_step=first,
        steps=count,
        seconds=0.01 * count,
        timed_steps=count,
        phase_seconds=table,
        late_seconds=[0.0, slow],
        samples=[16 * count, 16 * count],
        sent_bytes=[1000 * count] * 2,
        memory_bytes=[1 << 27, 1 << 26],
        peak_memory_bytes=[1 << 28, 1 << 27],
        cpu_seconds=[0.009 * count, 0.005 * count],
        core_wait_seconds=[0.0, 0.001 * count],
    )


def finished() -> list[Event]:
    return [
        run_event(),
        *(event for first in range(0, 100, 10) for event in (steps_event(first), ranks_event(first))),
        EvaluationEvent(t=1002.0, step=100, split="test", metrics={"loss": 0.25, "accuracy": 0.9375}, samples=10, seconds=0.1),
        SummaryEvent(t=1003.0, summary={"stopped": False, "steps": 100}),
    ]  # fmt: skip


def write(folder: Path, events: list[Event], *, end: str = "\n") -> Path:
    """A run folder with these events; `end` is what stands after the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text('{"version": 1, "name": "digits"}')
    (folder / "events.jsonl").write_text("\n".join(event.to_line() for event in events) + end)
    return folder
