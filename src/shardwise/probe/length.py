"""How long a step takes, roughly: the least that must be known before anything is planned, and cheap to learn."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from shardwise.data.batch import Batch
from shardwise.data.loader import eval_batches
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.run.apart import call_in_child, fall_first, in_thread
from shardwise.run.assemble import assemble
from shardwise.run.progress import tell
from shardwise.run.step import take_step
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank

_CPU = torch.device("cpu")

SMALL_SECONDS = 0.01
"""A quarter of a step that takes less says little of the whole: much of it is the same for any number of samples."""

MOST_STEPS = 10

LONGEST_SECONDS = 60.0
"""A first step that takes longer tells nothing in time."""


def first_step_apart(job: Job, splits: Splits) -> float:
    """Seconds of a serial step of the whole batch, roughly; in a process apart.

    The faster of two steps of a quarter of it, times four; of small ones, the fastest of a few whole steps.

    Raises:
        ShardwiseError: the job itself fails.
    """
    work = functools.partial(_first_step, job=job, splits=splits)
    return in_thread(lambda: call_in_child(work, threads=1, device="cpu", timeout_seconds=LONGEST_SECONDS))


@contextmanager
def told_if_slow(show: bool, seconds: float = 5.0) -> Iterator[None]:
    """Says what is waited for where the first step takes long: it is timed before anything else is said."""
    text = f"timing the first step of the job, to plan with; it takes long: {LONGEST_SECONDS:g} s are waited at most"
    timer = threading.Timer(seconds, tell, (text,))
    timer.daemon = True
    if show:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _first_step(rank: Rank, *, job: Job, splits: Splits) -> float:
    fall_first()
    assembly = assemble(job, serial_plan(job), Group(), _CPU, total_steps=None)

    def fastest(samples: int) -> float:
        batch = first_samples(splits, samples)
        took: list[float] = []
        while len(took) < 2 or (
            len(took) < MOST_STEPS and sum(took) < SMALL_SECONDS
        ):  # the first one pays for what is new
            began = time.perf_counter()
            take_step(assembly, batch)
            took.append(time.perf_counter() - began)
        return min(took) * samples / batch.count

    quarter = fastest(-(-job.batch_size // 4))
    return fastest(job.batch_size) if quarter < SMALL_SECONDS else quarter * job.batch_size / -(-job.batch_size // 4)


def first_samples(splits: Splits, size: int) -> Batch:
    """The first `size` training samples, fewer where there are no more."""
    with closing(eval_batches(splits.train, batch_size=size, stop=1, prefetch=0)) as stream:
        return next(stream)


def serial_plan(job: Job) -> Plan:
    """One worker that walks through its whole batch at once: compilation would hide the operations."""
    return Plan(precision=job.precision, threads=1)
