"""The training loop of one rank: epochs, settlements, evaluations, checkpoints, and the orderly stop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, final

import torch

from shardwise.data.batch import Batch
from shardwise.data.loader import batches, steps_per_epoch
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.errors import CheckpointError, DataError, RunFailed
from shardwise.parallel.replicas import check_replicas
from shardwise.run.assemble import Assembly
from shardwise.run.balance import Balancer
from shardwise.run.checkpoint import save
from shardwise.run.evaluate import evaluate
from shardwise.run.eventlog import EventLog
from shardwise.run.folder import RunFolder
from shardwise.run.ledger import Ledger
from shardwise.run.observe import Observer
from shardwise.run.progress import Display
from shardwise.run.step import take_step
from shardwise.run.trace import Tracer
from shardwise.spec.events import CheckpointEvent, EpochEvent, EvaluationEvent, Event, WarningEvent
from shardwise.spec.observations import BalanceEvent, RanksEvent
from shardwise.units import format_seconds


@final
@dataclass(frozen=True, kw_only=True)
class Saving:
    """When checkpoints are written.

    Attributes:
        every_steps: after each so many optimizer steps; None for never by steps.
        every_seconds: after each so many seconds of training; None for never by time.
        keep_last: older checkpoints are removed.
        at_end: one more after the last step.
        pause_after: end after so many epochs (steps, where the job counts those) with a checkpoint to go on from; the
            job's own length is what schedules see. None for the whole training.
    """

    every_steps: int | None = None
    every_seconds: float | None = 600.0
    keep_last: int = 2
    at_end: bool = True
    pause_after: int | None = None


@final
@dataclass
class Position:
    """Where in the training this rank stands; all ranks agree on it.

    Attributes:
        epoch: passes completed before this one.
        batch: global batches of this epoch already trained on.
        loss_sum: of the losses of this epoch times their samples.
        samples: samples of this epoch already trained on.
    """

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    samples: int = 0


@final
@dataclass
class Course:
    """What `run_loop` needs beside the assembly; log and display do something on rank 0 only.

    Attributes:
        evaluate_every: epochs from one evaluation to the next; 0 for none before the end.
    """

    splits: Splits
    folder: RunFolder
    saving: Saving
    log: EventLog | None
    display: Display
    stop_requested: Callable[[], bool]
    position: Position = field(default_factory=Position)
    evaluate_every: int = 1
    loss: float = float("nan")
    metrics: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    train_seconds: float = 0.0
    stopped: bool = False
    paused: bool = False
    saved_step: int = -1
    evaluated_step: int = -1
    last_save: float = field(default_factory=perf_counter)
    warned_loss: bool = False
    one_clock: bool = True
    tracer: Tracer | None = None
    balancer: Balancer | None = None

    def tell(self, event: Event) -> None:
        """Write an event, on rank 0."""
        if self.log is not None:
            self.log.write(event)


def total_steps(splits: Splits, batch_size: int, *, epochs: int | None, steps: int | None) -> int | None:
    """Optimizer steps of the whole training, None when the data has no known length."""
    if steps is not None:
        return steps
    each = steps_per_epoch(splits.train, batch_size)
    return None if each is None or epochs is None else each * epochs


def run_loop(assembly: Assembly, course: Course) -> None:
    """Train until the job's epochs or steps are done or somebody asks to stop. Collective."""
    a, job = assembly, assembly.job
    ledger = Ledger(
        group=a.world,
        counts_loss=a.counts_loss,
        device=a.device,
        stop_requested=course.stop_requested,
        save_due=lambda: _save_due_by_time(course),
        one_clock=course.one_clock,
    )
    observer = Observer(a, course.tell, course.display.say, balances=course.balancer is not None)
    a.clock.restart()
    while not course.stopped and not _finished(a, course):
        began = perf_counter()
        steps_before = a.step
        ended = _run_epoch(a, course, ledger, observer)
        if ended:
            if a.step == steps_before and course.position.batch == 0:
                raise DataError("the training split gave no batch in a whole epoch: the data is empty")
            _end_epoch(a, course, perf_counter() - began, job.epochs)
            ledger.skip_time()
    if course.tracer is not None:
        course.tracer.settled(a.world, a.step, ledger.offset_seconds, ended=True)
    if not course.stopped and course.evaluated_step != a.step:
        _evaluate(a, course)
    a.average()
    check_replicas(a.model, a.mesh, a.step)
    course.paused = not course.stopped and not _reached(a, course, a.job.steps, a.job.epochs)
    if course.saved_step != a.step and (course.stopped or course.paused or course.saving.at_end):
        _save(a, course)


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
                _settle(a, course, ledger, observer)
            return not course.stopped
        observer.gauge.samples += batch.count
        result = take_step(a, batch)
        position.batch += 1
        ledger.add(result)
        if a.step == 1:
            # A layer that breaks the rules shows after its first update; later checks come with checkpoints.
            if a.composed.local is None:
                check_replicas(a.model, a.mesh, a.step)
            _tell_not_recomputed(a, course)
        by_steps = course.saving.every_steps is not None and a.step % course.saving.every_steps == 0
        last = end_step is not None and a.step >= end_step
        if ledger.due or by_steps or last:
            _settle(a, course, ledger, observer, save_now=by_steps)
            if course.stopped:
                return False
        a.clock.mark("other")
        a.clock.end_step()
        if a.division != division:
            return False


def _tell_not_recomputed(a: Assembly, course: Course) -> None:
    kept = a.composed.recomputed
    if kept is not None and kept.names and not kept.calls:
        warn(course, f"recompute saves nothing: {kept.names[0]} and the other modules of the plan were not called in the "
                     "first step; name others with recompute_modules")  # fmt: skip


def open_epoch(a: Assembly, splits: Splits, *, epoch: int, start: int) -> Generator[Batch, None, None]:
    """This rank's parts of the global batches of an epoch, from batch `start` on: what training and proof walk over."""
    return batches(
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


def prefetch_depth(device: torch.device) -> int:
    """Batches read ahead by a thread: none on CPU, where the thread would take its time from the computation's cores."""
    return 0 if device.type == "cpu" else 2


def next_batch(stream: Iterator[Batch], samples: Group, device: torch.device) -> Batch | None:
    """The next global batch, None at the end of the epoch, which all ranks reach at the same step."""
    batch = next(stream, None)
    if batch is None or not batch.ragged:
        return batch
    # Each rank reads its own part of a stream: only together do they know how much there is.
    total = samples.sum_(torch.tensor(batch.count, dtype=torch.int64, device=device)).item()
    return replace(batch, global_count=int(total)) if total else None


def _settle(a: Assembly, course: Course, ledger: Ledger, observer: Observer, *, save_now: bool = False) -> None:
    settled = ledger.settle()
    steps = len(settled.losses)
    if steps:
        seconds = sum(settled.seconds)
        course.loss = settled.losses[-1]
        samples = sum(settled.samples)
        course.samples += samples
        course.train_seconds += seconds
        course.position.loss_sum += sum(
            loss * count for loss, count in zip(settled.losses, settled.samples, strict=True)
        )
        course.position.samples += samples
        _balance(a, course, observer.settled(settled))
        if course.tracer is not None:
            course.tracer.settled(a.world, a.step, ledger.offset_seconds)
        if not course.warned_loss and any(not abs(loss) < float("inf") for loss in settled.losses):
            course.warned_loss = True
            warn(course, f"the loss became {settled.losses[-1]} by step {a.step}: the training goes on, but lower the "
                         "learning rate or clip the gradients")  # fmt: skip
        course.display.steps(
            step=a.step,
            epoch=course.position.epoch,
            loss=course.loss,
            samples=samples,
            seconds=seconds,
        )
    if settled.stop:
        course.stopped = True
    elif settled.save or save_now:
        a.average()
        check_replicas(a.model, a.mesh, a.step)
        _save(a, course)
        ledger.skip_time()


def _balance(a: Assembly, course: Course, event: RanksEvent) -> None:
    sizes = course.balancer.update(event) if course.balancer is not None else None
    if sizes is None:
        return
    a.division = tuple(float(size) for size in sizes)
    course.tell(BalanceEvent(step=a.step, shares=[size / sum(sizes) for size in sizes], samples=sizes))
    course.display.say("balance: the ranks take " + ", ".join(map(str, sizes)) + " samples of each batch from here")


def _end_epoch(a: Assembly, course: Course, seconds: float, epochs: int | None) -> None:
    position = course.position
    mean = position.loss_sum / position.samples if position.samples else float("nan")
    course.tell(EpochEvent(epoch=position.epoch, step=a.step, seconds=seconds, loss_mean=mean))
    position.epoch += 1
    position.batch, position.loss_sum, position.samples = 0, 0.0, 0
    every = course.evaluate_every
    metrics = _evaluate(a, course) if every and position.epoch % every == 0 else {}
    of_epochs = f"/{epochs}" if epochs is not None else ""
    parts = [f"epoch {position.epoch}{of_epochs}", f"train loss {mean:.4f}"]
    parts += [f"test {name} {value:.4f}" for name, value in metrics.items()]
    course.display.say("  ".join([*parts, f"({format_seconds(seconds)})"]))


def _evaluate(a: Assembly, course: Course) -> dict[str, float]:
    if course.splits.test is None:
        return {}
    began = perf_counter()
    a.clock.current = "evaluation"
    metrics, samples = evaluate(a, course.splits.test)
    course.metrics = metrics
    course.evaluated_step = a.step
    course.tell(
        EvaluationEvent(step=a.step, split="test", metrics=metrics, samples=samples, seconds=perf_counter() - began)
    )
    a.clock.restart()
    return metrics


def _save(a: Assembly, course: Course) -> None:
    began = perf_counter()
    a.clock.current = "checkpoint"
    progress: dict[str, Any] = {
        "step": a.step,
        "position": vars(course.position),
        "metrics": dict(course.metrics),
        "loss": course.loss,
        "division": None if a.division is None else list(a.division),
    }
    if a.composed.compressed is not None:
        progress["compression"] = a.composed.compressed.share_out()
    try:
        path = save(
            course.folder,
            step=a.step,
            model=a.model,
            optimizer=a.optimizer,
            scheduler=a.scheduler,
            progress=progress,
            keep_last=course.saving.keep_last,
        )
    except CheckpointError as error:  # not wrong input: the training was under way
        raise RunFailed(
            f"{error}. The training ended after step {a.step}; --resume goes on from the last complete checkpoint"
        ) from None  # it says all there is to know; what torch gathered from all ranks fills pages
    course.saved_step = a.step
    course.last_save = perf_counter()
    course.tell(
        CheckpointEvent(step=a.step, path=str(path.relative_to(course.folder.path)), seconds=perf_counter() - began)
    )
    a.clock.restart()


def _save_due_by_time(course: Course) -> bool:
    every = course.saving.every_seconds
    return every is not None and perf_counter() - course.last_save >= every


def warn(course: Course, message: str) -> None:
    """Say it and keep it with the run."""
    course.tell(WarningEvent(message=message))
    course.display.say(f"warning: {message}")
