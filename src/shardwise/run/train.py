"""`train`: from a job to a finished run folder."""

from __future__ import annotations

import functools
import importlib
import os
import shlex
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from shardwise.data.source import Splits, as_splits
from shardwise.errors import FolderError, RunFailed, Stopped, UserError
from shardwise.run.assemble import check_is_job, check_job, check_updates
from shardwise.run.balance import check_division
from shardwise.run.choose import Chooser, choose_device, choose_plan
from shardwise.run.claim import claimed
from shardwise.run.eventlog import EventLog
from shardwise.run.folder import RunFolder
from shardwise.run.launch import current_rank, launch
from shardwise.run.loop import total_steps
from shardwise.run.options import TrainOptions, make_options, parse_saving, resolve_plan
from shardwise.run.process import default_start_method
from shardwise.run.result import Run
from shardwise.run.session import Work
from shardwise.run.worker import train_rank
from shardwise.spec.events import FailureEvent
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.settings import DEFAULT, JOB, Settings


def train(
    job: Job,
    *,
    options: TrainOptions | None = None,
    settings: Settings | None = None,
    hyper_parameters: Mapping[str, tuple[Any, str]] | None = None,
    reference: Callable[[], Job] | None = None,
    identity: Mapping[str, Any] | None = None,
    announce: Callable[[], None] | None = None,
    chooser: Chooser = choose_plan,
    **given: Any,
) -> Run:
    """Train a job and return the finished run.

    Called in a plain process it starts the workers itself; called in every rank of a `torchrun` it trains as that rank.

    Args:
        job: what to train.
        options: how to run it; or give its fields as keyword arguments, `train(job, plan="data=2", out="runs/first")`.
        settings: kept with the run, with their origins; made from the job and the `hyper_parameters` of its function otherwise.
        reference: picklable function that builds the same job again, for workers that cannot inherit it.
        identity: what must be equal for a run to be resumed; made from the job when not given.
        announce: called when everything was checked and the workers are about to start.
        chooser: decides on the plan where it is `auto`.

    Raises:
        UserError: the job, data, plan or folder is wrong; nothing was started.
        RunFailed: a worker failed; the message holds its own traceback.
        Stopped: the run was interrupted and saved.
    """
    began = time.time()
    check_is_job(job, "train")
    chosen = make_options(options, given)
    device = choose_device(chosen.device)
    rank = current_rank()
    if rank is not None and chosen.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise UserError(
            "torchrun may restart the workers (--max-restarts), and they find the run again by its folder alone: "
            "give one with --out (out=)"
        )
    plan = resolve_plan(job, chosen, device=device, world=rank.workers if rank is not None else None, chooser=chooser)
    check_job(job, plan, rehearsal=device == "cpu")
    splits = as_splits(job.data)
    _check_shares(job, plan, splits, balance=chosen.balance)
    if rank is None and chosen.nodes.count == 1:
        # Read here, once: workers inherit the pages, and what is wrong with a file shows before any worker starts.
        _ = splits.train, splits.test
        check_updates(job, total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps))
    work = Work(
        job=job,
        splits=splits,
        reference=reference,
        plan=plan,
        device=device,
        saving=replace(
            parse_saving(chosen.checkpoint_every, chosen.keep_last),
            at_end=chosen.last_checkpoint,
            pause_after=chosen.pause_after,
        ),
        out=str(chosen.out) if chosen.out is not None else None,
        folder_ready=False,
        resume=chosen.resume,
        progress=chosen.progress,
        timeout_seconds=chosen.timeout_seconds,
        # A hang is looked into before the collectives give up.
        stall_seconds=min(chosen.stall_seconds, chosen.timeout_seconds / 2),
        settings=settings if settings is not None else job_settings(job, plan, chosen, hyper_parameters or {}),
        identity=dict(identity) if identity is not None else job_identity(job),
        began=began,
        recording=chosen.recording,
        balance=chosen.balance,
        evaluate_every=chosen.evaluate_every,
    )
    if announce is not None:
        announce()
    summary = _start_workers(work, chosen, is_rank=rank is not None)
    summary["wall_seconds"] = time.time() - began
    if summary["stopped"]:
        raise Stopped(_how_to_resume(summary["run"]))
    return Run(job=job, folder=RunFolder.open(summary["run"]), plan=plan, summary=summary)


def _check_shares(job: Job, plan: Plan, splits: Splits, *, balance: bool) -> None:
    check_division(splits, plan, balance=balance)
    if balance and plan.micro_batch is not None:
        # Any worker may come to take most of a batch, in several micro-batches: not every model can.
        workers = plan.layout.workers
        check_job(job, replace(plan, shares=(float(job.batch_size - workers + 1), *[1.0] * (workers - 1))))


def job_settings(
    job: Job, plan: Plan, options: TrainOptions, hyper_parameters: Mapping[str, tuple[Any, str]]
) -> Settings:
    """Resolved settings of a run that was started from Python: what the job says, and how it will run."""
    simple = {
        item.name: (getattr(job, item.name), item.default)
        for item in fields(job)
        if isinstance(getattr(job, item.name), int | float | str | bool | None)
    }
    given = {name: value for name, (value, default) in simple.items() if value != default}
    defaults = {name: None if default is MISSING else default for name, (_, default) in simple.items()}
    settings = Settings.resolve([(JOB, given), (DEFAULT, defaults)])
    for name, (value, source) in hyper_parameters.items():
        settings = settings.with_value(f"set.{name}", value, source)
    for name, value in plan.to_dict().items():
        settings = settings.with_value(f"plan.{name}", value, "call" if options.plan is not None else "chosen")
    return settings


def job_identity(job: Job) -> dict[str, Any]:
    """What makes a run the same run: the name, the global batch, the order and the seed."""
    return {name: getattr(job, name) for name in ("name", "batch_size", "seed", "shuffle", "clip_norm", "precision")}


def _start_workers(work: Work, options: TrainOptions, *, is_rank: bool) -> dict[str, Any]:
    plan = work.plan
    start = functools.partial(
        launch,
        workers=plan.layout.workers,
        threads=plan.threads or 1,
        device=work.device,
        max_restarts=options.max_restarts,
        nodes=options.nodes,
    )
    if is_rank:
        return start(functools.partial(train_rank, work=work))
    if default_start_method(work.device) == "fork" and (plan.layout.shard > 1 or plan.layout.tensor > 1):
        # DTensors load it at their first operation: once here, or once in every worker, at the same time on shared cores.
        importlib.import_module("torch._dynamo")
    if options.nodes.count > 1:
        if work.out is None:
            raise UserError("a run on several nodes needs --out: a folder that all nodes share")
        return start(functools.partial(train_rank, work=work))
    assert work.job is not None
    with claimed(work.out, work.job.name, resume=work.resume) as folder:
        ready = replace(work, out=str(folder.path), folder_ready=True)
        if work.device != "cpu" and plan.layout.workers > 1:
            ready = ready.for_new_process()
        try:
            return start(functools.partial(train_rank, work=ready))
        except Stopped as error:
            raise Stopped(_how_to_resume(str(folder.path))) from error
        except FolderError:  # the folder holds another run, whose events are not to end with our failure
            raise
        except Exception as error:
            rank = error.rank if isinstance(error, RunFailed) else None
            details = error.details if isinstance(error, RunFailed) else traceback.format_exc()
            with EventLog(folder.events_path) as log:
                log.write(FailureEvent(message=str(error), rank=rank, details=details))
            raise


def _how_to_resume(folder: str) -> str:
    return (
        f"stopped; everything up to the last step is saved in {folder}: continue with --resume --out {shlex.quote(folder)} "
        f"(in Python: resume=True, out={folder!r})"
    )
