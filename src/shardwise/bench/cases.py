"""Which plans a bench measures: those asked for, the one-worker runs they are held against, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from shardwise.bench.result import Scaling
from shardwise.errors import UserError
from shardwise.run.assemble import check_job
from shardwise.run.choose import LEAST_SHARE, accelerators, usable_cores
from shardwise.run.options import TrainOptions, read_plan, resolve_plan
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout, layouts
from shardwise.spec.plan import Plan

PRODUCT = "+"
"""Joins the axes of one plan where commas part plans: `data=2+shard=2`."""


@final
@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A plan to measure.

    Attributes:
        name: unique among the cases of a bench.
        batch_size: of the job under it.
        refused: why it cannot be measured; empty if it can.
    """

    name: str
    plan: Plan
    batch_size: int
    scaling: Scaling = "strong"
    refused: str = ""

    @property
    def threads(self) -> int:
        """Compute threads of each worker."""
        return self.plan.threads or 1

    def units(self, device: str) -> int:
        """Cores or accelerators it uses."""
        return self.plan.layout.workers * (self.threads if device == "cpu" else 1)


@final
@dataclass(frozen=True, kw_only=True)
class Selection:
    """The cases in the order in which they are shown; the first is the baseline.

    Attributes:
        one_unit: the name of the case on one core or accelerator.
    """

    cases: list[Wanted]
    one_unit: str


def parse_plans(texts: Sequence[str]) -> list[Plan]:
    """`("serial,data=2", "data=2+shard=2", "my.toml")` as plans.

    Raises:
        UserError: a text is neither a layout nor a plan file.
    """
    found = []
    for text in texts:
        for part in text.split(","):
            if not part.strip():
                raise UserError(f"--plans {text!r}: a plan is missing between two commas")
            found.append(
                read_plan(part.strip().replace(PRODUCT, ",") if not part.strip().endswith(".toml") else part.strip())
            )
    return found


def select(
    job: Job, plans: Sequence[Plan] | None, *, every: bool, weak: bool, workers: int | None, device: str
) -> Selection:
    """The cases of a bench.

    Args:
        job: what is trained.
        plans: those asked for; None for what `every` says, or a few data-parallel ones.
        every: all layouts of up to `workers` workers.
        weak: also measure each plan with the job's batch for every worker.
        workers: most workers of a layout that is not named; None for the cores or accelerators of this machine.
        device: where they run.

    Raises:
        UserError: the job cannot run on one worker: then there is nothing to compare with.
    """
    most = workers if workers is not None else (usable_cores() if device == "cpu" else accelerators())
    if most < 1:
        raise UserError(f"--workers {most}: at least 1 is needed")
    asked = (
        list(plans)
        if plans is not None
        else [Plan(layout=one) for one in (layouts(most) if every else _few(job, most))]
    )
    baseline = next((plan for plan in asked if plan.layout.workers == 1), Plan())
    first = _settled(job, baseline, device)
    if first.refused:
        raise UserError(f"the job cannot be measured on one worker: {first.refused}")
    found = [first]
    one_unit = first
    if first.units(device) > 1:
        one_unit = _settled(job, replace(baseline, threads=1), device)
        found.append(one_unit)
    for plan in asked:
        one = _settled(job, plan, device)
        if one.name in [other.name for other in found]:
            continue
        found.append(one)
        if weak and plan.layout.workers > 1:
            found.append(_weak(job, one, device))
    return Selection(cases=found, one_unit=one_unit.name)


def _few(job: Job, most: int) -> list[Layout]:
    """One worker, then twice as many each time, up to all; none with so few samples that it cannot pay."""
    counts = {2**power for power in range(most.bit_length()) if 2**power <= most} | {most}
    return [Layout(data=count) for count in sorted(counts) if count == 1 or job.batch_size // count >= LEAST_SHARE]


def _settled(job: Job, plan: Plan, device: str) -> Wanted:
    """The plan as training would run it, or with the reason why it would not."""
    try:
        settled = resolve_plan(job, TrainOptions(plan=plan, device=device), device=device, world=None)
    except UserError as error:
        return Wanted(name=str(plan), plan=plan, batch_size=job.batch_size, refused=str(error))
    settled = replace(settled, reasons=())
    try:
        with torch.random.fork_rng(devices=[]):
            check_job(job, settled, rehearsal=device == "cpu")
    except UserError as error:
        return Wanted(name=str(settled), plan=settled, batch_size=job.batch_size, refused=str(error))
    return Wanted(name=str(settled), plan=settled, batch_size=job.batch_size)


def _weak(job: Job, strong: Wanted, device: str) -> Wanted:
    batch_size = job.batch_size * strong.plan.layout.workers
    name = f"{strong.name} (weak)"
    larger = _settled(replace(job, batch_size=batch_size), strong.plan, device)
    return replace(larger, name=name, batch_size=batch_size, scaling="weak", refused=larger.refused or strong.refused)
