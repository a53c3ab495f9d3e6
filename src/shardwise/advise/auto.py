"""The plan of a training that names none: the planner's, where planning can pay; and never for longer than it can save.

A run of seconds takes the rule of `run/choose.py`, or one worker where more could not even pay for their start. A longer one
is counted, priced, and from some length on its best plans are tried in processes apart (`advise/longer.py`). What was decided
is kept by model, batch and machine, so that the next run starts at once. The choice never changes what is computed: every
plan here takes the same global steps.

This file is on the way of every training: it loads nothing of the planner before a run is known to be long.
"""

from __future__ import annotations

from dataclasses import replace

from shardwise.advise.kept import DOUBTFUL, recall, remember, signature
from shardwise.data.loader import steps_per_epoch
from shardwise.data.source import Splits, as_splits
from shardwise.errors import ShardwiseError, Stopped
from shardwise.probe.busy import is_busy
from shardwise.probe.length import first_step_apart, told_if_slow
from shardwise.probe.place import measuring, this_place
from shardwise.run.choose import choose_plan, usable_cores
from shardwise.run.loop import total_steps
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.units import format_seconds

SHORT_SECONDS = 20.0
"""Expected length of a run below which nothing is planned: planning costs about a second, and saves a part of the run."""

START_SECONDS = 0.2
"""What starting more workers takes than starting one (whole processes of the digits job less their steps, 2026-11-26)."""

MEETING_SECONDS = 5e-4
"""What a step on several workers takes at least beside its computation: gradients and counts summed, waiting (as above)."""

FORWARD_SHARE = 1.0 / 3.0
"""Of a step: the forward pass, which is what evaluation takes; the backward pass has two products for each of its products."""

SHORT = "a short run: planning would take longer than it could save"


class Busy(Exception):
    """Nothing can be measured now; nothing is kept, so that the next run asks again."""


def automatic(
    job: Job,
    *,
    workers: int | None,
    threads: int | None,
    device: str,
    nodes: int = 1,
    trial: bool = True,
    show: bool = True,
) -> Plan:
    """The plan for a training on this machine.

    Args:
        job: what to train.
        workers, threads: fixed by the user; None leaves them open.
        device: type of device. On accelerators and over several nodes nothing is measured yet, and the rule is taken.
        nodes: number of machines.
        trial: plans may be tried for some steps.
        show: say what takes time.
    """
    rule = choose_plan(job, workers=workers, threads=threads, device=device, nodes=nodes)
    if device != "cpu" or nodes > 1 or job.compile or (usable_cores() == 1 and workers is None) or workers == 1:
        return rule
    key = signature(job, workers=workers, threads=threads, place=this_place())
    kept = recall(key)
    if kept is not None:
        return kept
    splits = as_splits(job.data)
    _ = splits.train
    try:
        plan = _planned(job, splits, rule, workers=workers, threads=threads, trial=trial, show=show)
    except Busy:
        return replace(
            rule, reasons=(*rule.reasons, "other programs use the cores: measuring plans would measure them")
        )
    except Stopped:
        raise
    except ShardwiseError:
        return rule  # what is wrong with the job shows in a moment, in its own words
    if DOUBTFUL not in plan.reasons:
        remember(key, plan)
    return plan


def _short(job: Job, splits: Splits, rule: Plan, once: float, steps: int, threads: int | None) -> Plan:
    """The plan of a run too short to plan, with its workers left open; `once` is the time of one of its steps on one worker."""
    epoch = steps_per_epoch(splits.train, job.batch_size) or steps
    batches = steps_per_epoch(splits.test, job.batch_size) if splits.test is not None else None
    busy = once * (steps + max(1, steps // epoch) * (batches or 0) * FORWARD_SHARE)
    if busy * (1.0 - 1.0 / rule.layout.workers) < START_SECONDS + steps * MEETING_SECONDS:
        took = (
            f"{format_seconds(busy)} of work for one worker: more would take longer to start and to meet than they save"
        )
        return Plan(threads=threads or 1, reasons=(took,))
    return replace(rule, reasons=(*rule.reasons, SHORT))


def _planned(
    job: Job, splits: Splits, rule: Plan, *, workers: int | None, threads: int | None, trial: bool, show: bool
) -> Plan:
    steps = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
    with told_if_slow(show):
        once = first_step_apart(job, splits)
    # Streams do not tell their length; they are there because it is long.
    expected = once * steps / rule.layout.workers if steps is not None else 20 * SHORT_SECONDS
    if steps is not None and expected < SHORT_SECONDS:
        if workers is None and rule.layout.workers > 1:
            return _short(job, splits, rule, once, steps, threads)
        return replace(rule, reasons=(*rule.reasons, SHORT))
    with measuring() as alone:
        if not alone or is_busy():
            raise Busy
        from shardwise.advise.longer import plan_longer

        return plan_longer(
            job, splits, rule, expected_seconds=expected, workers=workers, threads=threads, trial=trial, show=show
        )
