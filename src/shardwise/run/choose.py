"""Which plan to train with when the user names none, and how many threads each worker gets.

`choose_plan` is a rule that measures nothing. This is also the seam at which the planner takes over: whoever stands above
this room (the command line, the package root) may hand a `Chooser` to a training, so that `run` need not know the planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch

from shardwise.errors import PlanError
from shardwise.run.cores import usable_cores as usable_cores  # its place for those that need torch anyway
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

AUTO = "auto"
"""The plan's name where the chooser is to decide."""


class Chooser(Protocol):
    """Decides on a plan for a job on this machine, as `choose_plan` does."""

    def __call__(self, job: Job, *, workers: int | None, threads: int | None, device: str, nodes: int) -> Plan:
        """`workers` and `threads` are None where the user left them open."""
        ...


@final
@dataclass(frozen=True)
class Priced:
    """What one of several trainings on one machine is expected to cost.

    Attributes:
        plan: how it runs.
        step_seconds: of a step, with as many such trainings at once as the cores hold.
        memory_bytes: of its own data, in all its processes.
        confidence: how sure that is, in words.
    """

    plan: Plan
    step_seconds: float
    memory_bytes: int
    confidence: str = ""


class Pricer(Protocol):
    """Prices a training on several numbers of workers, one thread each, for whoever runs many of them."""

    def __call__(self, job: Job, *, widths: Sequence[int], cores: int, trainings: int) -> list[Priced] | str:
        """In the order of the widths, without those that cannot run; or why nothing is priced."""
        ...


LEAST_SHARE = 16
"""Samples per worker below which another worker is not worth its synchronisation (measured on LeNet and small GPTs)."""


def accelerators() -> int:
    """Accelerators (GPUs and their like) of this machine; asking does not initialise them."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def choose_device(device: str) -> str:
    """The device type to compute on: `auto` takes an accelerator where there is one.

    Raises:
        PlanError: the machine has no such device.
    """
    found = torch.accelerator.current_accelerator() if accelerators() else None
    if device == "auto":
        return found.type if found is not None else "cpu"
    if device != "cpu" and (found is None or found.type != device):
        has = found.type if found is not None else "none"
        raise PlanError(f"device {device!r}: the accelerator of this machine is {has}; use --device cpu or auto")
    return device


def choose_plan(job: Job, *, workers: int | None, threads: int | None, device: str, nodes: int = 1) -> Plan:
    """A sensible data-parallel plan for this machine.

    On accelerators one worker each; on CPU one worker a core, with one thread each, because a core that has its own
    samples waits less than cores that share every operation; but no worker with fewer than `LEAST_SHARE` samples. Every node
    gets the same number.
    """
    reasons = []
    if workers is None:
        units = accelerators() if device != "cpu" else usable_cores()
        workers = nodes * max(1, min(units, job.batch_size // LEAST_SHARE // nodes))
        kind = "accelerators" if device != "cpu" else "cores"
        reasons.append(
            f"{units * nodes} {kind}, global batch {job.batch_size}: {workers} "
            f"{'worker' if workers == 1 else 'workers'} of about {job.batch_size // workers} samples"
        )
    plan = Plan(layout=Layout(data=workers), threads=threads, reasons=tuple(reasons))
    return with_threads(plan, nodes=nodes)


def with_threads(plan: Plan, *, nodes: int = 1) -> Plan:
    """The plan with the cores of this machine divided among its local workers, where it names no number of threads."""
    if plan.threads is not None:
        return plan
    local = max(1, plan.layout.workers // nodes)
    return Plan(**{**vars(plan), "threads": max(1, usable_cores() // local)})
