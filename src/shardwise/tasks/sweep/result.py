"""A finished sweep: its trials, best first, and what is kept of them."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from typing import Any, final

from shardwise.run.folder import RunFolder, write_aside, writing_in
from shardwise.tasks.sweep.halving import Course, Trial
from shardwise.tasks.sweep.report import write_report
from shardwise.tasks.sweep.settle import Settled, SweepOptions
from shardwise.tasks.sweep.space import brief
from shardwise.units import format_seconds


@final
@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        settled: what was settled before it began.
        trials: best first; those that failed come last.
        records: one for each training: trial, fold, seed, and what it answered.
        summary: as `shardwise sweep --json` prints it.
    """

    folder: RunFolder
    options: SweepOptions
    settled: Settled
    trials: list[Trial]
    records: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def failed(self) -> str | None:
        """Why the first trial failed, where every trial did."""
        if self.summary["failed"] < self.summary["combinations"]:
            return None
        return self.summary["trials"][0]["failure"] or f"its {self.settled.metric} is no number"

    @property
    def wrong_input(self) -> bool:
        """Every trial failed, and each because of what the user gave, such as a path without data."""
        return self.failed is not None and all(record["wrong_input"] for record in self.records)


def spread(values: list[float]) -> float | None:
    """Standard deviation over folds and seeds (n - 1); None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def finish(
    options: SweepOptions,
    plan: Settled,
    folder: RunFolder,
    course: Course,
    records: list[dict[str, Any]],
    extra: dict[str, Any],
    began: float,
) -> Sweep:
    records.sort(key=lambda record: (record["trial"], record["rung"], record["fold"] or 0, record["seed"]))
    best = course.best_first()
    rest = [trial for trial in course.trials if trial not in best]
    rows = []
    for trial in [*best, *rest]:
        own = [record for record in records if record["trial"] == trial.number and record["rung"] == trial.rung]
        values = [record["metrics"][plan.metric] for record in own if record["state"] == "done"]
        rows.append(
            {
                "trial": trial.number,
                "settings": dict(trial.setting),
                plan.metric: trial.value,
                "spread": spread(values),
                "values": values,
                "trained": plan.rungs[trial.rung] if trial.rung >= 0 else 0,
                "state": "failed" if trial in rest else "done" if trial.rung == len(plan.rungs) - 1 else "paused",
                "failure": next((record["failure"] for record in own if record["failure"]), None),
                "runs": [record["run"] for record in own if "run" in record],
            }
        )
    summary = {
        "run": str(folder.path),
        "job": plan.found.origin,
        "metric": plan.metric,
        "goal": "max" if plan.maximize else "min",
        "split": "left-out folds" if options.folds else "test",
        "search": options.search,
        "combinations": len(course.trials),
        "trainings": len({(record["trial"], record["fold"], record["seed"]) for record in records}),
        "failed": len(rest),
        "plan": plan.layout,
        "threads": plan.threads,
        "reasons": plan.reasons,
        "predicted_memory_bytes": plan.memory_bytes or None,
        "trained": sum(plan.rungs[trial.rung] for trial in course.trials if trial.rung >= 0),
        "of": plan.rungs[-1] * len(course.trials),
        "wall_seconds": time.time() - began,
        **extra,
        "trials": rows,
    }
    with writing_in(folder.path):
        write_aside(folder.path / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
        write_report(folder.path, summary, records, plan.axes)
    return Sweep(folder, options, plan, [*best, *rest], records, summary)


def closing_lines(sweep: Sweep, most: int = 10) -> list[str]:
    """The best trials as a table, and what it took."""
    summary, metric = sweep.summary, sweep.settled.metric
    lines = []
    for place, row in enumerate(summary["trials"][:most], start=1):
        text = " ".join(f"{name}={value}" for name, value in row["settings"].items())
        if row["state"] == "failed":
            reason = brief(row["failure"] or f"its {metric} is no number")
            lines.append(f"        trial {row['trial']:<4} {text}  failed: {reason}")
            continue
        value = f"{metric} {row[metric]:.4f}" + (f" +- {row['spread']:.4f}" if row["spread"] is not None else "")
        state = f"  paused after {row['trained']}" if row["state"] == "paused" else ""
        lines.append(f"{place:>5}.  trial {row['trial']:<4} {value}  {text}{state}")
    if len(summary["trials"]) > most:
        lines.append(f"        ... and {len(summary['trials']) - most} more in trials.csv")
    if "ensemble" in summary:
        together = "  ".join(f"{name} {value:.4f}" for name, value in summary["ensemble"]["metrics"].items())
        lines.append(f"ensemble    of trials {', '.join(map(str, summary['ensemble']['trials']))}: test {together}")
    lines += [f"exported    trial {item['trial']} to {item['path']}" for item in summary.get("exported", ())]
    saved = f", {summary['trained']} of {summary['of']} epochs or steps" if sweep.settled.stops else ""
    lines.append(
        f"{summary['combinations']} combinations, {summary['trainings']} trainings, {summary['failed']} failed{saved}; "
        f"{format_seconds(summary['wall_seconds'])} in all"
    )
    return [
        *lines,
        f"folder      {summary['run']}  (trials.csv, report.html, a run folder for each training in trials/)",
    ]
