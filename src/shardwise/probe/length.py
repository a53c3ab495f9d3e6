"""How long a step takes, roughly: the least that must be known before anything is planned, and cheap to learn."""

from __future__ import annotations

import functools
import time
from contextlib import closing

import torch

from shardwise.data.batch import Batch
from shardwise.data.loader import eval_batches
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.run.apart import call_in_child, in_thread
from shardwise.run.assemble import assemble
from shardwise.run.step import take_step
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank

_CPU = torch.device("cpu")


def first_step_apart(job: Job, splits: Splits) -> float:
    """Seconds of a serial step of the whole batch, roughly, from the second of two steps of a quarter of it; in a process
    apart.

    Raises:
        ShardwiseError: the job itself fails.
    """
    work = functools.partial(_first_step, job=job, splits=splits)
    return in_thread(lambda: call_in_child(work, threads=1, device="cpu", timeout_seconds=60.0))


def _first_step(rank: Rank, *, job: Job, splits: Splits) -> float:
    assembly = assemble(job, serial_plan(job), Group(), _CPU, total_steps=None)
    batch = first_samples(splits, -(-job.batch_size // 4))
    took = []
    for _ in range(2):
        began = time.perf_counter()
        take_step(assembly, batch)
        took.append(time.perf_counter() - began)
    return min(took) * job.batch_size / batch.count


def first_samples(splits: Splits, size: int) -> Batch:
    """The first `size` training samples, fewer where there are no more."""
    with closing(eval_batches(splits.train, batch_size=size, stop=1, prefetch=0)) as stream:
        return next(stream)


def serial_plan(job: Job) -> Plan:
    """One worker that walks through its whole batch at once: compilation would hide the operations."""
    return Plan(precision=job.precision, threads=1)
