"""What every rank does in a training: join the group, open the folder, assemble, resume, train, sum up."""

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

from shardwise.data.source import Splits, as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.dist.meter import Meter
from shardwise.errors import CheckpointError, FolderError, PlanError, RunFailed, UserError
from shardwise.run.assemble import Assembly, assemble
from shardwise.run.balance import Balancer
from shardwise.run.checkpoint import latest, load
from shardwise.run.choose import usable_cores
from shardwise.run.eventlog import EventLog
from shardwise.run.export import save_weights
from shardwise.run.folder import RunFolder, write_aside, writing_in
from shardwise.run.gauge import peak_memory_bytes
from shardwise.run.loop import Course, Position, Saving, run_loop, total_steps, warn
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
    evaluate_every: int = 1

    def for_new_process(self) -> Work:
        """The same without what cannot be sent to a process that inherits nothing."""
        return replace(self, job=None, splits=None) if self.reference is not None else self


def train_rank(rank: Rank, work: Work) -> dict[str, Any]:
    """Train as one rank and return the summary, which is equal on all ranks. Collective."""
    job = work.job
    if job is None:
        if work.reference is None:
            raise PlanError("this worker inherited no job and was given no way to build it again")
        job = work.reference()
    splits = work.splits if work.splits is not None else as_splits(job.data)
    if work.device != "cpu":
        torch.accelerator.set_device_index(rank.local_rank)
    device = torch.device(work.device, rank.local_rank) if work.device != "cpu" else torch.device("cpu")
    with StopRequest() as stop, process_group(rank, work.device, work.timeout_seconds):
        world = Group.world()
        resume = work.resume or rank.restarts > 0
        with _open_folder(work, world, job.name, resume=resume) as folder:
            _check_identity(folder, work.identity, resume=resume, world=world)
            return _train(job, splits, work, rank, world, device, folder, stop, resume=resume)


def _train(
    job: Job,
    splits: Splits,
    work: Work,
    rank: Rank,
    world: Group,
    device: torch.device,
    folder: RunFolder,
    stop: StopRequest,
    *,
    resume: bool,
) -> dict[str, Any]:
    total = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
    recorder = Recorder(work.recording, world.rank, Meter()) if work.recording is not None else None
    assembly = assemble(
        job, work.plan, world, device, total_steps=total, timeout_seconds=work.timeout_seconds, recorder=recorder
    )
    peers = world.gather_objects(this_peer(world.rank))
    checkpoint = latest(folder) if resume else None
    position, metrics, loss = _go_on(assembly, checkpoint, balance=work.balance)
    with ExitStack() as stack:
        is_first = world.rank == 0
        log = stack.enter_context(EventLog(folder.events_path)) if is_first else None
        display: Display = Silent()
        if is_first:
            display = make_display(show=work.progress, total_steps=total, epochs=job.epochs, first_step=assembly.step)
        stack.callback(display.close)
        course = Course(
            splits=splits,
            folder=folder,
            saving=work.saving,
            log=log,
            display=display,
            stop_requested=lambda: stop.requested,
            evaluate_every=work.evaluate_every,
            position=position,
            metrics=metrics,
            loss=loss,
            one_clock=len({peer.clock for peer in peers}) == 1,
            balancer=Balancer(job.batch_size, _sizes(assembly)) if work.balance else None,
        )
        if recorder is not None and not recorder.recording.all_steps:
            course.tracer = Tracer(recorder, folder, course.tell)
        first_step = assembly.step
        if is_first:
            clear_positions(folder.path)
            _write_record(folder, work, assembly)
        course.tell(_run_event(job, work, world, first_step, total))
        if rank.restarts:
            reason = "a worker failed; all were started again from the last checkpoint"
            course.tell(RestartEvent(attempt=rank.restarts, step=first_step, reason=reason))
        _announce(assembly, course, checkpoint, first_step, total, resume=resume)
        say = display.say if is_first or not work.progress else tell
        with Sentinel(
            assembly,
            folder,
            world.rank,
            peers,
            stall_seconds=work.stall_seconds,
            say=say,
            stop_requested=lambda: stop.requested,
        ):
            run_loop(assembly, course)
        if recorder is not None and recorder.recording.all_steps:
            with writing_in(folder.path):
                recorder.write(folder, peak_memory_bytes=peak_memory_bytes(assembly.device))
        summary = _summary(assembly, course, rank, work, first_step, total)
        try:
            if not course.stopped and not course.paused:
                save_weights(assembly.model, folder.weights_path)
            if is_first:
                write_aside(folder.path / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
                course.tell(SummaryEvent(summary=summary))
        except (CheckpointError, OSError) as error:
            raise RunFailed(
                f"the training is done, but its end cannot be written: {error}. Resume it with more space"
            ) from error
        world.barrier()
        return summary


def _go_on(assembly: Assembly, checkpoint: Path | None, *, balance: bool) -> tuple[Position, dict[str, float], float]:
    """Take up a checkpoint, where there is one: where the training stands, its last metrics and its last loss."""
    if checkpoint is None:
        return Position(), {}, float("nan")
    progress = load(checkpoint, model=assembly.model, optimizer=assembly.optimizer, scheduler=assembly.scheduler)
    assembly.step = int(progress["step"])
    if assembly.composed.compressed is not None:
        assembly.composed.compressed.take_up(progress.get("compression", {}))
    division = progress.get("division")
    if balance and division is not None and len(division) == assembly.samples.size:
        assembly.division = tuple(division)  # as it was; without --balance the plan alone decides
    return Position(**progress["position"]), dict(progress["metrics"]), float(progress.get("loss", float("nan")))


def _announce(
    assembly: Assembly, course: Course, checkpoint: Path | None, first_step: int, total: int | None, *, resume: bool
) -> None:
    """What is to be known before the first step."""
    if resume:
        source = f"checkpoint {checkpoint.name}" if checkpoint is not None else "the start: there is no checkpoint yet"
        course.display.say(f"resuming from {source}")
        if total is not None and first_step >= total:
            course.display.say(f"nothing left to train: {first_step} of {total} steps are done")
    if assembly.composed.stages is not None:
        course.display.say(str(assembly.composed.stages.part.table))
    if assembly.composed.split is not None:
        course.display.say(assembly.composed.split.summary + f" (the table is in {course.folder.path / SPLIT_TABLE})")
    for remark in assembly.composed.remarks:
        warn(course, remark)


@contextmanager
def _open_folder(work: Work, world: Group, name: str, *, resume: bool) -> Iterator[RunFolder]:
    """The run folder on every rank; made and locked by rank 0 where the launching process has not done so.

    A folder that rank 0 cannot have is an error on every rank, raised on all of them alike.
    """
    if work.folder_ready:
        yield RunFolder.open(work.out or "")
        return
    with ExitStack() as stack:
        answer: str | UserError = ""
        if world.rank == 0:
            try:
                folder = claim_folder(work.out, name, resume=resume)
                stack.enter_context(folder.lock())
                answer = str(folder.path)
            except UserError as error:
                answer = error
        agreed = world.gather_objects(answer)[0]
        if isinstance(agreed, UserError):
            raise agreed
        yield RunFolder.open(agreed)
        world.barrier()


def claim_folder(out: str | Path | None, name: str, *, resume: bool) -> RunFolder:
    """A new run folder, or with `resume` the existing one.

    Raises:
        FolderError: `resume` without a folder to resume, or a folder that cannot be used.
    """
    if not resume:
        return RunFolder.create(out, name)
    if out is None:
        raise FolderError("resume needs the run folder: give the one to continue with --out (out=)")
    return RunFolder.open(out)


def _check_identity(folder: RunFolder, identity: Mapping[str, Any], *, resume: bool, world: Group) -> None:
    """A run is resumed only as what it was.

    Raises:
        FolderError: names the settings that differ.
    """
    path = folder.path / "identity.json"
    if not path.exists():
        world.barrier()
        if world.rank == 0:
            with writing_in(folder.path):
                write_aside(path, json.dumps(dict(identity), indent=2, default=str).encode() + b"\n")
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FolderError(f"{path} cannot be read ({error}): the run folder is damaged") from error
    now = json.loads(json.dumps(dict(identity), default=str))
    differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if resume and differ:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in differ)
        raise FolderError(
            f"{folder.path} holds another run: {changes}. A resumed run must be the same run; start a new one in "
            "another --out, or give the settings it was started with"
        )


def _write_record(folder: RunFolder, work: Work, assembly: Assembly) -> None:
    with writing_in(folder.path):
        if assembly.composed.split is not None:
            write_aside(folder.path / SPLIT_TABLE, f"{assembly.composed.split}\n".encode())
        write_aside(folder.plan_path, json.dumps(work.plan.to_dict(), indent=2).encode() + b"\n")
        write_aside(folder.settings_path, json.dumps(work.settings.to_dict(), indent=2, default=str).encode() + b"\n")


def _run_event(job: Job, work: Work, world: Group, first_step: int, total: int | None) -> RunEvent:
    return RunEvent(
        name=job.name,
        settings=work.settings.to_dict(),
        plan=work.plan.to_dict(),
        versions={"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        host=socket.gethostname(),
        ranks=world.size,
        first_step=first_step,
        total_steps=total,
        device=work.device,
        cores=usable_cores(),
        batch_size=job.batch_size,
        stall_seconds=work.stall_seconds,
    )


def _sizes(assembly: Assembly) -> list[int]:
    """Samples of a full global batch, one number for each rank that holds other samples."""
    bounds = share_bounds(assembly.job.batch_size, assembly.samples.size, assembly.division)
    return [stop - start for start, stop in bounds]


def _summary(
    assembly: Assembly, course: Course, rank: Rank, work: Work, first_step: int, total: int | None
) -> dict[str, Any]:
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
        "total_steps": total,
        "epochs": course.position.epoch,
        "first_step": first_step,
        "loss": course.loss,
        "metrics": dict(course.metrics),
        "samples_per_second": course.samples / course.train_seconds if course.train_seconds else 0.0,
        "wall_seconds": time.time() - work.began,
        "train_seconds": course.train_seconds,
        "time_shares": shares,
        "ranks": by_rank,
        "parameters": sum(parameter.numel() for parameter in assembly.model.parameters()),
        "restarts": rank.restarts,
        "stopped": course.stopped,
        "paused": course.paused,
    }
