"""`shardwise sweep` against the same sweep written by hand for joblib, Optuna's n_jobs and Ray Tune, in one run.

    python benchmarks/sweep.py digits [--epochs 15] [--rounds 3] [--out results.json]
    python benchmarks/sweep.py cifar10 --data DIR --epochs 1

Whole processes, from the command to its end: what a user waits for. All train the same model at the same learning rates
on the same data, one thread each, as many at once as there are cores. shardwise also keeps a run folder with weights for
each training, and a report; the others keep a number. The sides take turns for some rounds. CPU seconds count all
processes below the command that were waited for, which leaves out the daemons that Ray detaches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RATES = "0.01,0.02,0.03,0.05,0.07,0.1,0.15,0.2"


def _command(side: str, options: argparse.Namespace, out: Path) -> list[str]:
    if side != "shardwise":
        rest = [side, options.job, str(options.data), str(options.epochs), str(options.workers), options.rates]
        return [sys.executable, str(HERE / "sweep_by_hand.py"), *rest]
    data = ["--set", f"data={options.data}"] if options.job == "cifar10" else []
    return [
        str(Path(sys.executable).with_name("shardwise")), "sweep", options.job, "--over", f"lr={options.rates}", *data,
        "--epochs", str(options.epochs), "--workers", str(options.workers), "--plan", "serial", "--out", str(out), "--json",
        "--quiet",
    ]  # fmt: skip


def _accuracies(side: str, text: str) -> dict[float, float]:
    document = json.loads(text)
    if side == "shardwise":
        return {float(trial["settings"]["lr"]): trial["accuracy"] for trial in document["trials"]}
    return {float(lr): value for lr, value in document.items()}


def _cpu_seconds() -> float:
    """Of all children of this process that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["digits", "cifar10"])
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sides = ["shardwise", *(name for name in ("joblib", "optuna", "ray") if importlib.util.find_spec(name))]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "RAY_TRAIN_V2_ENABLED": "0"}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    accuracies: dict[str, dict[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                command = _command(side, options, Path(folder) / f"{side}-{number}")
                began, before = time.perf_counter(), _cpu_seconds()
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                seconds[side].append(time.perf_counter() - began)
                cpu[side].append(_cpu_seconds() - before)
                if done.returncode:
                    raise SystemExit(f"{side} failed:\n{done.stderr}")
                accuracies[side] = _accuracies(
                    side, done.stdout.strip().splitlines()[-1] if side != "shardwise" else done.stdout
                )
                assert len(accuracies[side]) == len(options.rates.split(",")), side
    print(
        f"{options.job}: {len(options.rates.split(','))} trials of {options.epochs} epochs, {options.workers} at a time"
    )
    for side in sides:
        ratios = [theirs / ours for theirs, ours in zip(seconds[side], seconds["shardwise"], strict=True)]
        best = max(accuracies[side].values())
        print(
            f"  {side:10} {statistics.median(seconds[side]):7.2f} s  {statistics.median(ratios):5.2f} of shardwise "
            f"[{min(ratios):.2f} .. {max(ratios):.2f}]  CPU {statistics.median(cpu[side]):.1f} s  best accuracy {best:.4f}"
        )
    if options.out is not None:
        record = {
            "machine": platform.platform(), "job": options.job, "epochs": options.epochs, "workers": options.workers,
            "seconds": seconds, "cpu_seconds": cpu, "accuracies": accuracies,
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
