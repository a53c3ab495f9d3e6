"""Trying a plan for a few steps in processes that end with it: measured beats predicted.

A trial builds the model from the job's seed, walks over the first batches and throws everything away. Nothing of it reaches
the run: not its weights, its random numbers or its memory. A trial that fails, also for want of memory, is an answer.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardwise.data.batch import Batch
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.errors import RunFailed, ShardwiseError, Stopped
from shardwise.probe.busy import OTHERS_SHARE, cores_busy_seconds, others_cores
from shardwise.run.alike import next_batch
from shardwise.run.apart import call_in_child, fall_first, in_thread
from shardwise.run.assemble import Assembly, assemble
from shardwise.run.choose import usable_cores
from shardwise.run.gauge import peak_memory_bytes
from shardwise.run.launch import Nodes, launch
from shardwise.run.loop import open_epoch, total_steps
from shardwise.run.step import take_step
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank

WARM_STEPS = 2
"""Steps before the clock starts: first calls choose kernels, make optimizer states and fill caches."""

LEAST_STEPS, MOST_STEPS = 3, 200

_TIMEOUT_SECONDS = 30.0

LONGEST_SECONDS = 60.0
"""A trial that takes longer is ended: it hangs, or is so far off its prediction that no more of it needs to be seen."""


@dataclass(frozen=True)
class Tried:
    """What a trial saw.

    Attributes:
        step_seconds: first quartile of the timed steps of the slowest rank: other programs only ever make a step slower.
        fastest_seconds: the fastest of them, which other programs on the machine disturbed least.
        memory_bytes: peak of the largest rank.
        steps: timed steps.
        seconds: what the whole trial took.
        failure: why it ended early; the other figures are 0 then.
        mean_seconds: mean of the timed steps, for plans whose steps differ.
        others_cores: cores that other programs kept busy meanwhile, on average; 0 where the system does not say.
    """

    plan: Plan
    step_seconds: float = 0.0
    fastest_seconds: float = 0.0
    memory_bytes: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    failure: str | None = None
    mean_seconds: float = 0.0
    others_cores: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much of the cores that the figures are theirs, too."""
        return self.others_cores > OTHERS_SHARE * usable_cores()


def try_plan(
    job: Job,
    splits: Splits,
    plan: Plan,
    *,
    device: str = "cpu",
    step_budget_seconds: float = 0.5,
    limit_seconds: float = LONGEST_SECONDS,
    nodes: Nodes | None = None,
) -> Tried:
    """Run `plan` for as many steps as fit in about `step_budget_seconds`, at least three, and throw the result away.

    Args:
        job: what to train.
        splits: its data, read already.
        plan: a plan that `check_job` accepts, with its threads settled.
        device: type of device.
        step_budget_seconds: for the timed steps; start-up and two steps to warm up come on top.
        limit_seconds: the trial is ended where it takes longer in all, which is an answer.
        nodes: machines to spread it over; each of them calls this with the same arguments.

    Raises:
        Stopped: a signal asked the command to stop.
    """
    work = functools.partial(
        _try, job=job, splits=splits, plan=plan, device=device, budget=step_budget_seconds, limit=limit_seconds
    )
    threads, workers = plan.threads or 1, plan.layout.workers
    silent: Callable[[str], None] = lambda text: None  # noqa: E731
    began = time.perf_counter()
    signals: list[int] = []
    failure = None
    try:
        if workers == 1 and (nodes is None or nodes.count == 1):
            figures = in_thread(lambda: call_in_child(work, threads=threads, device=device))
        else:
            figures = launch(
                work,
                workers=workers,
                threads=threads,
                device=device,
                nodes=nodes,
                report=silent,
                grace_seconds=1.0,
                signals=signals,
            )
    except (ShardwiseError, MemoryError) as error:
        failure = _reason(error)
    took = time.perf_counter() - began
    if signals:  # they are about the command, however the trial ended
        raise Stopped("stopped while plans were tried; the training had not started")
    if failure is not None:
        return Tried(
            plan, seconds=took, failure=f"it was ended after {limit_seconds:g} s" if took >= limit_seconds else failure
        )
    return replace(figures, plan=plan, seconds=took)


def _try(rank: Rank, *, job: Job, splits: Splits, plan: Plan, device: str, budget: float, limit: float) -> Tried:
    # The system ends this process, whatever it waits for.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limit)
    fall_first()
    place = torch.device(device, rank.local_rank) if device != "cpu" else torch.device("cpu")
    with process_group(rank, device, _TIMEOUT_SECONDS):
        world = Group.world()
        total = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
        assembly = assemble(job, plan, world, place, total_steps=total, timeout_seconds=_TIMEOUT_SECONDS)
        walk = _Walk(assembly, splits)
        for _ in range(WARM_STEPS - 1):
            walk.step()
        once = max(world.gather_objects(walk.step()))
        steps = max(LEAST_STEPS, min(MOST_STEPS, round(budget / max(once, 1e-5))))
        world.barrier()
        began, own, busy = time.perf_counter(), time.process_time(), cores_busy_seconds()
        times = [walk.step() for _ in range(steps)]
        own = sum(world.gather_objects(time.process_time() - own if rank.node == 0 else 0.0))
        others = others_cores(busy, own, time.perf_counter() - began)
        figures = (sorted(times)[len(times) // 4], min(times), float(peak_memory_bytes(place)))
        slowest, fastest, memory = (max(values) for values in zip(*world.gather_objects(figures), strict=True))
        mean = max(world.gather_objects(sum(times) / len(times)))
        walk.close()
        return Tried(
            Plan(), slowest, fastest, memory, steps, mean_seconds=mean, others_cores=world.gather_objects(others)[0]
        )


class _Walk:
    """Steps over the first batches, again and again."""

    def __init__(self, assembly: Assembly, splits: Splits) -> None:
        self._assembly, self._splits = assembly, splits
        self._stream: Any = None
        self._epoch = 0

    def step(self) -> float:
        """Read a batch and take a step; its seconds. Collective."""
        began = time.perf_counter()
        result = take_step(self._assembly, self._next())
        if self._assembly.device.type != "cpu":
            result.loss_sum.item()  # waits for the device
        return time.perf_counter() - began

    def close(self) -> None:
        """End what reads ahead."""
        if self._stream is not None:
            self._stream.close()

    def _next(self) -> Batch:
        for _ in range(2):
            if self._stream is None:
                self._stream = open_epoch(self._assembly, self._splits, epoch=self._epoch, start=0)
            batch = next_batch(self._stream, self._assembly.samples, self._assembly.device)
            if batch is not None:
                return batch
            self.close()
            self._stream = None
            self._epoch += 1
        raise RunFailed("the training data has no samples")


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
