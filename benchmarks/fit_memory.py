"""Fit the constants of the memory model without each source in turn, and say how far they miss its peaks.

    python benchmarks/fit_memory.py [--tables ../shared/tables]    # seconds; writes benchmarks/results/left_out_memory.json

The same search as `fit_planner.py`: odd rows of the other sources, coordinate steps inside physical bounds, a ridge that
pulls every constant towards a round guess. The loss is the mean over sources of the mean |predicted / printed - 1|, cut at
one half. `accuracy.py` prints the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from fit_planner import RIDGE
from scoring import LEFT_OUT_MEMORY_FILE, SWEEP, cluster_machine, load_scorer
from shardwise.planner import activations, memory
from shardwise.planner.case import Case
from shardwise.planner.predict import predict_runs, printed_bytes
from shardwise.planner.runs import read_runs

SOURCES = (SWEEP, "internevo", "torchtitan_performance", "korthikanti2022")
"""Tables that print the memory of a run."""

GIB = 2.0**30
GUESSES = {
    "SLACK": (0.05, 0.0, 0.15),
    "WORKSPACE_BYTES": (0.5 * GIB, 0.0, 2.0 * GIB),
    "UPDATE_BYTES": (12.0, 4.0, 16.0),
    "SELECTIVE_KEEPS": (0.45, 0.3, 0.6),
    "LOGIT_BYTES": (14.0, 8.0, 20.0),
}
"""Constant of planner/memory.py or activations.py: guess, lowest, highest."""

SWEEP_STRIDE = 8
"""Of the odd rows of the large sweep every so many is enough."""

CUT = 0.5
Peak = tuple[Case, tuple[int, ...], float]


def peaks(tables: Path, name: str) -> list[Peak]:
    """Case, chunks in flight and printed bytes of every run that ran and printed its memory."""
    rows = {row["run_id"]: row for row in load_scorer(tables).read(tables / f"{name}.csv")}
    found = []
    for item in predict_runs(read_runs(tables / f"{name}.csv"), cluster_machine(tables) if name == SWEEP else None):
        row = rows[item.run_id]
        if item.case and item.estimate and row["status"] == "ok" and row["memory_gib"]:
            found.append((item.case, item.estimate.timeline.in_flight, float(row["memory_gib"]) * GIB))
    return found


def error(chosen: Sequence[Peak]) -> float:
    """Mean |predicted / printed - 1| with the constants as they are set."""
    return statistics.mean(
        abs(printed_bytes(case, memory.rank_memory(case, flight, memory.rank_shares(case))) / printed - 1)
        for case, flight, printed in chosen
    )


def set_constants(values: dict[str, float]) -> None:
    """Give the memory model these constants, in this process."""
    for name, value in values.items():
        setattr(activations if hasattr(activations, name) else memory, name, value)


def fit(chosen: Sequence[Sequence[Peak]], rounds: int = 5) -> dict[str, float]:
    """Coordinate search: one step up or down per constant, half the step where neither helps."""

    def loss(values: dict[str, float]) -> float:
        set_constants(values)
        pull = sum(((values[name] - guess) / (high - low)) ** 2 for name, (guess, low, high) in GUESSES.items())
        return statistics.mean(min(error(part), CUT) for part in chosen) + RIDGE * pull

    values = {name: guess for name, (guess, _, _) in GUESSES.items()}
    best = loss(values)
    steps = {name: 0.2 * (high - low) for name, (_, low, high) in GUESSES.items()}
    for _ in range(rounds):
        for name, (_, low, high) in GUESSES.items():
            for sign in (1.0, -1.0):
                tried = {**values, name: min(high, max(low, values[name] + sign * steps[name]))}
                found = loss(tried)
                if found < best - 1e-6:
                    best, values = found, tried
                    break
            else:
                steps[name] /= 2
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, default=Path(__file__).parents[2] / "shared" / "tables")
    tables = parser.parse_args().tables
    everything = {name: peaks(tables, name) for name in SOURCES}
    odd = {name: part[:: 2 * (SWEEP_STRIDE if name == SWEEP else 1)] for name, part in everything.items()}
    record = {}
    for name in SOURCES:
        values = fit([part for other, part in odd.items() if other != name])
        set_constants(values)
        record[name] = {
            "error": float(f"{error(everything[name]):.4g}"),
            **{key: float(f"{value:.4g}") for key, value in values.items()},
        }
        print(f"without {name}: {record[name]}", flush=True)
    LEFT_OUT_MEMORY_FILE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
