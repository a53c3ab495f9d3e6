"""Planning a long run within a budget: count, price, and try the best plans by successive halving."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shardwise.advise.advice import keep_machine, refusals
from shardwise.advise.trial import Tried, try_plan
from shardwise.data.source import Splits
from shardwise.planner.jobsearch import JobFound, JobProblem, search_job
from shardwise.probe.facts import facts_apart
from shardwise.probe.machine import probe
from shardwise.probe.place import cached_machine
from shardwise.run.choose import usable_cores
from shardwise.run.progress import tell as tell_people
from shardwise.spec.job import Job
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan, Prediction
from shardwise.units import format_seconds

BUDGET_SHARE = 0.03
BUDGET_SECONDS = 30.0
"""Planning and trials may take this share of the expected run, and never longer than this."""

QUICK_PROBE_SECONDS, PROBE_SECONDS, FACTS_SECONDS, TRIAL_SECONDS = 4.5, 15.0, 1.5, 1.0
"""What the parts of planning take here, for staying within the budget (measured on two cores, 2026-11-26)."""

CLOSE = 1.5
"""Plans predicted within this factor of the best are worth a trial."""

MOST_TRIED = 4

AXES = ("data", "context")
"""Axes that may be chosen without being asked for. Sharding, tensor, pipeline and expert parallelism save memory; on the
cores of one machine they win nothing in time, and `shardwise plan` tells of them."""


@dataclass
class Spending:
    """The budget of planning one run."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds that may still be spent."""
        return self.seconds - (time.perf_counter() - self.began)


def plan_longer(
    job: Job,
    splits: Splits,
    rule: Plan,
    *,
    expected_seconds: float,
    workers: int | None,
    threads: int | None,
    trial: bool,
    show: bool,
) -> Plan:
    """The plan of a run of about `expected_seconds`; `rule` where the budget allows no better.

    Args:
        rule: the plan that measures nothing.
        workers, threads: fixed by the user; None leaves them open.
        trial: plans may be tried.
        show: say what takes time.
    """
    spending = Spending(min(BUDGET_SECONDS, BUDGET_SHARE * expected_seconds))
    machine = affordable_machine(spending, expected_seconds, show=show)
    if machine is None:
        return rule
    facts = facts_apart(job, splits, thorough=False, timeout_seconds=max(10.0, 4 * spending.seconds))
    problem = JobProblem(
        facts=facts,
        machine=machine,
        workers=workers if workers is not None else usable_cores(),
        exactly=workers is not None,
        axes=AXES,
        threads=threads,
        base=replace(rule, layout=Plan().layout, threads=None, reasons=()),
    )
    found = search_job(problem, lambda plans: [None for _ in plans], wanted=50)
    return _settled(job, splits, rule, found, spending, trial=trial, show=show)


def affordable_machine(spending: Spending, expected_seconds: float, *, show: bool) -> Machine | None:
    """The figures of this machine, measured where there are none and the budget has room for it beside counting a step.

    None where the budget has no room.
    """
    machine = cached_machine()
    if machine is not None:
        return machine if spending.left >= 0.5 * FACTS_SECONDS else None
    if spending.left < QUICK_PROBE_SECONDS + FACTS_SECONDS:
        return None
    thorough = spending.left > PROBE_SECONDS + FACTS_SECONDS
    _tell(show, f"planning a run of about {format_seconds(expected_seconds)}: measuring this machine")
    machine = probe(quick=not thorough)
    if thorough:
        keep_machine(machine)
    return machine


def _settled(
    job: Job, splits: Splits, rule: Plan, found: JobFound, spending: Spending, *, trial: bool, show: bool
) -> Plan:
    """The best plan that the run's own checks accept, after trials where these can pay."""
    ranked = found.plans[: 3 * MOST_TRIED]
    reasons = refusals(job, [item.plan for item in ranked])
    able = [item for item, reason in zip(ranked, reasons, strict=True) if reason is None]
    close = [item for item in able if item.estimate.step_seconds <= CLOSE * able[0].estimate.step_seconds][:MOST_TRIED]
    if not close:
        return rule
    best = close[0]
    told = f"predicted {format_seconds(best.estimate.step_seconds)} a step, the least of {found.priced} plans"
    if not trial or len(close) == 1 or spending.left < 2 * TRIAL_SECONDS:
        return best.as_plan((told,))
    _tell(show, f"trying {len(close)} plans, at most {format_seconds(spending.left)} (--no-trial skips this)")
    began = time.perf_counter()
    tried = halve([item.plan for item in close], functools.partial(_try, job, splits), spending)
    good = [item for item in tried if item.failure is None]
    if not good:
        return best.as_plan((told,))
    first = min(good, key=lambda item: item.step_seconds)
    prediction = next(item.as_plan().prediction for item in close if item.plan == first.plan)
    assert prediction is not None
    took = format_seconds(time.perf_counter() - began)
    others = ", ".join(
        f"{item.plan} {format_seconds(item.step_seconds) if item.failure is None else 'failed'}"
        for item in tried
        if item.plan != first.plan
    )
    sentence = f"tried {len(tried)} plans in {took}: {format_seconds(first.step_seconds)} a step, against {others}"
    return replace(first.plan, prediction=_seen(prediction, first), reasons=(sentence,))


def halve(plans: list[Plan], attempt: Callable[[Plan, float], Tried], spending: Spending) -> list[Tried]:
    """Successive halving: all plans for a few steps, the better half for twice as many, until one is left or time is up.

    Args:
        plans: the most promising first.
        attempt: tries a plan for so many seconds of steps.
        spending: no trial is begun that would probably exceed it.

    Returns:
        The last trial of every plan that was tried, the plans of later rounds first.
    """
    latest: dict[int, Tried] = {}
    left = list(range(len(plans)))
    seconds = 0.25
    while left:
        for index in left:
            before = latest.get(index)
            likely = before.seconds + seconds if before is not None else TRIAL_SECONDS
            if spending.left < likely:
                return _by_round(latest, left)
            latest[index] = attempt(plans[index], seconds)
        ranked = sorted((i for i in left if latest[i].failure is None), key=lambda i: latest[i].step_seconds)
        if len(ranked) <= 1:
            return _by_round(latest, ranked)
        left = ranked[: (len(ranked) + 1) // 2]
        seconds *= 2
    return _by_round(latest, left)


def _by_round(latest: dict[int, Tried], left: list[int]) -> list[Tried]:
    order = sorted(latest, key=lambda index: (index not in left, latest[index].step_seconds))
    return [latest[index] for index in order]


def _try(job: Job, splits: Splits, plan: Plan, seconds: float) -> Tried:
    return try_plan(job, splits, plan, step_budget_seconds=seconds)


def _seen(prediction: Prediction, tried: Tried) -> Prediction:
    """The prediction with what the trial saw; the parts keep their shares."""
    scale = tried.step_seconds / prediction.step_seconds
    return replace(
        prediction,
        step_seconds=tried.step_seconds,
        seconds_by_part={name: value * scale for name, value in prediction.seconds_by_part.items()},
        confidence=f"tried for {tried.steps} steps",
    )


def _tell(show: bool, text: str) -> None:
    if show:
        tell_people(text)
