"""Do the numbers of `shardwise bench` agree with a stopwatch outside of it?

Starts a bench, and meanwhile looks from this process at what its run writes, with this process's own clock: when lines on steps
appear, and when the run's folder and answer do. Both clocks look at the same run, so a busy machine disturbs neither side more.

    python benchmarks/stopwatch.py [--plan data=2] [--steps 300] [--rounds 5]

The job must take no evaluation within the steps: charlm has some 900 steps an epoch.
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

from shardwise.spec.events import EventReader, StepsEvent

COMMAND = [sys.executable, "-m", "shardwise.cli.main"]


def one_round(job: str, plan: str, steps: int, out: Path) -> tuple[float, float, float, float]:
    """Seconds of a step and of the whole run: by the bench, by this clock, each."""
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
        str(out),
    ]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE)
    runs = out / "runs" / "round-1"
    seen: list[tuple[int, float]] = []
    began = ended = 0.0
    readers: dict[Path, EventReader] = {}
    while process.poll() is None:
        now = time.perf_counter()
        for log in runs.glob(f"{plan}-*.log"):  # made just before the run is started
            began = began or now
            folder = log.with_suffix("")
            reader = readers.setdefault(folder, EventReader(folder / "events.jsonl"))
            seen += [
                (event.first_step + len(event.losses), now) for event in reader.poll() if isinstance(event, StepsEvent)
            ]
            if not ended and log.with_suffix(".answer.json").exists():
                ended = now
        time.sleep(0.001)
    assert process.stdout is not None
    cases = json.loads(process.stdout.read())["cases"]
    case = next(case for case in cases if case["plan"]["layout"] == plan)
    steady = [(step, at) for step, at in seen if step >= 20]
    (first, at_first), (last, at_last) = steady[0], steady[-1]
    outside = (at_last - at_first) / (last - first)
    return case["step_seconds"]["median"], outside, case["total_seconds"]["median"], ended - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="charlm")
    parser.add_argument("--plan", default="data=2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    steps, totals = [], []
    with tempfile.TemporaryDirectory() as place:
        for number in range(given.rounds):
            step, outside, total, watched = one_round(given.job, given.plan, given.steps, Path(place) / str(number))
            steps.append(step / outside)
            totals.append(total / watched)
            print(
                f"round {number + 1}: step {step * 1e3:.3f} ms, stopwatch {outside * 1e3:.3f} ms; in all {total:.2f} s, "
                f"stopwatch {watched:.2f} s",
                flush=True,
            )
    for name, ratios in (("step", steps), ("in all", totals)):
        print(f"{name}: bench over stopwatch {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
