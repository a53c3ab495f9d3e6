"""Fit the planner's constants on the odd rows of the published tables; report on the even rows or on left-out sources.

    python benchmarks/fit_planner.py [--tables ../shared/tables] [--rounds 5] [--leave-out internevo ...]
    python benchmarks/fit_planner.py --each    # leave out every source and kind of run, write benchmarks/results/left_out.json

Coordinate search inside the physical bounds of every constant, from guesses in the middle of the physical ranges. The
loss is the mean over sources of the mean |log(predicted / measured)|, each row cut at log 1.5 so that single faults do
not steer the fit, and a ridge that pulls every constant towards its guess, so that one that no source tells anything
about stays there. The noisy H100 sweep counts half. Prints the constants; putting them into planner/constants.py is a
decision, not a side effect. `accuracy.py` reads the result of `--each` and scores every source with the constants
fitted without it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from scoring import KINDS, LEFT_OUT_FILE, SOURCES, SWEEP, cluster_machine, load_scorer, with_pending_sends
from shardwise.errors import UserError
from shardwise.planner.constants import BOUNDS, Constants
from shardwise.planner.predict import resolve
from shardwise.planner.runs import Row, read_runs
from shardwise.spec.machine import Machine

CUT = math.log(1.5)
RIDGE = 0.02
"""Loss of a constant that is as far from its guess as its bounds are apart."""

STRIDES = {"vtrain_ground_truth_single_node": 8, SWEEP: 8, "llm_foundry_mpt": 2}
"""Of the odd rows of the large tables every so many is enough for the fit."""

START = Constants(
    matmul_rate=0.85,
    matmul_inner_half=200.0,
    memory_rate=0.75,
    attention_rate=0.7,
    eager_traffic=1.5,
    launch_seconds=1.2e-5,
    kernel_seconds=3e-6,
    network_rate=0.7,
    link_rate=0.7,
    overlap_cost=0.2,
    gradient_overlap=0.6,
    step_seconds=0.003,
    hop_share=0.75,
    tensor_overlap=0.3,
    host_norm=2.0,
)
"""Round figures from the middle of the physical ranges, kept after results were seen; `host_norm` came with its formula."""

Sample = tuple[str, list[tuple[Row, float]], Machine | None]


def samples(tables: Path, names: Sequence[str], *, odd: bool) -> list[Sample]:
    """Rows with a measured step: of the odd rows of every table those the fit uses, or all even ones."""
    scorer = load_scorer(tables)
    found: list[Sample] = []
    for name in names:
        machine = with_pending_sends(cluster_machine(tables)) if name == SWEEP else None
        measured = {
            row["run_id"]: float(row["step_seconds"])
            for row in scorer.read(tables / f"{name}.csv")
            if row["status"] == "ok" and row["step_seconds"]
        }
        rows = read_runs(tables / f"{name}.csv")[0 if odd else 1 :: 2]
        kept = [(row, measured[str(row["run_id"])]) for row in rows if row["run_id"] in measured]
        found.append((name, kept[:: STRIDES.get(name, 1)] if odd else kept, machine))
    return found


def source_loss(constants: Constants, sample: Sample) -> float:
    """Mean cut |log ratio| of one source."""
    _, rows, machine = sample
    errors = []
    for row, measured in rows:
        try:
            predicted = resolve(row, machine, constants)[1].step_seconds
        except UserError:
            continue
        errors.append(min(abs(math.log(predicted / measured)), CUT))
    return sum(errors) / max(1, len(errors))


def loss(constants: Constants, chosen: Sequence[Sample]) -> float:
    """Weighted mean over sources, and the ridge."""
    weights = [0.5 if name == SWEEP else 1.0 for name, _, _ in chosen]
    total = sum(weight * source_loss(constants, sample) for weight, sample in zip(weights, chosen, strict=True))
    pull = 0.0
    for name, (low, high) in BOUNDS.items():
        pull += ((getattr(constants, name) - getattr(START, name)) / (high - low)) ** 2
    return total / sum(weights) + RIDGE * pull


def fit(constants: Constants, chosen: Sequence[Sample], rounds: int) -> Constants:
    """Coordinate search: one step up or down per constant, half the step where neither helps."""
    best = loss(constants, chosen)
    steps = {name: 0.2 * (high - low) for name, (low, high) in BOUNDS.items()}
    for turn in range(rounds):
        for name, step in list(steps.items()):
            low, high = BOUNDS[name]
            here = getattr(constants, name)
            for sign in (1.0, -1.0):
                there = min(high, max(low, here + sign * step))
                tried = replace(constants, **{name: there})
                found = loss(tried, chosen) if there != here else math.inf
                if found < best - 1e-6:
                    best, constants = found, tried
                    break
            else:
                steps[name] = step / 2
        print(f"round {turn + 1}: loss {best:.5f}", flush=True)
    return constants


def leave_each_out(tables: Path, rounds: int) -> None:
    """Fit without every source and every kind of run in turn and keep the constants."""
    everything = samples(tables, SOURCES, odd=True)
    record = {}
    for label in (*SOURCES, *KINDS):
        print(f"without {label}", flush=True)
        kept = [sample for sample in everything if sample[0] != label]
        if label in KINDS:
            seen = [
                (name, [pair for pair in rows if not KINDS[label](pair[0])], machine) for name, rows, machine in kept
            ]
            kept = [sample for sample in seen if sample[1]]
        found = fit(START, kept, rounds)
        record[label] = {key: float(f"{value:.6g}") for key, value in asdict(found).items()}
    LEFT_OUT_FILE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, default=Path(__file__).parents[2] / "shared" / "tables")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leave-out", nargs="*", default=[], choices=SOURCES, help="sources the fit must not see")
    parser.add_argument("--each", action="store_true", help="leave out every source and kind in turn; minutes")
    chosen = parser.parse_args()
    if chosen.each:
        leave_each_out(chosen.tables, chosen.rounds)
        return
    names = [name for name in SOURCES if name not in chosen.leave_out]
    found = fit(START, samples(chosen.tables, names, odd=True), chosen.rounds)
    for item in fields(found):
        print(f"    {item.name}: float = {getattr(found, item.name):.4g}")
    print("source, mean |log ratio| on rows the fit did not see:")
    for sample in samples(chosen.tables, SOURCES, odd=False):
        label = "left out" if sample[0] in chosen.leave_out else "even rows"
        print(f"    {sample[0]} ({label}): {source_loss(found, sample):.4f}")


if __name__ == "__main__":
    main()
