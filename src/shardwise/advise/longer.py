"""Planning a long run within a budget: count, price, and try the plans that may be the best."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from statistics import median

from shardwise.advise.advice import doubtful, keep_machine, refusals, worth_measuring_again
from shardwise.advise.contest import Contender, Outcome, Seen, hold
from shardwise.advise.kept import DOUBTFUL
from shardwise.advise.trial import LEAST_STEPS, WARM_STEPS, Tried, try_plan
from shardwise.data.source import Splits
from shardwise.planner.confidence import counted_width
from shardwise.planner.jobsearch import JobCandidate, JobFound, JobProblem, search_job
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

TRIED_SECONDS, START_SECONDS = 0.25, 0.5
"""Timed steps of one trial, and what starting and ending its processes takes here (2026-11-26)."""

LEAST_LIMIT_SECONDS = 5.0
"""A trial may take what is left of the budget, and so long at least: a busy machine starts processes slowly."""

MOST_TRIED = 4

UNCHECKED_WITHIN = 1.0
"""What a prediction is taken to be within where no step was seen on this machine."""

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
    plan = _settled(job, splits, rule, found, spending, expected_seconds, trial=trial, show=show)
    return replace(plan, reasons=(*plan.reasons, DOUBTFUL)) if doubtful(machine) else plan


def affordable_machine(spending: Spending, expected_seconds: float, *, show: bool) -> Machine | None:
    """The figures of this machine, measured where there are none and the budget has room for it beside counting a step.

    None where the budget has no room.
    """
    machine = cached_machine()
    thorough = spending.left > PROBE_SECONDS + FACTS_SECONDS
    if machine is not None and not (thorough and worth_measuring_again(machine)):
        return machine if spending.left >= 0.5 * FACTS_SECONDS else None
    if spending.left < QUICK_PROBE_SECONDS + FACTS_SECONDS:
        return None
    _tell(show, f"planning a run of about {format_seconds(expected_seconds)}: measuring this machine")
    machine = probe(quick=not thorough)
    if thorough:
        keep_machine(machine)
    return machine


def _settled(
    job: Job,
    splits: Splits,
    rule: Plan,
    found: JobFound,
    spending: Spending,
    expected_seconds: float,
    *,
    trial: bool,
    show: bool,
) -> Plan:
    """The best plan that the run's own checks accept, after trials where these can pay."""
    ranked = found.plans[: 3 * MOST_TRIED]
    reasons = refusals(job, [item.plan for item in ranked])
    able = [item for item, reason in zip(ranked, reasons, strict=True) if reason is None][:MOST_TRIED]
    if not able:
        return rule
    best = able[0]
    told = f"predicted {format_seconds(best.estimate.step_seconds)} a step, the least of {found.priced} plans"
    if not trial or len(able) == 1 or spending.left < 2 * TRIAL_SECONDS:
        return best.as_plan((told,))
    _tell(
        show, f"trying the best of {len(able)} plans, at most {format_seconds(spending.left)} (--no-trial skips this)"
    )
    began = time.perf_counter()
    seen: list[list[Tried]] = [[] for _ in able]

    def attempt(index: int) -> Seen:
        tried = _try(job, splits, able[index].plan, TRIED_SECONDS, max(LEAST_LIMIT_SECONDS, spending.left))
        seen[index].append(tried)
        return Seen(tried.step_seconds, tried.seconds, tried.disturbed, tried.failure is not None)

    outcome = hold(
        [contender(item) for item in able], attempt, training_seconds=expected_seconds, left=lambda: spending.left
    )
    if outcome.winner is None:
        return best.as_plan((told,))
    winner = able[outcome.winner]
    quiet = [one for one in seen[outcome.winner] if one.failure is None and not one.disturbed]
    if not quiet:
        spoiled = "; other programs spoiled the trials" if outcome.disturbed else ""
        return winner.as_plan((f"predicted {format_seconds(winner.estimate.step_seconds)} a step{spoiled}",))
    prediction = winner.as_plan().prediction
    assert prediction is not None
    took = format_seconds(time.perf_counter() - began)
    return replace(
        winner.plan,
        prediction=_seen(prediction, winner.estimate.seconds["loop"], quiet),
        reasons=(_sentence(able, seen, outcome, took),),
    )


def contender(item: JobCandidate) -> Contender:
    """A priced plan as the contest takes it. A trial has no loop around its steps, so the prediction goes without it."""
    found = item.estimate
    step = max(1e-9, found.step_seconds - found.seconds["loop"])
    within = counted_width(found.kind) if found.measured else UNCHECKED_WITHIN
    took = START_SECONDS + WARM_STEPS * step + max(TRIED_SECONDS, LEAST_STEPS * step)
    return Contender(step, within, item.plan.threads or 1, took)


def _sentence(able: list[JobCandidate], seen: list[list[Tried]], outcome: Outcome, took: str) -> str:
    """What was tried and what came out of it."""
    told = []
    for index, (item, trials) in enumerate(zip(able, seen, strict=True)):
        good = [one.step_seconds for one in trials if one.failure is None and not one.disturbed]
        if good and index != outcome.winner:
            predicted = format_seconds(item.estimate.step_seconds)
            told.append(f"{item.plan} {format_seconds(median(good))} (predicted {predicted})")
        elif index in outcome.failed:
            told.append(f"{item.plan} failed")
    assert outcome.winner is not None
    mine = [one.step_seconds for one in seen[outcome.winner] if one.failure is None and not one.disturbed]
    text = f"tried {sum(1 for trials in seen if trials)} plans in {took} ({outcome.rounds} rounds): "
    text += f"{format_seconds(median(mine))} a step"
    if told:
        text += f", against {', '.join(told)}"
    text += f"; fastest with a chance of {outcome.chance:.0%}"
    if outcome.disturbed:
        text += f"; {outcome.disturbed} trials left out, which other programs spoiled"
    return text


def _try(job: Job, splits: Splits, plan: Plan, seconds: float, limit: float) -> Tried:
    return try_plan(job, splits, plan, step_budget_seconds=seconds, limit_seconds=limit)


def _seen(prediction: Prediction, loop_seconds: float, trials: list[Tried]) -> Prediction:
    """The prediction with what the trials saw and the loop around it; the parts keep their shares."""
    step = median(one.step_seconds for one in trials) + loop_seconds
    scale = step / prediction.step_seconds
    return replace(
        prediction,
        step_seconds=step,
        seconds_by_part={name: value * scale for name, value in prediction.seconds_by_part.items()},
        confidence=f"tried for {sum(one.steps for one in trials)} steps",
    )


def _tell(show: bool, text: str) -> None:
    if show:
        tell_people(text)
