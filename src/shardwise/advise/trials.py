"""What a training costs on one worker and on several, where many of them share this machine: for whoever runs a sweep.

One machine has two ways to train many models: side by side on few workers each, or fewer at once on more workers each. The
first loses nothing to messages; the second has less left over at the end, and holds fewer trainings in memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardwise.advise.advice import doubtful, refusals
from shardwise.advise.auto import SHORT_SECONDS
from shardwise.advise.kept import recall, remember, signature
from shardwise.advise.longer import BUDGET_SECONDS, BUDGET_SHARE, Spending, affordable_machine
from shardwise.data.source import as_splits
from shardwise.errors import ShardwiseError, Stopped
from shardwise.planner.jobsearch import JobCandidate
from shardwise.planner.jobstep import estimate_job
from shardwise.probe.busy import is_busy
from shardwise.probe.facts import facts_apart
from shardwise.probe.length import first_step_apart, told_if_slow
from shardwise.probe.place import cached_machine, this_place
from shardwise.run.choose import Priced
from shardwise.run.loop import total_steps
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan
from shardwise.units import format_seconds

_LOOKS = 25


def price_trials(
    job: Job, *, widths: Sequence[int], cores: int, trainings: int, show: bool = True
) -> list[Priced] | str:
    """Price a training on each of these numbers of workers, with as many at once as `cores` hold.

    What was priced is kept by model, batch and machine. Nothing is priced where that would take longer than it could save.

    Args:
        job: one of the trainings.
        widths: numbers of workers, one thread each.
        cores: for all trainings together.
        trainings: how many there are.
        show: say what takes long.

    Returns:
        A price for each width that can run; or the reason why there are none, as the end of "not priced: ...".
    """
    key = signature(job, workers=None, threads=1, place=this_place())
    keys = {width: f"{key}/trials/{width}/{cores}" for width in widths}
    kept = [recall(name) if key is not None else None for name in keys.values()]
    plans = [plan for plan in kept if plan is not None and plan.prediction is not None]
    if len(plans) == len(widths):
        return _prices(plans, cached_machine())
    try:
        found = _priced(job, widths, cores=cores, trainings=trainings, show=show)
    except Stopped:
        raise
    except ShardwiseError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"its first step could not be counted ({lines[-1].strip()})"
    if isinstance(found, str):
        return found
    plans, machine = found
    for plan in plans:
        if key is not None and not doubtful(machine):
            remember(keys[plan.layout.workers], plan)
    return _prices(plans, machine)


def _priced(
    job: Job, widths: Sequence[int], *, cores: int, trainings: int, show: bool
) -> tuple[list[Plan], Machine] | str:
    splits = as_splits(job.data)
    _ = splits.train
    steps = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
    if steps is None:
        return "its data does not tell how long it is"
    with told_if_slow(show):
        once = first_step_apart(job, splits)
    expected = once * steps * trainings / min(cores, trainings)
    if expected < SHORT_SECONDS:
        return f"all of it takes about {format_seconds(expected)}, and pricing pays from {format_seconds(SHORT_SECONDS)} on"
    if not _quiet():
        return "other programs use the cores, and would be measured with it"
    spending = Spending(min(BUDGET_SECONDS, BUDGET_SHARE * expected))
    machine = affordable_machine(spending, expected, show=show)
    if machine is None:
        return "this machine was not measured yet, which pays for longer sweeps; `shardwise probe` does it now"
    facts = facts_apart(job, splits, thorough=False, timeout_seconds=max(10.0, 4 * spending.seconds))
    plans = []
    for width in widths:
        plan = Plan(layout=Layout(data=width), threads=1, precision=job.precision, micro_batch=job.micro_batch)
        copies = max(1, min(cores // width, trainings))
        estimate = estimate_job(facts, machine, plan, copies=copies)
        plans.append(JobCandidate(plan, estimate, facts.batch_size).as_plan())
    reasons = refusals(job, [replace(plan, prediction=None) for plan in plans])
    able = [plan for plan, reason in zip(plans, reasons, strict=True) if reason is None]
    return (able, machine) if able else f"no plan can run it: {reasons[0]}"


def _quiet() -> bool:
    """Whether nothing else computes here now, or soon: the sweep's own workers may still be importing."""
    return any(not is_busy() for _ in range(_LOOKS))  # a look takes a tenth of a second


def _prices(plans: Sequence[Plan], machine: Machine | None) -> list[Priced]:
    found = []
    for plan in plans:
        told = plan.prediction
        assert told is not None
        # A worker of a sweep is warm: what every process holds is there already, and most of it is shared.
        process = told.bytes_by_part.get("process", 0)
        bare = process if machine is None or machine.measured is None else machine.measured.worker_bytes
        own = max(0, told.memory_bytes - min(process, round(bare)))
        bare_plan = replace(plan, prediction=None, reasons=())
        found.append(Priced(bare_plan, told.step_seconds, own * plan.layout.workers, told.confidence))
    return found
