"""`start`: make a job ready for a loop of the user's own."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shardwise.data.reading import NoData
from shardwise.data.source import Splits, as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.errors import JobError
from shardwise.run.alone import look_at_samples
from shardwise.run.assemble import assemble, check_is_job, check_job
from shardwise.run.balance import check_division
from shardwise.run.choose import choose_device
from shardwise.run.claim import check_alike
from shardwise.run.heap import give_freed_memory_back
from shardwise.run.keeper import Keeper
from shardwise.run.launch import current_rank
from shardwise.run.live import LiveRun
from shardwise.run.loop import total_steps
from shardwise.run.options import TrainOptions, make_options, parse_saving, resolve_plan
from shardwise.run.progress import Remarks, tell
from shardwise.run.session import Work, open_session
from shardwise.run.signals import StopRequest
from shardwise.run.train import job_identity, job_settings
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.rank import SERIAL, Rank


def start(
    job: Job | None = None,
    *,
    plan: Plan | str | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    checkpoint_every: str | int = "10m",
    keep_last: int = 2,
    **fields_of_job: Any,
) -> LiveRun:
    """Make a job ready for a loop of your own.

    In a plain process this is a run on one worker; the same script under `torchrun --nproc-per-node N` is a run on N.

    Args:
        job: what to train; or give its fields as keyword arguments. `epochs` may be left out there (1 is taken), and so may
            `data`, where the loop makes its own.
        plan: a plan or layout; the running number of workers as data parallelism by default.
        device: `auto`, `cpu`, or an accelerator.
        out: the run folder, for checkpoints, events and the final weights; None keeps nothing.
        resume: go on from the last checkpoint in `out`; `auto`: if there is a run. Workers that torchrun starts again
            after a failure always do.
        checkpoint_every: with `out`, 500 or `"500"` (steps), `"10m"`, `"30s"` (time), or `"never"` for none but the last.
        keep_last: number of checkpoints kept.
        fields_of_job: `model=..., optimizer=..., loss=..., data=..., batch_size=...`. `model` may be a module itself
            and `optimizer` must then be a function of its parameters.

    Raises:
        UserError: the job, data, plan or folder is wrong.
    """
    began = time.time()
    if job is None:
        job = _job_of(fields_of_job)
    elif fields_of_job:
        raise JobError(f"start was given a job and its field {next(iter(fields_of_job))!r}: give one or the other")
    check_is_job(job, "start")
    kind = choose_device(device)
    rank = current_rank() or SERIAL
    options = make_options(
        TrainOptions(checkpoint_every=checkpoint_every, keep_last=keep_last, progress=False),
        {"plan": plan, "device": kind, "out": out, "resume": resume},
    )
    settled = resolve_plan(job, options, device=kind, world=rank.workers)
    check_job(job, settled)
    splits = Splits(NoData()) if job.data is None else as_splits(job.data)
    check_division(splits, settled)
    with ExitStack() as stack:
        stack.callback(give_freed_memory_back)  # the process is its owner's again
        stop = stack.enter_context(StopRequest()) if out is not None else StopRequest()
        stack.enter_context(process_group(rank, kind, options.timeout_seconds))
        if rank.workers > 1 and settled.threads is not None:
            torch.set_num_threads(settled.threads)
        if options.out is None:
            device_here = torch.device(kind, rank.local_rank) if kind != "cpu" else torch.device("cpu")
            run = _without_folder(job, settled, splits, device_here)
        else:
            run = _with_folder(stack, stop, rank, job, settled, splits, options, began)
        run._stack = stack.pop_all()
        return run


def _without_folder(job: Job, plan: Plan, splits: Splits, device: torch.device) -> LiveRun:
    total = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
    if Group.world().size > 1:
        check_alike(job, splits, job_identity(job), Group.world())
    assembly = assemble(job, plan, Group.world(), device, total_steps=total)
    assembly.looks_at_losses = True
    if assembly.world.rank == 0:
        for remark in (*assembly.composed.remarks, *look_at_samples(job, splits)):
            tell(f"warning: {remark}")
    return LiveRun(job, plan, splits, assembly)


def _with_folder(
    stack: ExitStack,
    stop: StopRequest,
    rank: Rank,
    job: Job,
    plan: Plan,
    splits: Splits,
    options: TrainOptions,
    began: float,
) -> LiveRun:
    work = Work(
        job=job,
        splits=splits,
        reference=None,
        plan=plan,
        device=options.device,
        saving=parse_saving(options.checkpoint_every, options.keep_last),
        out=str(options.out),
        folder_ready=False,
        resume=options.resume,
        progress=False,
        timeout_seconds=options.timeout_seconds,
        stall_seconds=options.stall_seconds,
        settings=job_settings(job, plan, options, {}),
        identity=job_identity(job),
        began=began,
        own_loop=True,
        evaluate_every=0,
    )
    session = stack.enter_context(open_session(rank, work, stop, shown=Remarks()))
    course = session.course
    return LiveRun(
        job,
        plan,
        splits,
        session.assembly,
        _keeper=Keeper(session),
        _state=course.state,
        _own_state=course.own_state,
        _losses=course.losses,
        _position=course.position,
    )


def _job_of(given: dict[str, Any]) -> Job:
    known = [item.name for item in fields(Job)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise JobError(f"start has no argument {unknown[0]!r}; a job has {', '.join(known)}")
    values = {"data": None, **given}
    if values["data"] is not None and values.get("epochs") is None and values.get("steps") is None:
        values["epochs"] = 1
    model = values.get("model")
    if isinstance(model, nn.Module):
        values["model"] = lambda: model
    try:
        return Job(**values)
    except TypeError as error:
        raise JobError(f"start: {error}") from error
