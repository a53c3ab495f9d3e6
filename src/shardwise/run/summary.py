"""The closing words of a run."""

from __future__ import annotations

from typing import Any

from shardwise.run.result import Run
from shardwise.units import format_bytes, format_seconds

_NAMES = {"synchronisation": "synchronisation (waiting for other workers)"}


def closing_lines(run: Run) -> list[str]:
    """What was done, how fast, where the time went, and where everything is."""
    s = run.summary
    threads = f", {s['threads']} {'thread' if s['threads'] == 1 else 'threads'} each" if s["device"] == "cpu" else ""
    workers = f"{s['workers']} {'worker' if s['workers'] == 1 else 'workers'}"
    resumed = f" (resumed at step {s['first_step']})" if s["first_step"] else ""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in s["metrics"].items())
    peak = max(rank["peak_memory_bytes"] for rank in s["ranks"])
    shares = shares_text(s["time_shares"])
    return [
        f"plan        {s['plan']}: {workers} on {s['device']}{threads}",
        f"trained     {s['steps']} steps{resumed}, {s['samples_per_second']:,.0f} samples/s; "
        f"{format_seconds(s['train_seconds'])} in steps, {format_seconds(s['wall_seconds'])} in all",
        *([f"time        {shares}"] if shares else []),
        f"memory      {format_bytes(peak)} at most in one worker",
        *([f"predicted   {told}"] if (told := predicted_text(run)) else []),
        f"last loss   {s['loss']:.4f}",
        *([f"test        {metrics}"] if metrics else []),
        f"run folder  {s['run']}  (weights: model.safetensors)",
    ]


def predicted(run: Run) -> dict[str, float] | None:
    """What was expected of the run beside what was measured; None where nothing was expected or no step was taken."""
    s, prediction = run.summary, run.plan.prediction
    steps = s["steps"] - s["first_step"]
    if prediction is None or steps <= 0 or not s["train_seconds"]:
        return None
    return {
        "step_seconds": prediction.step_seconds,
        "measured_step_seconds": s["train_seconds"] / steps,
        "memory_bytes": prediction.memory_bytes,
        "measured_memory_bytes": max(rank["peak_memory_bytes"] for rank in s["ranks"]),
    }


def predicted_text(run: Run) -> str:
    """The same in words; empty where there is nothing to say."""
    told = predicted(run)
    if told is None:
        return ""
    measured, expected = told["measured_step_seconds"], told["step_seconds"]
    text = f"{format_seconds(expected)} a step, measured {format_seconds(measured)} ({measured / expected - 1:+.0%})"
    if told["memory_bytes"]:
        peak, size = told["measured_memory_bytes"], told["memory_bytes"]
        text += f"; {format_bytes(size)} in one worker, measured {format_bytes(peak)} ({peak / size - 1:+.0%})"
    return text


def shares_text(shares: dict[str, Any]) -> str:
    """Shares of rank 0's step time, largest first, those under 0.5 % left out."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{_NAMES.get(name, name)} {share:.0%}" for name, share in ordered if share >= 0.005)
