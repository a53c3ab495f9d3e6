"""`train`: from a job to a finished run folder."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, final

import torch

from shardwise.data.source import as_splits
from shardwise.errors import PlanError, Stopped, UserError
from shardwise.run.assemble import check_job, settle_plan
from shardwise.run.choose import accelerators, choose_device, choose_plan, with_threads
from shardwise.run.folder import RunFolder
from shardwise.run.launch import Nodes, current_rank, launch
from shardwise.run.loop import Saving
from shardwise.run.result import Run
from shardwise.run.worker import Work, claim_folder, train_rank
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank
from shardwise.spec.settings import Settings
from shardwise.units import parse_seconds


@final
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a training is run; nothing in it changes what is computed.

    Attributes:
        plan: a `Plan`, a layout in text form, the path of a plan file, or None to let shardwise choose.
        workers: number of ranks in all; None lets the plan or shardwise decide.
        threads: compute threads per worker; None divides the cores.
        device: `auto`, `cpu`, or the name of an accelerator such as `cuda`.
        out: the run folder; None makes a new one under `runs/`.
        resume: go on from the last checkpoint in `out`.
        checkpoint_every: `"500"` (steps), `"10m"`, `"30s"` (time), or `"never"` for none but the last.
        keep_last: number of checkpoints kept.
        max_restarts: how often all workers are started again from the last checkpoint after one failed.
        nodes: this node's place among several.
        progress: show progress on stderr.
        timeout_seconds: how long a collective may wait for a missing rank.
    """

    plan: Plan | str | Path | None = None
    workers: int | None = None
    threads: int | None = None
    device: str = "auto"
    out: Path | str | None = None
    resume: bool = False
    checkpoint_every: str = "10m"
    keep_last: int = 2
    max_restarts: int = 0
    nodes: Nodes = field(default_factory=Nodes)
    progress: bool = True
    timeout_seconds: float = 600.0


def train(
    job: Job,
    *,
    options: TrainOptions | None = None,
    settings: Settings | None = None,
    reference: Callable[[], Job] | None = None,
    identity: Mapping[str, Any] | None = None,
    **given: Any,
) -> Run:
    """Train a job and return the finished run.

    Called in a plain process it starts the workers itself; called in every rank of a `torchrun` it trains as that rank.

    Args:
        job: what to train.
        options: how to run it; or give its fields as keyword arguments, `train(job, plan="data=2", out="runs/first")`.
        settings: resolved settings with their origins, kept with the run; made from the job when not given.
        reference: picklable function that builds the same job again, for workers that cannot inherit it.
        identity: what must be equal for a run to be resumed; made from the job when not given.

    Raises:
        UserError: the job, data, plan or folder is wrong; nothing was started.
        RunFailed: a worker failed; the message holds its own traceback.
        Stopped: the run was interrupted and saved.
    """
    began = time.time()
    chosen = _options(options, given)
    device = choose_device(chosen.device)
    rank = current_rank()
    plan = resolve_plan(job, chosen, device=device, world=rank.workers if rank is not None else None)
    check_job(job, plan)
    splits = as_splits(job.data)
    work = Work(
        job=job,
        splits=splits,
        reference=reference,
        plan=plan,
        device=device,
        saving=parse_saving(chosen.checkpoint_every, chosen.keep_last),
        out=str(chosen.out) if chosen.out is not None else None,
        folder_ready=False,
        resume=chosen.resume,
        progress=chosen.progress,
        timeout_seconds=chosen.timeout_seconds,
        settings=settings if settings is not None else job_settings(job, plan),
        identity=dict(identity) if identity is not None else job_identity(job),
        began=began,
    )
    summary = _train_as_rank(rank, work) if rank is not None else _start_workers(work, chosen)
    summary["wall_seconds"] = time.time() - began
    if summary["stopped"]:
        raise Stopped(
            f"stopped at step {summary['steps']}; everything so far is saved in {summary['run']}: "
            "continue with --resume (resume=True) and this folder as --out (out=)"
        )
    return Run(job=job, folder=RunFolder.open(summary["run"]), plan=plan, summary=summary)


def resolve_plan(job: Job, options: TrainOptions, *, device: str, world: int | None) -> Plan:
    """The plan to train with: the one given, or a chosen one, with the job's own settings filled in.

    Args:
        job: what to train.
        options: the plan and number of workers that were asked for.
        device: type of device.
        world: number of ranks that are running already, under `torchrun`.

    Raises:
        PlanError: the plan is malformed or its number of workers is not the one asked for or running.
    """
    nodes = options.nodes.count
    workers = options.workers if options.workers is not None else world
    if workers is not None and workers < 1:
        raise PlanError(f"workers={workers}: at least 1 is needed")
    if options.plan is None:
        plan = choose_plan(job, workers=workers, threads=options.threads, device=device, nodes=nodes)
    else:
        plan = read_plan(options.plan)
        if options.threads is not None:
            plan = replace(plan, threads=options.threads)
        if workers is not None and workers != plan.layout.workers:
            raise PlanError(
                f"plan {plan.layout} is for {plan.layout.workers} workers, but {workers} were given: "
                f"leave --workers out, or use --plan data={workers}"
            )
        plan = with_threads(plan, nodes=nodes)
    if world is not None and plan.layout.workers != world:
        raise PlanError(f"plan {plan.layout} needs {plan.layout.workers} workers, but {world} are running")
    if plan.layout.workers % nodes:
        raise PlanError(f"{plan.layout.workers} workers do not divide over {nodes} nodes: use a multiple of {nodes}")
    if device != "cpu" and plan.layout.workers // nodes > accelerators():
        raise PlanError(
            f"{plan.layout.workers // nodes} workers on this machine, which has {accelerators()} accelerators: "
            "use fewer workers, or --device cpu"
        )
    return settle_plan(job, plan)


def read_plan(plan: Plan | str | Path) -> Plan:
    """A plan as it is, from a TOML file (a path that ends in .toml), or from a layout in text form."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Path) or plan.endswith(".toml"):
        return Plan.read(Path(plan))
    return Plan(layout=Layout.parse(plan))


def parse_saving(checkpoint_every: str, keep_last: int) -> Saving:
    """`"500"` is steps, `"10m"` or `"30s"` is time, `"never"` leaves only the checkpoint at the end.

    Raises:
        UserError: the text is neither, or a number is below 1.
    """
    if keep_last < 1:
        raise UserError(f"keep_last={keep_last}: at least 1 checkpoint is kept")
    text = checkpoint_every.strip()
    if text == "never":
        return Saving(every_seconds=None, keep_last=keep_last)
    if text.isdecimal():
        if int(text) < 1:
            raise UserError(f"checkpoint_every={text!r}: at least 1 step")
        return Saving(every_steps=int(text), every_seconds=None, keep_last=keep_last)
    seconds = parse_seconds(text)
    if seconds <= 0:
        raise UserError(f"checkpoint_every={text!r}: the time must be above 0")
    return Saving(every_seconds=seconds, keep_last=keep_last)


def job_settings(job: Job, plan: Plan) -> Settings:
    """Settings of a run that was started from Python: what the job says, and how it will run."""
    settings = Settings()
    for item in fields(job):
        value = getattr(job, item.name)
        if isinstance(value, int | float | str | bool) or value is None:
            settings.set(item.name, value, "default" if value == item.default else "job")
    for name, value in plan.to_dict().items():
        settings.set(f"plan.{name}", value, "plan")
    return settings


def job_identity(job: Job) -> dict[str, Any]:
    """What makes a run the same run: the name, the global batch, the order and the seed."""
    return {name: getattr(job, name) for name in ("name", "batch_size", "seed", "shuffle", "clip_norm", "precision")}


def _options(options: TrainOptions | None, given: Mapping[str, Any]) -> TrainOptions:
    known = [item.name for item in fields(TrainOptions)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(f"train has no option {unknown[0]!r}; options are {', '.join(known)}")
    return replace(options or TrainOptions(), **given)


def _train_as_rank(rank: Rank, work: Work) -> dict[str, Any]:
    """This process is a rank already, started by `torchrun` or the like."""
    torch.set_num_threads(work.plan.threads or 1)
    return train_rank(rank, work)


def _start_workers(work: Work, options: TrainOptions) -> dict[str, Any]:
    plan = work.plan
    start = functools.partial(
        launch,
        workers=plan.layout.workers,
        threads=plan.threads or 1,
        device=work.device,
        max_restarts=options.max_restarts,
    )
    if options.nodes.count > 1:
        if work.out is None:
            raise UserError("a run on several nodes needs --out: a folder that all nodes share")
        return start(functools.partial(train_rank, work=work), nodes=options.nodes)
    assert work.job is not None
    folder = claim_folder(work.out, work.job.name, resume=work.resume)
    with folder.lock():
        ready = replace(work, out=str(folder.path), folder_ready=True)
        if work.device != "cpu" and plan.layout.workers > 1:
            ready = ready.for_new_process()
        return start(functools.partial(train_rank, work=ready))
