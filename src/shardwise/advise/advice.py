"""Advice on a job: its facts, the machine, the checks of those who run plans, and the planner's ranking."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardwise.data.source import as_splits
from shardwise.errors import JobError, PlanError, RunFailed, ShardwiseError
from shardwise.parallel.compose import READY_AXES
from shardwise.parallel.context.split import Checked
from shardwise.planner.jobsearch import Check, JobFound, JobProblem, search_job
from shardwise.probe.busy import is_busy, was_busy
from shardwise.probe.facts import facts_apart
from shardwise.probe.machine import probe
from shardwise.probe.place import WAIT_SECONDS, cached_machine, cached_path, measuring, this_place
from shardwise.run.apart import call_in_child, in_thread
from shardwise.run.assemble import check_job, settle_plan
from shardwise.spec.job import Job
from shardwise.spec.layout import AXES
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank
from shardwise.spec.work import JobFacts

Tell = Callable[[str], None]

AGAIN_AFTER_SECONDS = 600.0
"""How old figures are at least before they are taken again because others disturbed them."""


@dataclass(frozen=True)
class Advice:
    """What was found out, and the ranking that follows from it.

    Attributes:
        check: says for plans why they cannot run; for further questions.
    """

    facts: JobFacts
    problem: JobProblem
    found: JobFound
    check: Check


def advise(
    job: Job,
    *,
    machine: Machine | None = None,
    workers: int | None = None,
    exactly: bool = False,
    memory_bytes: float | None = None,
    threads: int | None = None,
    nodes: int = 1,
    top: int = 12,
    tell: Tell = lambda text: None,
) -> Advice:
    """Rank the plans for `job`.

    Args:
        job: what to train.
        machine: where; None is this machine, which is measured if it was not yet.
        workers: at most so many; None is what the machine has.
        exactly: `workers`, not fewer.
        memory_bytes: what one worker may use.
        threads: compute threads per worker; None lets the planner choose.
        nodes: machines like a measured one that may be used together.
        top: plans that are known to run, at least, where there are so many.
        tell: receives a sentence before anything that takes longer.

    Raises:
        ShardwiseError: the job itself is wrong, or cannot be run at all.
    """
    splits = as_splits(job.data)
    _ = splits.train
    here = machine if machine is not None else this_machine(tell)
    if here.measured is not None and is_busy():
        tell("note: other programs use the cores: times that are taken now come out too long")
    tell("counting a step")
    try:
        facts = facts_apart(job, splits, fake=here.measured is None)
    except RunFailed:
        told = rehearsal_failure(job)
        if told is None:
            raise
        raise JobError(told) from None
    problem = JobProblem(
        facts=facts,
        machine=here,
        workers=workers if workers is not None else nodes * most_workers(here),
        exactly=exactly,
        axes=tuple(axis for axis in AXES if axis in READY_AXES),
        memory_bytes=memory_bytes,
        base=settle_plan(job, Plan()),
        threads=threads,
        nodes=nodes,
    )
    check = functools.partial(refusals, job)
    return Advice(facts, problem, search_job(problem, check, wanted=top), check)


def most_workers(machine: Machine) -> int:
    """Workers that a machine has cores or devices for."""
    return machine.measured.cores if machine.measured is not None else machine.gpus_per_node


def this_machine(tell: Tell) -> Machine:
    """The figures kept for this machine, or new ones; those that others disturbed are taken anew where it is quiet."""
    kept = cached_machine()
    if kept is not None and not doubtful(kept):
        return kept
    if kept is None:
        tell("measuring this machine, once (10 s or so; `shardwise probe` does the same)")
    elif not worth_measuring_again(kept):
        tell(
            "note: this machine was measured while other programs used its cores: predictions may be off. It is measured again "
            "once they do not (or by `shardwise probe --again`)"
        )
        return kept
    else:
        tell("measuring this machine again: other programs used its cores the last time")
    with measuring(wait_seconds=WAIT_SECONDS):
        found = cached_machine() if kept is None else None  # another command may just have measured it
        if found is None:
            found = probe(tell=lambda text: None)
            keep_machine(found)
    if doubtful(found):
        tell("note: other programs used the cores meanwhile: what follows may be off")
    return found


def worth_measuring_again(machine: Machine) -> bool:
    """Whether others disturbed these figures and would not now; nor a moment ago, or every command would measure anew."""
    try:
        age = time.time() - cached_path(this_place()).stat().st_mtime
    except OSError:
        age = AGAIN_AFTER_SECONDS
    return doubtful(machine) and age >= AGAIN_AFTER_SECONDS and not is_busy()


def doubtful(machine: Machine) -> bool:
    """Whether others used the cores while this machine was measured."""
    return machine.measured is not None and was_busy(machine.measured)


def keep_machine(machine: Machine) -> None:
    """Keep the figures for later runs; a disk that does not want them is no reason to stop."""
    path = cached_path(this_place())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        machine.write(path)
    except OSError:
        return


def refusals(job: Job, plans: Sequence[Plan]) -> list[str | None]:
    """For each plan why `train` would refuse it, None where it would not: its own checks, in a process apart.

    The process is there because some checks try out the model, and a process that computed cannot be forked from.
    """
    asked = functools.partial(_refusals, job=job, plans=tuple(plans))
    try:
        return in_thread(lambda: call_in_child(asked, threads=1, device="cpu"))
    except RunFailed as error:
        if len(plans) == 1:
            return [f"its check failed: {str(error).strip().splitlines()[-1]}"]
        return [refusals(job, [plan])[0] for plan in plans]


def rehearsal_failure(job: Job) -> str | None:
    """Why the job does not run even on its first samples, as `train` would say it; None if it does."""
    return in_thread(lambda: call_in_child(functools.partial(_rehearsal, job=job), threads=1, device="cpu"))


def _rehearsal(rank: Rank, *, job: Job) -> str | None:
    try:
        check_job(job, settle_plan(job, Plan()), rehearsal=True)
    except ShardwiseError as error:
        return str(error)
    return None


def _refusals(rank: Rank, *, job: Job, plans: Sequence[Plan]) -> list[str | None]:
    found: list[str | None] = []
    tried: dict[int, Checked | PlanError] = {}
    for plan in plans:
        try:
            check_job(job, plan, tried=tried)
        except ShardwiseError as error:
            found.append(str(error))
        else:
            found.append(None)
    return found
