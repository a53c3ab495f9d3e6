"""How a training is run: the options, and the plan and device that follow from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, final

from shardwise.errors import FolderError, PlanError, UserError
from shardwise.run.assemble import settle_plan
from shardwise.run.choose import AUTO, Chooser, accelerators, choose_plan, usable_cores, with_threads
from shardwise.run.claim import check_place
from shardwise.run.course import Saving
from shardwise.run.launch import Nodes
from shardwise.run.record import Recording
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.units import parse_seconds


@final
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a training is run; nothing in it changes what is computed.

    Attributes:
        plan: a `Plan`, a layout in text form, the path of a plan file, None for a plan by rule, or `auto` for one that is
            planned and, in long runs, tried first. A resumed run keeps its plan where none is given.
        workers: number of ranks in all; None lets the plan or shardwise decide.
        threads: compute threads per worker; None divides the cores.
        recompute: what is computed again in backward passes (`none`, `selective`, `full`), instead of what the plan says.
        device: `auto`, `cpu`, or the name of an accelerator such as `cuda`.
        out: the run folder; None makes a new one under `runs/`.
        resume: go on from the last checkpoint in `out`. `make_options` takes `auto` for it: if `out` holds a run.
        checkpoint_every: 500 or `"500"` (steps), `"10m"`, `"30s"` (time), or `"never"` for none but the last.
        keep_last: number of checkpoints kept.
        max_restarts: how often all workers are started again from the last checkpoint after one failed.
        nodes: this node's place among several.
        progress: show progress on stderr.
        timeout_seconds: how long a collective may wait for a missing rank.
        last_checkpoint: write one after the last step too; the weights are kept in any case.
        evaluate_every: evaluate the test split after every so many epochs, and at the end; 0: only at the end.
        pause_after: end after so many epochs (steps, where the job counts those) with a checkpoint; `resume` goes on.
        balance: divide the global batch anew during the run, in proportion to the measured speed of the ranks.
        recording: what every rank keeps of a run that is measured, in the folder's `records/`; None for nothing.
    """

    plan: Plan | str | Path | None = None
    workers: int | None = None
    threads: int | None = None
    recompute: str | None = None
    device: str = "auto"
    out: Path | str | None = None
    resume: bool = False
    checkpoint_every: str | int = "10m"
    keep_last: int = 2
    max_restarts: int = 0
    nodes: Nodes = field(default_factory=Nodes)
    progress: bool = True
    timeout_seconds: float = 600.0
    stall_seconds: float = 60.0
    last_checkpoint: bool = True
    evaluate_every: int = 1
    pause_after: int | None = None
    balance: bool = False
    recording: Recording | None = None


def make_options(options: TrainOptions | None, given: Mapping[str, Any]) -> TrainOptions:
    """The options with some fields overruled.

    Raises:
        UserError: there is no such option, or its value is out of range.
    """
    known = [item.name for item in fields(TrainOptions)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(f"train has no option {unknown[0]!r}; options are {', '.join(known)}")
    made = replace(options or TrainOptions(), **given)
    if given.get("resume") == AUTO:
        # All ranks look before they join the others, and so before rank 0 makes the folder.
        made = replace(made, resume=made.out is None or (Path(made.out) / "run.json").exists())
    if made.max_restarts < 0:
        raise UserError(f"max_restarts={made.max_restarts}: it must be 0 or more")
    if made.evaluate_every < 0:
        raise UserError(f"evaluate_every={made.evaluate_every}: give a number of epochs, or 0 for only at the end")
    if made.pause_after is not None and made.pause_after < 1:
        raise UserError(f"pause_after={made.pause_after}: a run can pause after 1 epoch (or step) at the earliest")
    if not made.timeout_seconds > 0:
        raise UserError(f"timeout_seconds={made.timeout_seconds:g}: workers need some time to meet; give more than 0")
    if not made.stall_seconds >= 0:
        raise UserError(f"stall_seconds={made.stall_seconds:g}: give a time, or 0 to look into nothing")
    if made.resume and made.out is None:
        raise FolderError("resume needs the run folder: give the one to continue with --out (out=)")
    return made


def resolve_plan(
    job: Job, options: TrainOptions, *, device: str, world: int | None, chooser: Chooser = choose_plan
) -> Plan:
    """The plan to train with: the one given, or a chosen one, with the job's own settings filled in.

    Args:
        job: what to train.
        options: the plan and number of workers that were asked for.
        device: type of device.
        world: number of ranks that are running already, under `torchrun`: they must agree without asking each other, so
            that the rule decides.
        chooser: decides where the plan is `auto`.

    Raises:
        PlanError: the plan is malformed or its number of workers is not the one asked for or running.
        FolderError: the run cannot have its folder: choosing a plan, or proving one, would be for nothing.
    """
    nodes = options.nodes.count
    if world is None and nodes == 1:
        check_place(options.out, resume=options.resume)
    workers = options.workers if options.workers is not None else world
    if workers is not None and workers < 1:
        raise PlanError(f"workers={workers}: at least 1 is needed")
    given = options.plan
    if given is None or given == AUTO:
        given = _plan_to_resume(options, workers)
    if given is None:
        choose = chooser if options.plan == AUTO and world is None else choose_plan
        plan = choose(job, workers=workers, threads=options.threads, device=device, nodes=nodes)
    else:
        plan = read_plan(given)
        if options.threads is not None:
            plan = replace(plan, threads=options.threads)
        if workers is not None and workers != plan.layout.workers:
            raise PlanError(
                f"plan {plan.layout} is for {plan.layout.workers} workers, but {workers} were given: "
                f"leave --workers out, or use --plan data={workers}"
            )
        plan = with_threads(plan.for_batch(job.batch_size), nodes=nodes)
    if options.recompute is not None:
        kept = plan.prediction if options.recompute == plan.recompute else None  # it was made for another step
        plan = Plan.from_dict({**vars(plan), "recompute": options.recompute, "prediction": kept})
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


def _plan_to_resume(options: TrainOptions, workers: int | None) -> Plan | None:
    """The plan a resumed run had, so that it goes on bit for bit; None where it cannot be had here or others are asked for."""
    if not options.resume or options.out is None:
        return None
    try:
        plan = Plan.from_dict(json.loads((Path(options.out) / "plan.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, PlanError):
        return None
    if workers is not None and plan.layout.workers != workers:
        return None
    room = accelerators() if options.device not in ("cpu", "auto") else max(accelerators(), usable_cores())
    return plan if workers is not None or plan.layout.workers <= room * options.nodes.count else None


def read_plan(plan: Plan | str | Path) -> Plan:
    """A plan as it is, from a TOML file (a path that ends in .toml), or from a layout in text form."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Path) or plan.endswith(".toml"):
        return Plan.read(Path(plan))
    return Plan(layout=Layout.parse(plan))


def parse_saving(checkpoint_every: str | int, keep_last: int) -> Saving:
    """500 or `"500"` is steps, `"10m"` or `"30s"` is time, `"never"` leaves only the checkpoint at the end.

    Raises:
        UserError: the text is neither, or a number is below 1.
    """
    if keep_last < 1:
        raise UserError(f"keep_last={keep_last}: at least 1 checkpoint is kept")
    text = str(checkpoint_every).strip()
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
