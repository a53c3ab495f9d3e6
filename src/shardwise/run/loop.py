"""The training loop of one rank: epochs, their batches, and the orderly stop."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from time import perf_counter

import torch

from shardwise.data.batch import Batch
from shardwise.data.loader import batches, steps_per_epoch
from shardwise.data.source import Splits
from shardwise.errors import DataError
from shardwise.run.alike import alike, next_batch
from shardwise.run.assemble import Assembly
from shardwise.run.course import (
    Course,
    end_epoch,
    evaluate_test,
    make_equal,
    note_step,
    open_books,
    save_checkpoint,
    settle,
)
from shardwise.run.ledger import Ledger
from shardwise.run.observe import Observer
from shardwise.run.step import take_step
from shardwise.units import format_seconds


def total_steps(splits: Splits, batch_size: int, *, epochs: int | None, steps: int | None) -> int | None:
    """Optimizer steps of the whole training, None when the data has no known length."""
    if steps is not None:
        return steps
    each = steps_per_epoch(splits.train, batch_size)
    return None if each is None or epochs is None else each * epochs


def run_loop(assembly: Assembly, course: Course) -> None:
    """Train until the job's epochs or steps are done or somebody asks to stop. Collective."""
    a = assembly
    ledger, observer = open_books(a, course)
    a.clock.restart()
    while not course.stopped and not _finished(a, course):
        began = perf_counter()
        steps_before = a.step
        ended = _run_epoch(a, course, ledger, observer)
        if ended:
            if a.step == steps_before and course.position.batch == 0:
                raise DataError("the training split gave no batch in a whole epoch: the data is empty")
            seconds = perf_counter() - began
            _look_back(a, course, end_epoch(a, course, seconds), seconds)
            ledger.skip_time()
    if course.tracer is not None:
        course.tracer.settled(a.world, a.step, ledger.offset_seconds, ended=True)
    if not course.stopped and course.evaluated_step != a.step:
        evaluate_test(a, course)
    make_equal(a)
    course.paused = not course.stopped and not _reached(a, course, a.job.steps, a.job.epochs)
    if course.saved_step != a.step and (course.stopped or course.paused or course.saving.at_end):
        save_checkpoint(a, course)


def _finished(a: Assembly, course: Course) -> bool:
    return _reached(a, course, _end_step(a, course), _sooner(a.job.epochs, course.saving.pause_after))


def _reached(a: Assembly, course: Course, steps: int | None, epochs: int | None) -> bool:
    if steps is not None:
        return a.step >= steps
    return epochs is not None and course.position.epoch >= epochs


def _end_step(a: Assembly, course: Course) -> int | None:
    return _sooner(a.job.steps, course.saving.pause_after)


def _sooner(end: int | None, pause: int | None) -> int | None:
    return end if end is None or pause is None else min(end, pause)


def _run_epoch(a: Assembly, course: Course, ledger: Ledger, observer: Observer) -> bool:
    """Train to the end of the epoch, of the steps, or to a stop. Returns whether the epoch was completed."""
    while True:
        position, division = course.position, a.division
        with closing(open_epoch(a, course.splits, epoch=position.epoch, start=position.batch)) as stream:
            completed = _run_batches(a, course, ledger, observer, stream)
        if completed or a.division == division:
            return completed
        # The batches that were read ahead are of the old division: the same epoch goes on with others from here.


def _run_batches(a: Assembly, course: Course, ledger: Ledger, observer: Observer, stream: Iterator[Batch]) -> bool:
    """As `_run_epoch`, or until the global batch is divided anew."""
    position, end_step, division = course.position, _end_step(a, course), a.division
    while True:
        if end_step is not None and a.step >= end_step:
            return False
        a.clock.begin_step(a.step)
        batch = next_batch(stream, a.samples, a.device)
        a.clock.mark("data")
        if batch is None:
            if ledger.settle_pending:
                settle(a, course, ledger, observer)
            return not course.stopped
        result = take_step(a, batch)
        position.batch, position.batches = position.batch + 1, position.batches + 1
        note_step(a, course, ledger, observer, batch, result, last=end_step is not None and a.step >= end_step)
        if course.stopped or a.division != division:
            return False


def open_epoch(a: Assembly, splits: Splits, *, epoch: int, start: int) -> Generator[Batch, None, None]:
    """This rank's parts of the global batches of an epoch, from batch `start` on: what training and proof walk over."""
    stream = batches(
        splits.train,
        batch_size=a.job.batch_size,
        seed=a.job.seed,
        epoch=epoch,
        rank=a.samples.rank,
        ranks=a.samples.size,
        start=start,
        shuffle=a.job.shuffle,
        shares=a.division,
        prefetch=prefetch_depth(a.device),
    )
    return alike(stream, splits.train, a.world, a.samples, a.device)


def prefetch_depth(device: torch.device) -> int:
    """Batches read ahead by a thread: none on CPU, where the thread would take its time from the computation's cores."""
    return 0 if device.type == "cpu" else 2


def _look_back(a: Assembly, course: Course, mean: float, seconds: float) -> None:
    """Evaluate where the epoch that ended asks for it, and show how it went."""
    epoch, epochs, every = course.position.epoch, a.job.epochs, course.evaluate_every
    metrics = evaluate_test(a, course) if every and epoch % every == 0 else {}
    of_epochs = f"/{epochs}" if epochs is not None else ""
    parts = [f"epoch {epoch}{of_epochs}", f"train loss {mean:.4f}"]
    parts += [f"test {name} {value:.4f}" for name, value in metrics.items()]
    course.display.say("  ".join([*parts, f"({format_seconds(seconds)})"]))
