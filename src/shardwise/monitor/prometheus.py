"""The state of runs in the text format that Prometheus scrapes.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

from shardwise.monitor.state import RunState

_STATUSES = ("running", "finished", "stopped", "failed", "stalled", "silent", "empty", "unreadable")

_HELP = {
    "status": "1 for the status that the run has, 0 for the others",
    "step": "Global steps done",
    "total_steps": "Global steps at the end of the run",
    "epoch": "Epochs done",
    "loss": "Mean loss over the last global batch",
    "objective": "Mean of an objective over its last global batch, of a job with several",
    "metric": "Metric over the test split at the last evaluation",
    "samples_per_second": "Samples of all ranks a second",
    "step_seconds": "Median wall seconds of the last steps",
    "predicted_step_seconds": "Seconds of a step that the plan predicts",
    "gradient_norm": "Norm of the whole gradient before clipping",
    "learning_rate": "Learning rate of a parameter group",
    "phase_seconds": "Seconds of a step by rank and phase",
    "late_seconds": "How long after the first rank a rank comes to the first collective of a step",
    "memory_bytes": "Bytes in use by a rank",
    "core_wait_ratio": "Part of the time in which a rank was ready to run and had no core",
    "expert_tokens": "Tokens given to an expert between two settlements",
    "last_event_timestamp_seconds": "When the run was last heard of",
}


def exposition(states: Sequence[RunState], now: float | None = None) -> str:
    """All runs; names begin with `shardwise_`, and every sample has the label `run`."""
    now = time.time() if now is None else now
    families: dict[str, list[str]] = {name: [] for name in _HELP}
    for state in states:
        for name, labels, value in _samples(state, now):
            if value is not None:
                text = ",".join(f'{key}="{_escaped(item)}"' for key, item in {"run": state.path, **labels}.items())
                families[name].append(f"shardwise_{name}{{{text}}} {_number(value)}")
    lines = []
    for name, samples in families.items():
        if samples:
            lines += [f"# HELP shardwise_{name} {_HELP[name]}", f"# TYPE shardwise_{name} gauge", *samples]
    return "\n".join(lines) + "\n"


def _samples(state: RunState, now: float) -> Iterator[tuple[str, dict[str, str], float | None]]:
    status = state.status(now)
    for each in _STATUSES:
        yield "status", {"status": each}, float(each == status)
    yield "step", {}, state.step
    yield "total_steps", {}, state.total_steps
    yield "epoch", {}, state.epoch
    yield "loss", {}, state.loss
    for name, value in state.objectives.items():
        yield "objective", {"objective": name}, value
    for name, value in state.metrics.items():
        yield "metric", {"metric": name}, value
    yield "samples_per_second", {}, state.samples_per_second
    yield "step_seconds", {}, state.step_seconds
    yield "predicted_step_seconds", {}, state.predicted_seconds
    yield "gradient_norm", {}, state.gradient_norm
    for group, rate in enumerate(state.learning_rates):
        yield "learning_rate", {"group": str(group)}, rate
    for row in state.rank_rows():
        rank = {"rank": str(row["rank"])}
        for phase, milliseconds in row["phase_ms"].items():
            yield "phase_seconds", {**rank, "phase": phase}, milliseconds / 1e3
        yield "late_seconds", rank, row["late_ms"] / 1e3
        yield "memory_bytes", rank, row["memory_bytes"]
        yield "core_wait_ratio", rank, row["core_wait"]
    if state.experts is not None:
        for layer, tokens in state.experts.tokens.items():
            for expert, count in enumerate(tokens):
                yield "expert_tokens", {"layer": layer, "expert": str(expert)}, count
    yield "last_event_timestamp_seconds", {}, state.last


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value)) if isinstance(value, float) else str(value)
