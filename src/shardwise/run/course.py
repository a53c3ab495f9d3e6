"""Course: where a training stands, and what is noted of it: settlements, evaluations, checkpoints, the ends of epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, final

import torch

from shardwise.data.batch import Batch
from shardwise.data.loader import steps_per_epoch
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.errors import CheckpointError, RunFailed
from shardwise.parallel.replicas import check_replicas
from shardwise.run.assemble import Assembly
from shardwise.run.balance import Balancer
from shardwise.run.checkpoint import save
from shardwise.run.culprit import not_finite
from shardwise.run.encoding import encode
from shardwise.run.evaluate import evaluate
from shardwise.run.eventlog import EventLog
from shardwise.run.folder import RunFolder
from shardwise.run.ledger import Ledger, Settlement
from shardwise.run.observe import Observer
from shardwise.run.progress import Display
from shardwise.run.state import extra_state_sums
from shardwise.run.step import StepResult
from shardwise.run.trace import Tracer
from shardwise.spec.events import CheckpointEvent, EpochEvent, EvaluationEvent, Event, WarningEvent
from shardwise.spec.observations import BalanceEvent, RanksEvent


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
        batches: global batches trained on in all, of epochs and of those that a loop made, each once.
        loss_sum: of the losses of this epoch times their samples.
        samples: samples of this epoch already trained on.
        rounds: rounds that are over, of a loop that makes its own data.
    """

    epoch: int = 0
    batch: int = 0
    batches: int = 0
    loss_sum: float = 0.0
    samples: int = 0
    rounds: int = 0


@final
@dataclass
class Course:
    """What `run_loop` needs beside the assembly; log and display do something on rank 0 only.

    Attributes:
        evaluate_every: epochs from one evaluation to the next; 0 for none before the end.
        state: the user's own plain values that go into checkpoints.
        own_state: the same of this rank alone.
        losses: of a loop with several objectives, the mean loss that each last had.
        saves_between: checkpoints wait for the end of the batch that is under way: a loop may take several steps on it, and do
            something of its own after them.
        save_due: one waits.
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
    state: dict[str, Any] = field(default_factory=dict)
    own_state: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    train_seconds: float = 0.0
    stopped: bool = False
    paused: bool = False
    saved_step: int = -1
    saves_between: bool = False
    save_due: bool = False
    evaluated_step: int = -1
    last_save: float = field(default_factory=perf_counter)
    warned_loss: bool = False
    warned_extra: bool = False
    one_clock: bool = True
    tracer: Tracer | None = None
    balancer: Balancer | None = None

    def tell(self, event: Event) -> None:
        """Write an event, on rank 0."""
        if self.log is not None:
            self.log.write(event)


def open_books(a: Assembly, course: Course) -> tuple[Ledger, Observer]:
    """What a loop notes its steps in."""
    ledger = Ledger(
        group=a.world,
        counts_loss=a.counts_loss,
        device=a.device,
        stop_requested=course.stop_requested,
        save_due=lambda: _save_due_by_time(course),
        one_clock=course.one_clock,
    )
    return ledger, Observer(a, course.tell, course.display.say, balances=course.balancer is not None)


def note_step(
    a: Assembly, course: Course, ledger: Ledger, observer: Observer, batch: Batch, result: StepResult, *, last: bool
) -> None:
    """A step was taken: note it, and where it is time for that, settle and save. Collective."""
    observer.gauge.samples += batch.count
    a.clock.stepped()
    ledger.add(result)
    if a.step == 1:
        # A layer that breaks the rules shows after its first update; later checks come with checkpoints.
        if a.composed.local is None:
            make_equal(a)
        _tell_not_recomputed(a, course)
    by_steps = course.saving.every_steps is not None and a.step % course.saving.every_steps == 0
    if ledger.due or by_steps or last:
        settle(a, course, ledger, observer, save_now=by_steps)
        if course.stopped:
            return
    a.clock.mark("other")
    a.clock.end_step()


def _tell_not_recomputed(a: Assembly, course: Course) -> None:
    kept = a.composed.recomputed
    if kept is not None and kept.names and not kept.calls:
        warn(course, f"recompute saves nothing: {kept.names[0]} and the other modules of the plan were not called in the "
                     "first step; name others with recompute_modules")  # fmt: skip


def settle(a: Assembly, course: Course, ledger: Ledger, observer: Observer, *, save_now: bool = False) -> None:
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
        _look_at_losses(a, course, settled)
        course.display.steps(
            step=a.step,
            epoch=course.position.epoch,
            loss=course.loss,
            samples=samples,
            seconds=seconds,
        )
    if settled.stop:
        course.stopped = True
    elif (settled.save or save_now) and course.saves_between:
        course.save_due = True
    elif settled.save or save_now:
        make_equal(a)
        save_checkpoint(a, course)
        ledger.skip_time()


def _look_at_losses(a: Assembly, course: Course, settled: Settlement) -> None:
    """Warn once of a loss that is no finite number, and say whether the data of its step is to blame."""
    losses = settled.losses
    wrong = next((index for index, loss in enumerate(losses) if not abs(loss) < float("inf")), None)
    if wrong is None or course.warned_loss:
        return
    course.warned_loss = True
    step = a.step - len(losses) + wrong
    named = {name: each[wrong] for name, each in settled.objectives.items()}
    whose = [name for name, loss in named.items() if loss is not None and not abs(loss) < float("inf")]
    found = not_finite(a.job, course.splits, step) if a.world.rank == 0 and not named and _in_order(a, course) else ""
    advice = "lower the learning rate or clip the gradients"
    if found:
        advice = "leave them out or put numbers in their place"
    of = f" of {' and '.join(whose)}" if whose else ""
    became = f"the loss{of} became {losses[wrong]} at step {step + 1}"
    warn(course, f"{became}{', because ' + found if found else ''}: the training goes on, but {advice}")


def _in_order(a: Assembly, course: Course) -> bool:
    """Whether each step was on the next batch of the data, so that its number tells which."""
    each, position = steps_per_epoch(course.splits.train, a.job.batch_size), course.position
    return each is not None and position.epoch * each + position.batch == a.step


def meet(a: Assembly, what: str) -> None:
    """All ranks come to what a loop's own code called. Collective; one that came elsewhere is told so, where a message of objects
    would wait for it."""
    a.world.sum_(torch.zeros((), device=a.device), what)


def make_equal(a: Assembly) -> None:
    """What is about to be kept must be the same on all replicas: average those that step by themselves, and check. Collective."""
    a.average()
    check_replicas(a.model, a.mesh, a.step)


def _balance(a: Assembly, course: Course, event: RanksEvent) -> None:
    sizes = course.balancer.update(event) if course.balancer is not None else None
    if sizes is None:
        return
    a.division = tuple(float(size) for size in sizes)
    course.tell(BalanceEvent(step=a.step, shares=[size / sum(sizes) for size in sizes], samples=sizes))
    course.display.say("balance: the ranks take " + ", ".join(map(str, sizes)) + " samples of each batch from here")


def end_epoch(a: Assembly, course: Course, seconds: float) -> float:
    """Note that the epoch is over; returns its mean loss. The next begins here."""
    position = course.position
    mean = position.loss_sum / position.samples if position.samples else float("nan")
    course.tell(EpochEvent(epoch=position.epoch, step=a.step, seconds=seconds, loss_mean=mean))
    position.epoch += 1
    position.batch, position.loss_sum, position.samples = 0, 0.0, 0
    return mean


def evaluate_test(a: Assembly, course: Course) -> dict[str, float]:
    if course.splits.test is None:
        return {}
    began = perf_counter()
    with a.clock.away("evaluation"):
        metrics, samples = evaluate(a, course.splits.test)
        course.metrics = metrics
        course.evaluated_step = a.step
        course.tell(
            EvaluationEvent(step=a.step, split="test", metrics=metrics, samples=samples, seconds=perf_counter() - began)
        )
    return metrics


def save_checkpoint(a: Assembly, course: Course) -> None:
    with a.clock.away("checkpoint"):
        _save_checkpoint(a, course)


def _save_checkpoint(a: Assembly, course: Course) -> None:
    began = perf_counter()
    progress: dict[str, Any] = {
        "step": a.step,
        "position": vars(course.position),
        "metrics": dict(course.metrics),
        "state": dict(course.state),
        "loss": course.loss,
        "losses": dict(course.losses),
        "division": None if a.division is None else list(a.division),
        "train_samples": course.splits.train.length,
        "train_parts": course.splits.train.parts(a.samples.size),
    }
    if a.composed.compressed is not None:
        progress["compression"] = a.composed.compressed.share_out()
    try:
        _look_at_extra_state(a, course)
        if course.saves_between:
            progress["own_states"] = _own_states(a, course)
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
    course.saved_step, course.save_due = a.step, False
    course.last_save = perf_counter()
    course.tell(
        CheckpointEvent(step=a.step, path=str(path.relative_to(course.folder.path)), seconds=perf_counter() - began)
    )


def _look_at_extra_state(a: Assembly, course: Course) -> None:
    """A checkpoint keeps one extra state of each module: tell where workers have others. Collective."""
    every = a.world.gather_objects(extra_state_sums(a.model)) if a.world.size > 1 else []
    first = {name: sums for of_rank in reversed(every) for name, sums in of_rank.items()}
    differing = sorted({name for of_rank in every for name, sums in of_rank.items() if sums != first[name]})
    if differing and not course.warned_extra:
        course.warned_extra = True
        named = ", ".join(repr(name) for name in differing[:5])
        warn(
            course,
            f"the extra state (get_extra_state) of {named} is not the same on all workers, and "
            "checkpoints keep that of one: a resumed run goes on with it on all. Keep what all workers share there; what "
            "belongs to a worker's samples (a state carried from batch to batch) is kept right on one worker only",
        )


def _own_states(a: Assembly, course: Course) -> list[dict[str, Any]]:
    """What each rank with samples of its own keeps; empty where none keeps anything. Collective.

    Raises:
        CheckpointError: on every rank, where one keeps what no checkpoint can hold.
    """
    refused: CheckpointError | None = None
    try:
        encode(course.own_state, "own_state", {})  # refuses what a message would not take either
    except CheckpointError as error:
        refused = error
    refusals = a.world.gather_objects(refused)
    found = next((each for each in refusals if each is not None), None)
    if found is not None:
        raise found
    states: list[dict[str, Any]] = a.samples.gather_objects(course.own_state)
    return states if any(states) else []


def own_state_of(progress: Mapping[str, Any], samples: Group) -> dict[str, Any]:
    """What this rank kept for itself, out of a checkpoint's progress.

    Raises:
        CheckpointError: another number of ranks did.
    """
    states = progress.get("own_states", [])
    if states and len(states) != samples.size:
        raise CheckpointError(
            f"the loop kept an own_state on each of {len(states)} workers, and {samples.size} cannot take them over: go on with "
            "as many, or keep in state what any number of workers can divide (a tensor with a row for each environment)"
        )
    return dict(states[samples.rank]) if states else {}


def _save_due_by_time(course: Course) -> bool:
    every = course.saving.every_seconds
    return every is not None and perf_counter() - course.last_save >= every


def warn(course: Course, message: str) -> None:
    """Say it and keep it with the run."""
    course.tell(WarningEvent(message=message))
    course.display.say(f"warning: {message}")
