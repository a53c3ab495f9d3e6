"""How good the planner's choice is on this machine: eleven models, every layout of one to four workers measured.

    python benchmarks/regret.py --out benchmarks/results/regret.json
    python benchmarks/regret.py --models lstm,unet --rounds 3

For every model the planner ranks the plans from counted operations and measured rates; then each plan that can run is tried
in processes apart, in rounds, so that all plans see the same disturbances. The regret of a choice is its measured step over
that of the best plan, less 1; the choice is the plan predicted fastest. What trials add is the matter of `trials.py`. Memory is
compared in short real trainings, each in a process of its own.

A trial is a step without the loop around it, so predictions are compared without that part. Errors are told by kind of plan, as
what 4 of 5 plans stay within: `shardwise plan` states ranges (planner/confidence.py).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import LeNet, resnet18
from shardwise.advise.advice import refusals, this_machine
from shardwise.advise.trial import try_plan
from shardwise.data.source import as_splits
from shardwise.errors import Stopped
from shardwise.jobs.charlm import CharGPT
from shardwise.nn.moe import MoE
from shardwise.parallel.compose import READY_AXES
from shardwise.planner.jobsearch import JobProblem, plans_of, price
from shardwise.probe.busy import BUSY_LOAD, others_running
from shardwise.probe.facts import facts_apart
from shardwise.run.choose import usable_cores
from shardwise.run.train import train
from shardwise.spec.job import Job
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Residual(nn.Module):
    """Convolutions with BatchNorm over the global batch, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(F.relu(x + self.two(self.one(x))).mean((2, 3)))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(32, 96, num_layers=2, batch_first=True)
        self.head = nn.Linear(96, 10)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.head(self.cells(x_BTD)[0][:, -1])
        return out


class Recommender(nn.Module):
    """Two tables that are large beside the work on them: their gradients are what travels."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(30_000, 32), nn.Embedding(10_000, 32)
        self.mix = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, ids_B2: Tensor) -> Tensor:
        out: Tensor = self.mix(torch.cat([self.users(ids_B2[:, 0]), self.items(ids_B2[:, 1])], 1))
        return out


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.out = nn.Conv2d(32, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.middle(F.relu(self.down2(F.max_pool2d(one, 2)))))
        out: Tensor = self.out(torch.cat([one, self.up(two)], 1)).mean((2, 3))
        return out


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(32, 64)
        self.mixture = MoE(64, 256, experts=8, top_k=2, balance=0)
        self.head = nn.Linear(64, 10)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = F.relu(self.enter(x_BTD))
        out: Tensor = self.head((x + self.mixture(x)).mean(1))
        return out


def _job(name: str, model: Callable[[], nn.Module], inputs: Tensor, batch_size: int, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "name": name,
        "model": model,
        "data": (inputs, torch.arange(len(inputs)) % 10),
        "loss": F.cross_entropy,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        "batch_size": batch_size,
        "steps": 4,
    }
    return Job(**{**values, **changes})


def _images(count: int = 256, edge: int = 32) -> Tensor:
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(0))


def _sequences(count: int, length: int, width: int) -> Tensor:
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(0))


def _perceptron(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def _attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(32, 64), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(64 * 16, 10))


def _gpt() -> Job:
    ids = torch.randint(0, 65, (256, 65), generator=torch.Generator().manual_seed(0))

    def loss(scores_BTV: Tensor, target_BT: Tensor) -> Tensor:
        return F.cross_entropy(scores_BTV.flatten(0, 1), target_BT.flatten())

    return _job("gpt", lambda: CharGPT(65, 64, 96, 3, 4), ids[:, :-1].contiguous(), 16,
                data=(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), loss=loss)  # fmt: skip


MODELS: dict[str, Callable[[], Job]] = {
    "lenet": lambda: _job("lenet", LeNet, _images(), 64),
    "residual": lambda: _job("residual", Residual, _images(), 32),
    "resnet18": lambda: _job("resnet18", resnet18, _images(64), 8),
    "unet": lambda: _job("unet", UNet, _images(128), 16),
    "gpt": _gpt,
    "encoder": lambda: _job("encoder", _attention, _sequences(256, 16, 32), 32),
    "lstm": lambda: _job("lstm", Recurrent, _sequences(256, 24, 32), 32),
    "mixture": lambda: _job("mixture", Mixture, _sequences(256, 16, 32), 32),
    "recommender": lambda: _job("recommender", Recommender, torch.randint(0, 10_000, (1024, 2)), 128),
    "small_mlp": lambda: _job("small_mlp", _perceptron(32), _sequences(512, 1, 32).squeeze(1), 32),
    "wide_mlp": lambda: _job("wide_mlp", _perceptron(1500), _sequences(512, 1, 32).squeeze(1), 64),
}


def _wait_for_quiet(patience: float) -> float:
    """Wait until other programs leave the cores, at most `patience` seconds; how many still want one then."""
    ends = time.monotonic() + patience
    while (others := others_running()) > BUSY_LOAD * usable_cores() and time.monotonic() < ends:
        time.sleep(0.5)
    return others


def measure(name: str, machine: Machine, rounds: int, seconds: float, patience: float) -> dict[str, Any]:
    """Predictions and measurements of every plan of one model."""
    job = MODELS[name]()
    splits = as_splits(job.data)
    _wait_for_quiet(patience)
    facts = facts_apart(job, splits)
    axes = tuple(axis for axis in READY_AXES if axis != "expert" or facts.expert_bytes)
    problem = JobProblem(facts=facts, machine=machine, workers=4, axes=axes)
    plans = [plan for plan in plans_of(problem) if _measured_kind(plan)]
    allowed = [plan for plan, reason in zip(plans, refusals(job, plans), strict=True) if reason is None]
    priced = sorted((price(problem, plan) for plan in allowed), key=lambda one: one.estimate.step_seconds)
    times: list[list[float | None]] = [[] for _ in priced]
    load = []
    for _ in range(rounds):
        for index, item in enumerate(priced):
            load.append(_wait_for_quiet(patience))
            seen = try_plan(job, splits, item.plan, step_budget_seconds=seconds)
            times[index].append(None if seen.failure else seen.step_seconds)
    rows = [
        {
            "plan": str(item.plan),
            "kind": item.estimate.kind,
            "predicted_seconds": item.estimate.step_seconds - item.estimate.seconds["loop"],
            "parts": {name: value for name, value in item.estimate.seconds.items() if value > 0},
            "measured_seconds": seen,
        }
        for item, seen in zip(priced, times, strict=True)
    ]
    return {"model": name, "seen": [vars(one) for one in facts.seen], "others_running": load, "plans": rows}


def _measured_kind(plan: Plan) -> bool:
    """All of one axis and one product of two: more layouts would say little more and take much longer."""
    degrees = [degree for degree in plan.layout.degrees.values() if degree > 1]
    alone = plan.layout.data in (1, plan.layout.workers)
    return len(degrees) <= 1 and (alone or plan.layout.data == 1) and (plan.layout.data > 1 or plan.layout.workers <= 2)


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """Regret of the choice, and errors; plans that failed in a round are out."""
    rows = [row for row in result["plans"] if None not in row["measured_seconds"]]
    whole = {row["plan"]: min(row["measured_seconds"]) for row in rows}
    best = min(whole, key=lambda plan: whole[plan])
    by_prediction = min(rows, key=lambda row: row["predicted_seconds"])["plan"]
    return {
        "model": result["model"],
        "best": best,
        "by_prediction": by_prediction,
        "prediction_regret": whole[by_prediction] / whole[best] - 1,
        "step_error": median(errors_of(result).values()),
        "best_error": errors_of(result)[best],
    }


def errors_of(result: dict[str, Any]) -> dict[str, float]:
    """Plan -> how far the prediction is from the fastest measured step, of the measured one."""
    rows = [row for row in result["plans"] if None not in row["measured_seconds"]]
    return {row["plan"]: abs(row["predicted_seconds"] / min(row["measured_seconds"]) - 1) for row in rows}


def within(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Kind of plan -> how many there were, their median error, and what 4 of 5 stay within."""
    errors: dict[str, list[float]] = {}
    for result in results:
        kinds = {row["plan"]: row["kind"] for row in result["plans"]}
        for plan, error in errors_of(result).items():
            errors.setdefault(kinds[plan], []).append(error)
    return {
        kind: {
            "plans": len(found),
            "median": median(found),
            "four_of_five": sorted(found)[min(len(found) - 1, round(0.8 * len(found)))],
        }
        for kind, found in sorted(errors.items())
    }


def compare_memory(name: str, layout: str) -> dict[str, Any]:
    """Predicted and measured peak of a short training, to be called in a process of its own."""
    job = MODELS[name]()
    splits = as_splits(job.data)
    facts = facts_apart(job, splits)
    plan = Plan.from_dict({"layout": layout, "threads": 1})
    problem = JobProblem(facts=facts, machine=this_machine(lambda text: None), workers=4)
    predicted = price(problem, plan).estimate.memory_bytes
    with tempfile.TemporaryDirectory() as folder:
        run = train(job, plan=plan, out=Path(folder) / "run", progress=False)
    peak = max(rank["peak_memory_bytes"] for rank in run.summary["ranks"])
    return {"model": name, "plan": layout, "predicted_bytes": predicted, "measured_bytes": peak}


def memory_apart(name: str, layout: str) -> dict[str, Any]:
    """`compare_memory` in a fresh process, which ends with this one."""
    command = [sys.executable, __file__, "--memory-of", name, layout]
    ends_with_us = functools.partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGTERM)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, preexec_fn=ends_with_us)
    if done.returncode:
        return {"model": name, "plan": layout, "failure": done.stderr.strip().splitlines()[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Measure, judge, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.4, help="timed steps of one trial")
    parser.add_argument("--patience", type=float, default=8.0, help="seconds to wait for quiet before a trial")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "LAYOUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(compare_memory(*options.memory_of)))
        return
    machine = this_machine(lambda text: print(text, file=sys.stderr))
    results, judged, memory = [], [], []
    for name in options.models.split(","):
        results.append(measure(name, machine, options.rounds, options.seconds, options.patience))
        judged.append(judge(results[-1]))
        one = judged[-1]
        print(
            f"{name:12} best {one['best']:22} prediction {one['by_prediction']:22} regret {one['prediction_regret']:6.1%}  "
            f"step error {one['step_error']:.0%}",
            flush=True,
        )
        memory += [memory_apart(name, layout) for layout in ("serial", "data=2")]
        if options.out is not None:  # what was measured so far is not lost with what comes
            options.out.write_text(json.dumps({"judged": judged, "results": results}) + "\n", encoding="utf-8")
    for m in memory:
        if "failure" in m:
            print(f"memory of {m['model']} {m['plan']}: {m['failure']}")
    errors = [abs(m["predicted_bytes"] / m["measured_bytes"] - 1) for m in memory if "failure" not in m]
    summary = {
        "prediction_regret_median": median(one["prediction_regret"] for one in judged),
        "prediction_regret_mean": mean(one["prediction_regret"] for one in judged),
        "step_error_median": median(one["step_error"] for one in judged),
        "step_error_mean": mean(one["step_error"] for one in judged),
        "best_error_median": median(one["best_error"] for one in judged),
        "step_error_by_kind": within(results),
        "memory_error_median": median(errors) if errors else None,
        "memory_error_mean": mean(errors) if errors else None,
        "memory_error_max": max(errors, default=None),
        "others_running_mean": mean(load for one in results for load in one["others_running"]),
    }
    print(json.dumps(summary, indent=2))
    if options.out is not None:
        document = {"cores": os.cpu_count(), "torch": torch.__version__, "rounds": options.rounds, "summary": summary,
                    "judged": judged, "memory": memory, "results": results}  # fmt: skip
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except Stopped as stop:
        sys.exit(f"regret.py: {stop}")
