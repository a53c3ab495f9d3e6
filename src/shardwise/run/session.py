"""Session: one rank's part of a run that is kept in a folder, from opening the folder to summing up.

`train_rank` fills it with the training loop, `start` with the user's own.
"""

from __future__ import annotations

import json
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from shardwise.data.source import Source, Splits, as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.meter import Meter
from shardwise.errors import CheckpointError, PlanError, RunFailed
from shardwise.run.alone import look_at_samples
from shardwise.run.assemble import Assembly, assemble
from shardwise.run.balance import Balancer
from shardwise.run.checkpoint import latest, load
from shardwise.run.choose import usable_cores
from shardwise.run.claim import check_alike, check_identity, open_folder
from shardwise.run.course import Course, Position, Saving, own_state_of, warn
from shardwise.run.eventlog import EventLog
from shardwise.run.export import save_weights
from shardwise.run.folder import RunFolder, write_aside, writing_in
from shardwise.run.gauge import peak_memory_bytes
from shardwise.run.loop import total_steps
from shardwise.run.position import this_peer
from shardwise.run.progress import Display, Silent, make_display, tell
from shardwise.run.record import Recorder, Recording
from shardwise.run.sentinel import Sentinel, clear_positions
from shardwise.run.signals import StopRequest
from shardwise.run.trace import Tracer
from shardwise.spec.events import RestartEvent, RunEvent, SummaryEvent
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank
from shardwise.spec.settings import Settings
from shardwise.spec.shares import share_bounds

SPLIT_TABLE = "tensor.txt"
"""File of the run folder that says what the tensor axis splits and what not, and why."""


@final
@dataclass(frozen=True, kw_only=True)
class Work:
    """All a rank needs to know. Picklable when `job` and `splits` are None and `reference` builds the job again.

    Attributes:
        out: the run folder; None lets rank 0 make one.
        folder_ready: the launching process made the folder and holds its lock.
        began: unix seconds at which the user's call began.
        recording: what to keep of a run that is measured.
        balance: divide the global batch by measured speed.
        own_loop: the user's own, which takes as many steps on a batch as it likes where the job has several objectives.
        evaluate_every: epochs from one evaluation to the next; 0 for none before the end.
    """

    job: Job | None
    splits: Splits | None
    reference: Callable[[], Job] | None
    plan: Plan
    device: str
    saving: Saving
    out: str | None
    folder_ready: bool
    resume: bool
    progress: bool
    timeout_seconds: float
    stall_seconds: float
    settings: Settings
    identity: Mapping[str, Any]
    began: float
    recording: Recording | None = None
    balance: bool = False
    own_loop: bool = False
    evaluate_every: int = 1

    def for_new_process(self) -> Work:
        """The same without what cannot be sent to a process that inherits nothing."""
        return replace(self, job=None, splits=None) if self.reference is not None else self

    def built(self) -> Work:
        """The same with the job and its data, which a new process makes again."""
        job = self.job
        if job is None:
            if self.reference is None:
                raise PlanError("this worker inherited no job and was given no way to build it again")
            job = self.reference()
        return replace(self, job=job, splits=self.splits if self.splits is not None else as_splits(job.data))


@final
@dataclass(frozen=True, kw_only=True)
class Session:
    """One rank of a run that is under way. Made by `open_session`.

    Attributes:
        rank: of this process.
        folder: of the run.
        assembly: what is trained.
        course: where the training stands, and what is kept of it.
        sentinel: watches the steps; `finish` ends that.
        total_steps: of the whole training; None when nobody knows.
        first_step: steps that were done before this session.
    """

    work: Work
    rank: Rank
    folder: RunFolder
    assembly: Assembly
    course: Course
    sentinel: Sentinel
    recorder: Recorder | None
    total_steps: int | None
    first_step: int

    def finish(self, *, weights: bool) -> dict[str, Any]:
        """Write what is kept of a run that ended well; returns the summary, which is equal on all ranks. Collective.

        Args:
            weights: write them too.

        Raises:
            RunFailed: the disk refuses.
        """
        self.sentinel.stop()
        folder, recorder = self.folder, self.recorder
        if recorder is not None and recorder.recording.all_steps:
            with writing_in(folder.path):
                recorder.write(folder, peak_memory_bytes=peak_memory_bytes(self.assembly.device))
        summary = _summary(self)
        try:
            if weights:
                save_weights(self.assembly.model, folder.weights_path)
            if self.assembly.world.rank == 0:
                write_aside(folder.path / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
                self.course.tell(SummaryEvent(summary=summary))
        except (CheckpointError, OSError) as error:
            raise RunFailed(
                f"the training is done, but its end cannot be written: {error}. Resume it with more space"
            ) from error
        self.assembly.world.barrier()
        return summary


@contextmanager
def open_session(rank: Rank, work: Work, stop: StopRequest, *, shown: Display | None = None) -> Iterator[Session]:
    """Open the folder, assemble, and take up the last checkpoint where the run is resumed. The process group exists. Collective.

    Args:
        rank: of this process.
        work: what to do, with its job and data.
        stop: whether this process was asked to stop.
        shown: what rank 0 shows the run on; None for progress where `work` asks for it.
    """
    job, splits = work.job, work.splits
    assert job is not None and splits is not None
    device = torch.device(work.device, rank.local_rank) if work.device != "cpu" else torch.device("cpu")
    world = Group.world()
    with ExitStack() as stack:
        folder, resume = stack.enter_context(
            open_folder(work.out, job.name, world, resume=work.resume or rank.restarts > 0, ready=work.folder_ready)
        )
        if not work.folder_ready:  # else one process made all ranks
            check_alike(job, splits, work.identity, world)
        check_identity(folder, work.identity, resume=resume, world=world)
        total = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
        recorder = Recorder(work.recording, world.rank, Meter()) if work.recording is not None else None
        assembly = assemble(
            job, work.plan, world, device, total_steps=total, timeout_seconds=work.timeout_seconds, recorder=recorder
        )
        assembly.looks_at_losses = True
        peers = world.gather_objects(this_peer(world.rank))
        checkpoint = latest(folder) if resume else None
        position, progress = go_on(assembly, checkpoint, splits.train, balance=work.balance)
        course = stack.enter_context(_open_course(work, folder, assembly, position, progress, stop, shown))
        course.one_clock = len({peer.clock for peer in peers}) == 1
        if recorder is not None and not recorder.recording.all_steps:
            course.tracer = Tracer(recorder, folder, course.tell)
        is_first = world.rank == 0
        sentinel = Sentinel(
            assembly,
            folder,
            world.rank,
            peers,
            stall_seconds=work.stall_seconds,
            say=course.display.say if is_first or not (work.progress or shown) else tell,
            stop_requested=lambda: stop.requested,
        )
        session = Session(
            work=work,
            rank=rank,
            folder=folder,
            assembly=assembly,
            course=course,
            sentinel=sentinel,
            recorder=recorder,
            total_steps=None if work.own_loop and job.turns else total,
            first_step=assembly.step,
        )
        if is_first:
            clear_positions(folder.path)
            _write_record(folder, work, assembly)
        course.tell(_run_event(session))
        if rank.restarts:
            reason = "a worker failed; all were started again from the last checkpoint"
            course.tell(RestartEvent(attempt=rank.restarts, step=assembly.step, reason=reason))
        _announce(session, checkpoint, resume=resume)
        stack.enter_context(sentinel)
        yield session


@contextmanager
def _open_course(
    work: Work,
    folder: RunFolder,
    assembly: Assembly,
    position: Position,
    progress: Mapping[str, Any],
    stop: StopRequest,
    shown: Display | None,
) -> Iterator[Course]:
    """Where the training stands, with a log and a display on rank 0."""
    job, first_step = assembly.job, assembly.step
    assert work.splits is not None
    with ExitStack() as stack:
        log: EventLog | None = None
        display: Display = Silent()
        if assembly.world.rank == 0:
            log = stack.enter_context(EventLog(folder.events_path))
            display = shown or make_display(
                show=work.progress, total_steps=assembly.total_steps, epochs=job.epochs, first_step=first_step
            )
        stack.callback(display.close)
        yield Course(
            splits=work.splits,
            folder=folder,
            saving=work.saving,
            log=log,
            display=display,
            stop_requested=lambda: stop.requested,
            evaluate_every=work.evaluate_every,
            position=position,
            metrics=dict(progress.get("metrics", {})),
            loss=float(progress.get("loss", float("nan"))),
            state=dict(progress.get("state", {})),
            losses=dict(progress.get("losses", {})),
            own_state=own_state_of(progress, assembly.samples),
            balancer=Balancer(job.batch_size, _sizes(assembly)) if work.balance else None,
        )


def go_on(
    assembly: Assembly, checkpoint: Path | None, train: Source, *, balance: bool
) -> tuple[Position, dict[str, Any]]:
    """Take up a checkpoint, where there is one: where the training stands, and all that was noted of its progress."""
    if checkpoint is None:
        return Position(), {}
    progress = load(checkpoint, model=assembly.model, optimizer=assembly.optimizer, scheduler=assembly.scheduler)
    assembly.step = int(progress["step"])
    if assembly.composed.compressed is not None:
        assembly.composed.compressed.take_up(progress.get("compression", {}))
    division = progress.get("division")
    if balance and division is not None and len(division) == assembly.samples.size:
        assembly.division = tuple(division)  # as it was; without --balance the plan alone decides
    position = Position(**progress["position"])
    if position.batch:
        _check_stream(assembly, checkpoint, progress.get("train_parts"), train, position)
    _check_samples(assembly, checkpoint, progress.get("train_samples"), train.length, position)
    return position, progress


def _check_stream(assembly: Assembly, checkpoint: Path, before: int | None, train: Source, position: Position) -> None:
    """What comes one after another is read again up to where it stood, which is elsewhere if it is divided in another way."""
    parts = train.parts(assembly.samples.size)
    if parts is None:
        return
    if before is not None and before != parts:
        raise CheckpointError(
            f"the stream was read in {before} parts up to checkpoint {checkpoint}, in the middle of epoch "
            f"{position.epoch + 1}, and would be read in {parts} now, so that samples would come twice or never: give as "
            "many workers (and loader_workers) as before, or go on from the end of an epoch"
        )
    assembly.composed.remarks += (
        f"the stream is read again, and what the first {position.batch} batches of epoch {position.epoch + 1} took of it is "
        "passed over: where a record can be read once only (a queue, a socket), as many new ones are lost",
    )


def _check_samples(
    assembly: Assembly, checkpoint: Path, before: int | None, samples: int | None, position: Position
) -> None:
    """Data of another length has another order: in the middle of an epoch, some samples would come twice and others never."""
    if before is None or before == samples:
        return
    changed = f"the training split had {before} samples at checkpoint {checkpoint} and has {samples} now"
    if position.batch:
        raise CheckpointError(
            f"{changed}: the order of an epoch follows from their number, and {position.batch} batches of epoch "
            f"{position.epoch + 1} are done; give the data that the run was started with, or start a new run"
        )
    assembly.composed.remarks += (f"{changed}; the epochs from here on go over these",)


def _announce(session: Session, checkpoint: Path | None, *, resume: bool) -> None:
    """What is to be known before the first step."""
    assembly, course, total, first_step = session.assembly, session.course, session.total_steps, session.first_step
    if resume:
        source = f"checkpoint {checkpoint.name}" if checkpoint is not None else "the start: there is no checkpoint yet"
        course.display.say(f"resuming from {source}")
        if total is not None and first_step >= total:
            course.display.say(f"nothing left to train: {first_step} of {total} steps are done")
    if assembly.composed.stages is not None:
        course.display.say(str(assembly.composed.stages.part.table))
    if assembly.composed.split is not None:
        course.display.say(assembly.composed.split.summary + f" (the table is in {course.folder.path / SPLIT_TABLE})")
    known = look_at_samples(assembly.job, course.splits) if assembly.world.rank == 0 else ()
    for remark in (*assembly.composed.remarks, *known):
        warn(course, remark)


def _write_record(folder: RunFolder, work: Work, assembly: Assembly) -> None:
    with writing_in(folder.path):
        if assembly.composed.split is not None:
            write_aside(folder.path / SPLIT_TABLE, f"{assembly.composed.split}\n".encode())
        write_aside(folder.plan_path, json.dumps(work.plan.to_dict(), indent=2).encode() + b"\n")
        write_aside(folder.settings_path, json.dumps(work.settings.to_dict(), indent=2, default=str).encode() + b"\n")


def _run_event(session: Session) -> RunEvent:
    work, job, world = session.work, session.assembly.job, session.assembly.world
    return RunEvent(
        name=job.name,
        settings=work.settings.to_dict(),
        plan=work.plan.to_dict(),
        versions={"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        host=socket.gethostname(),
        ranks=world.size,
        first_step=session.first_step,
        total_steps=session.total_steps,
        device=work.device,
        cores=usable_cores(),
        batch_size=job.batch_size,
        stall_seconds=work.stall_seconds,
    )


def _sizes(assembly: Assembly) -> list[int]:
    """Samples of a full global batch, one number for each rank that holds other samples."""
    bounds = share_bounds(assembly.job.batch_size, assembly.samples.size, assembly.division)
    return [stop - start for start, stop in bounds]


def _summary(session: Session) -> dict[str, Any]:
    assembly, course = session.assembly, session.course
    shares = assembly.clock.shares()
    by_rank = assembly.world.gather_objects({"peak_memory_bytes": peak_memory_bytes(assembly.device), "shares": shares})
    return {
        "run": str(course.folder.path),
        "plan": str(assembly.plan),
        "layout": str(assembly.plan.layout),
        "workers": assembly.world.size,
        "threads": assembly.plan.threads,
        "samples_per_rank": _sizes(assembly),
        "device": assembly.device.type,
        "steps": assembly.step,
        "total_steps": session.total_steps,
        "epochs": course.position.epoch,
        "first_step": session.first_step,
        "loss": course.loss,
        "metrics": dict(course.metrics),
        "samples_per_second": course.samples / course.train_seconds if course.train_seconds else 0.0,
        "wall_seconds": time.time() - session.work.began,
        "train_seconds": course.train_seconds,
        "time_shares": shares,
        "ranks": by_rank,
        "parameters": sum(parameter.numel() for parameter in assembly.model.parameters()),
        "restarts": session.rank.restarts,
        "stopped": course.stopped,
        "paused": course.paused,
    }
