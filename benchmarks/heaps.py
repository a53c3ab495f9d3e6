"""What the memory settings of a worker are worth: steps of one model under each of them.

    python benchmarks/heaps.py [--models resnet18,wide_convolutions,lenet,gpt10m] [--rounds 7] [--out results.json]

Sides: `shardwise`, a worker as it is (memory kept, in one heap with huge pages); `own heap`, the same in a worker that has the
heap of the thread it is forked from; `plain`, a process with the settings it was born with, as a script has that somebody
writes by hand. Each round starts every side once, in turn; the figure is the ratio of the medians of their steps
to those of `shardwise` in the same round. All compute one thread's training steps, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from models import CASES, Case, wide_convolutions

SIDES = ("shardwise", "own heap", "plain")
_OWN_HEAPS = {"MALLOC_ARENA_MAX": "64"}


def _cases() -> dict[str, Case]:
    return {**CASES, "wide_convolutions": Case("wide_convolutions", wide_convolutions, batch=256, steps=2)}


def _steps(case: Case, seconds: float) -> tuple[float, float]:
    """(median seconds of a step, page faults a step) after three steps that make room."""
    torch.manual_seed(0)
    model = case.model()
    optimizer = case.optimizer(model.parameters())
    inputs, targets = case.data(case.batch)
    times: list[float] = []
    began = faults = 0.0
    while len(times) < 8 or time.perf_counter() - began < seconds:
        if len(times) == 3:
            began, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        optimizer.zero_grad()
        case.loss(model(inputs), targets).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return statistics.median(times[3:]), (after - faults) / (len(times) - 3)


def _child(name: str, side: str, seconds: float) -> None:
    from shardwise.run.apart import call_in_child, in_thread
    from shardwise.run.heap import keep_freed_memory

    case = _cases()[name]
    torch.set_num_threads(1)
    if side == "plain":
        answer = _steps(case, seconds)
    else:

        def work(rank: object) -> tuple[float, float]:
            keep_freed_memory()
            return _steps(case, seconds)

        answer = in_thread(lambda: call_in_child(work, threads=1, device="cpu"))
    print(json.dumps(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,wide_convolutions,lenet,gpt10m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps, a side and round")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        return _child(chosen.child[0], chosen.child[1], chosen.seconds)
    results = {}
    print("seconds of a step, and the ratio of the other sides to shardwise: median [least .. most]")
    for name in chosen.models.split(","):
        seen: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for _ in range(chosen.rounds):
            for side in SIDES:
                words = [sys.executable, __file__, "--child", name, side, "--seconds", str(chosen.seconds)]
                environment = dict(os.environ, **({} if side == "shardwise" else _OWN_HEAPS))
                done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
                seen[side].append(json.loads(done.stdout))
        ours = [seconds for seconds, _ in seen["shardwise"]]
        line = f"{name:17} {statistics.median(ours):.4f} s"
        results[name] = {"seconds": statistics.median(ours), "sides": seen}
        for side in SIDES:
            ratios = sorted(theirs[0] / mine for theirs, mine in zip(seen[side], ours, strict=True))
            faults = statistics.median(pair[1] for pair in seen[side])
            if side != "shardwise":
                line += f"   {side} {statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]"
            line += f" ({faults:.0f} faults)"
        print(line, flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
