"""Do the numbers of `shardwise bench` agree with a stopwatch outside of it?

Runs a bench, and `shardwise train` of the same job and plan with K and with 3K steps under this script's own clock, in turn.
The whole command is compared with `total_seconds`; the difference of the two trainings over 2K steps, which has no start-up
in it, with `step_seconds`. The trainings keep no records, so the comparison also shows what keeping them costs.

    python benchmarks/stopwatch.py [--plan data=2] [--steps 400] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "shardwise.cli.main"]


def train_seconds(job: str, plan: str, steps: int, folder: Path) -> float:
    """Wall seconds of one training as a command."""
    words = [
        "train",
        job,
        "--plan",
        plan,
        "--threads",
        "1",
        "--steps",
        str(steps),
        "--quiet",
        "--checkpoint-every",
        "never",
    ]
    began = time.perf_counter()
    subprocess.run([*COMMAND, *words, "--out", str(folder)], check=True)
    return time.perf_counter() - began


def bench_case(job: str, plan: str, steps: int, folder: Path) -> dict[str, Any]:
    """The case of the plan in a bench of one round."""
    words = [
        "bench",
        job,
        "--plans",
        plan,
        "--steps",
        str(steps),
        "--rounds",
        "1",
        "--quiet",
        "--json",
        "--out",
        str(folder),
    ]
    done = subprocess.run([*COMMAND, *words], check=True, stdout=subprocess.PIPE)
    cases = json.loads(done.stdout)["cases"]
    return next(case for case in cases if case["plan"]["layout"] == plan and case["threads"] == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="digits")
    parser.add_argument("--plan", default="data=2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    totals, steps = [], []
    with tempfile.TemporaryDirectory() as place:
        for number in range(given.rounds):
            folder = Path(place) / str(number)
            short = train_seconds(given.job, given.plan, given.steps, folder / "short")
            case = bench_case(given.job, given.plan, given.steps, folder / "bench")
            long = train_seconds(given.job, given.plan, 3 * given.steps, folder / "long")
            outside = (long - short) / (2 * given.steps)
            totals.append(case["total_seconds"]["median"] / short)
            steps.append(case["step_seconds"]["median"] / outside)
            print(
                f"round {number + 1}: in all {case['total_seconds']['median']:.2f} s, stopwatch {short:.2f} s; step "
                f"{case['step_seconds']['median'] * 1e3:.3f} ms, stopwatch {outside * 1e3:.3f} ms (with evaluations)"
            )
    for name, ratios in (("in all", totals), ("step", steps)):
        print(f"{name}: bench over stopwatch {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
