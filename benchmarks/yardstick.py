"""How far rounding carries: distances of honest float32 runs from float64, in units of the serial float32 distance.

For each case, seed and plan: the serial runs and the candidate of a proof, and for every tensor the ratio of the candidate's
distance to the larger of the serial distance and the floor, as `shardwise prove` forms it. Every fourth column shows the same
ratio for another serial float32 run (samples in another order) in the place of the candidate: what chance alone does.
`docs/proof.md` quotes the result.

    python benchmarks/yardstick.py --seeds 10
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from shardwise.errors import PlanError
from shardwise.jobs.charlm import charlm
from shardwise.jobs.digits import digits
from shardwise.prove.compare import MULTIPLE, Yardstick, compare
from shardwise.prove.execute import measure, refuse, run_candidate
from shardwise.prove.proof import make_setting
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Comparison


def small_jobs() -> ModuleType:
    """The jobs of the proof's own tests."""
    path = Path(__file__).resolve().parent.parent / "tests" / "prove" / "conftest.py"
    spec = importlib.util.spec_from_file_location("small_jobs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> dict[str, Callable[[], Job]]:
    """Name -> job."""
    make: Callable[..., Job] = small_jobs().make_job
    adam: Any = lambda params: torch.optim.AdamW(params, lr=0.01)  # noqa: E731
    return {
        "mlp": lambda: make("mlp"),
        "mlp clip adamw": lambda: make("mlp", clip_norm=0.1, optimizer=adam),
        "mlp micro_batch": lambda: make("mlp", micro_batch=2, clip_norm=0.1),
        "conv": lambda: make("conv", clip_norm=0.3),
        "conv adamw": lambda: make("conv", optimizer=adam),
        "gpt": lambda: make("gpt"),
        "gpt micro_batch": lambda: make("gpt", micro_batch=2, clip_norm=0.3),
        "bag": lambda: make("bag"),
        "digits": digits,
        "charlm": charlm,
    }


def ratios(found: list[Comparison]) -> Iterator[tuple[float, Comparison]]:
    """Distance over serial distance or floor, of everything that is rounded."""
    for item in found:
        if item.allowance > 0:
            yield item.distance / item.allowance * MULTIPLE, item


def main() -> None:
    """Print the distribution for each case and for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--plans", default="data=2 data=3 data=5 data=2,shard=2", help="layouts, with spaces between")
    parser.add_argument("--case")
    options = parser.parse_args()
    plans = [Layout.parse(text) for text in options.plans.split()]
    every: list[tuple[float, str]] = []
    chance: list[float] = []
    print(f"{'case':<18}{'ratios':>8}{'median':>8}{'99 %':>8}{'99.9 %':>8}{'max':>8}   furthest")
    for name, make in cases().items():
        if options.case and options.case != name:
            continue
        own: list[tuple[float, str]] = []
        for seed in range(options.seeds):
            job = replace(make(), seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                setting = make_setting(job, Path(folder), steps=3)
                plan = Plan(threads=1, micro_batch=job.micro_batch)
                yardstick, _ = measure(setting, plan.with_layout(plans[0]))
                for layout in plans:
                    candidate = plan.with_layout(layout)
                    try:
                        refuse(job, candidate)
                    except PlanError:
                        continue
                    record = run_candidate(setting, candidate)
                    for ratio, item in ratios(compare(record, yardstick)):
                        own.append((ratio, f"{item.kind} {item.name} (seed {seed}, {layout})"))
                *others, last = yardstick.serial
                chance += [ratio for ratio, _ in ratios(compare(last, Yardstick(yardstick.exact, others)))]
        show(name, [ratio for ratio, _ in own], max(own)[1])
        every += own
    show("all", [ratio for ratio, _ in every], max(every)[1])
    show("serial, by chance", chance, "")


def show(name: str, values: list[float], furthest: str) -> None:
    """One line of the table."""
    tensor = torch.tensor(values, dtype=torch.float64)
    quantiles = [float(torch.quantile(tensor, q)) for q in (0.5, 0.99, 0.999, 1.0)]
    columns = "".join(f"{value:>8.2f}" for value in quantiles)
    print(f"{name:<18}{len(values):>8}{columns}   {furthest}", flush=True)


if __name__ == "__main__":
    main()
