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
        f"last loss   {s['loss']:.4f}",
        *([f"test        {metrics}"] if metrics else []),
        f"run folder  {s['run']}  (weights: model.safetensors)",
    ]


def shares_text(shares: dict[str, Any]) -> str:
    """Shares of rank 0's step time, largest first, those under 0.5 % left out."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{_NAMES.get(name, name)} {share:.0%}" for name, share in ordered if share >= 0.005)
