"""Why a plan for a job wins, what holds every other family back, and what would help most: sentences from numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardwise.errors import PlanError
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.jobsearch import (
    Check,
    JobCandidate,
    JobFound,
    JobProblem,
    family_of,
    placed_plans,
    price,
    too_large,
)
from shardwise.planner.jobstep import COMMUNICATION, PART_NAMES, JobEstimate, JobMemo, estimate_job
from shardwise.spec.layout import Layout
from shardwise.spec.machine import Figure, Machine
from shardwise.spec.plan import Plan
from shardwise.units import format_bytes, format_seconds, format_slower

MOST_FASTER = 1000.0
"""Links so many times faster that a layout would win only then are not worth a sentence."""


@dataclass(frozen=True)
class FamilyReason:
    """One family of layouts, its best member, and why it is not the winner."""

    family: str
    plan: Plan
    sentence: str


def why_best_job(problem: JobProblem, found: JobFound) -> str:
    """Where the winner's step goes, and by how much it beats one worker.

    Raises:
        PlanError: nothing can run and fits.
    """
    if found.best is None:
        raise PlanError(nothing_runs(found))
    best = found.best
    text = (
        f"{best} takes {format_seconds(best.estimate.step_seconds)} a step and {format_bytes(best.estimate.memory_bytes)} "
        f"on the fullest worker: {_where(best.estimate)}"
    )
    serial = next((item for item in found.plans if item.family == "serial" and item is not best), None)
    if best.family == "serial":
        others = [item for item in found.plans if item.family != "serial"]
        if others:
            loss = others[0].estimate.step_seconds / best.estimate.step_seconds
            longer = f"{loss:.1f} times as long" if loss > 2 else f"{100 * (loss - 1):.0f} % longer"
            longer = "no less" if loss < 1.005 else longer
            return f"{text}. Do not parallelise: {others[0]} would take {longer}"
        return text
    if serial is not None:
        gain = serial.estimate.step_seconds / best.estimate.step_seconds
        text += f". That is {gain:.2f} times as fast as {serial}"
    return text


def nothing_runs(found: JobFound) -> str:
    """Why there is no plan at all."""
    near = [item for item in found.refused if item.estimate is not None]
    if near:
        smallest = min(near, key=lambda item: item.estimate.memory_bytes if item.estimate else 0.0)
        return f"nothing fits: {smallest.plan} needs least, and {smallest.reason}. Use more workers or more memory"
    reasons = "; ".join(f"{item.plan}: {item.reason}" for item in found.refused[:3])
    return f"no layout can run: {reasons or 'there is no layout for so many workers'}"


def losers_of_job(problem: JobProblem, found: JobFound, constants: Constants = DEFAULT) -> tuple[FamilyReason, ...]:
    """For every family beside the winner's: what binds its best member, or the link speed at which it would win."""
    reasons: dict[str, FamilyReason] = {}
    best = found.best
    for item in found.plans:
        if best is not None and item.family != best.family and item.family not in reasons:
            sentence = _loses(problem, item, found, constants)
            reasons[item.family] = FamilyReason(item.family, item.plan, sentence)
    for refused in found.refused:
        name = family_of(refused.plan)
        if name not in reasons and (best is None or name != best.family):
            reasons[name] = FamilyReason(name, refused.plan, refused.reason)
    return tuple(reasons.values())


def why_not_job(
    problem: JobProblem, wanted: Layout, found: JobFound, check: Check, constants: Constants = DEFAULT
) -> str:
    """Why a layout is not the winner; axes that `wanted` leaves at 1 are free unless it names all workers."""
    degrees = {axis: degree for axis, degree in wanted.degrees.items() if degree > 1}
    alike = [
        (plan, nodes)
        for plan, nodes in placed_plans(replace(problem, axes=tuple(wanted.degrees)))
        if all(plan.layout.degrees[axis] == degree for axis, degree in degrees.items())
        and (degrees or plan.layout.workers == 1)
    ]
    if not alike:
        plan = replace(problem.base, layout=wanted, threads=problem.threads or 1)
        reason = check([plan])[0]
        return reason or (
            f"{wanted} does not go with {problem.workers} workers and {problem.facts.batch_size} samples a step: every "
            "worker needs at least one sample, and the degrees must multiply to a number of workers there is (--workers: more)"
        )
    priced = sorted(
        (price(problem, plan, constants, nodes) for plan, nodes in alike), key=lambda one: one.estimate.step_seconds
    )
    reasons = check([item.plan for item in priced])
    able = [item for item, reason in zip(priced, reasons, strict=True) if reason is None]
    if not able:
        return str(reasons[0])
    fitting = [item for item in able if item.estimate.fits]
    if not fitting:
        return too_large(min(able, key=lambda one: one.estimate.memory_bytes).estimate)
    item = fitting[0]
    if found.best is None or item.estimate.step_seconds <= found.best.estimate.step_seconds:
        return f"nothing speaks against it: {item} is the best plan found"
    return f"its best form is {item}; {_loses(problem, item, found, constants)}"


def what_helps_job(problem: JobProblem, found: JobFound, constants: Constants = DEFAULT) -> tuple[str, ...]:
    """What would shorten the winner's step most: faster links, a larger batch, more memory.

    Where another plan would win then, it is named.
    """
    if found.best is None:
        return ()
    best, facts = found.best, problem.facts
    now = best.estimate.step_seconds
    gains: list[tuple[float, str]] = []
    then, by = _first(replace(problem, machine=faster_links(problem.machine, 2.0)), found, constants)
    gains.append((now / then, f"links twice as fast: {now / then:.2f} times as fast{by}"))
    then, by = _first(replace(problem, facts=replace(facts, batch_size=2 * facts.batch_size)), found, constants)
    gain = 2 * now / then
    gains.append((gain, f"twice the global batch: {gain:.2f} times the samples per second{by}"))
    for item in found.refused:
        if item.estimate is not None and item.estimate.step_seconds < now:
            gain = now / item.estimate.step_seconds
            needs = format_bytes(item.estimate.memory_bytes)
            gains.append((gain, f"{needs} for each worker would allow {item.plan}: {gain:.2f} times as fast"))
            break
    if best.estimate.share(("data",)) > 0.05:
        gain = now / (now - best.estimate.seconds["data"])
        gains.append((gain, f"data that is ready in memory: {gain:.2f} times as fast"))
        if facts.data_whole and best.plan.layout.replicas > 1:
            part = best.estimate.seconds["data"] / best.plan.layout.replicas
            gain = now / (now - best.estimate.seconds["data"] + part)
            gains.append((gain, f"a sharded stream, of which each worker reads its own part: {gain:.2f} times as fast"))
    return tuple(sentence for gain, sentence in sorted(gains, key=lambda one: -one[0]) if gain > 1.01)


def _first(changed: JobProblem, found: JobFound, constants: Constants) -> tuple[float, str]:
    """Seconds of the plan that would win in a changed problem, of those that were found; and its name where it is another."""
    assert found.best is not None
    memo = JobMemo()
    priced = [price(changed, one.plan, constants, one.nodes, memo) for one in found.plans]
    first = min(
        (one for one in priced if one.estimate.fits), key=lambda one: one.estimate.step_seconds, default=priced[0]
    )
    same = (first.plan, first.nodes) == (found.best.plan, found.best.nodes)
    return first.estimate.step_seconds, "" if same else f", with {first}"


def faster_links(machine: Machine, factor: float) -> Machine:
    """The same machine with every message so many times as fast."""
    measured = machine.measured
    if measured is not None:
        messages = tuple(replace(item, seconds=item.seconds / factor) for item in measured.messages)
        measured = replace(measured, messages=messages)

    def faster(figure: Figure) -> Figure:
        return replace(figure, value=factor * figure.value, source=f"{factor:g} times: {figure.source}")

    return replace(
        machine,
        measured=measured,
        intra=replace(machine.intra, bytes_per_second=faster(machine.intra.bytes_per_second)),
        inter=replace(machine.inter, bytes_per_second=faster(machine.inter.bytes_per_second)),
    )


def _loses(problem: JobProblem, item: JobCandidate, found: JobFound, constants: Constants) -> str:
    assert found.best is not None
    mine, theirs = item.estimate, found.best.estimate
    slower = mine.step_seconds / theirs.step_seconds - 1.0
    if slower <= 0.005:
        return f"it is as fast as the winner within {100 * max(slower, 0.001):.1f} %"
    extra = {name: mine.seconds.get(name, 0.0) - theirs.seconds.get(name, 0.0) for name in mine.seconds}
    worst = max(extra, key=lambda name: extra[name])
    share = mine.seconds[worst] / mine.step_seconds
    most = "most" if extra[worst] > 0.5 * (mine.step_seconds - theirs.step_seconds) else "the largest part"
    sentence = (
        f"{format_slower(slower)}; {most} of that is {PART_NAMES[worst]}, which takes {100 * share:.0f} % of its step"
    )
    if worst in COMMUNICATION:
        rivals = [found.best, *(one for one in found.plans[1:] if one.family != item.family)]
        factor = break_even(problem, item, rivals, constants)
        if factor is None:
            sentence += "; no faster link would make it win"
        elif factor > 1.0:
            sentence += f"; it would win with links {factor:.1f} times as fast"
    return sentence


def break_even(
    problem: JobProblem, item: JobCandidate, rivals: Sequence[JobCandidate], constants: Constants
) -> float | None:
    """How many times as fast links must be for `item` to be as fast as every rival on those links; None if no speed does it."""

    def at(one: JobCandidate, factor: float) -> float:
        machine = faster_links(problem.machine, factor)
        return estimate_job(problem.facts, machine, one.plan, constants, nodes=one.nodes).step_seconds

    def first(some: Sequence[JobCandidate], factor: float) -> JobCandidate:
        return min(some, key=lambda one: at(one, factor))

    if at(item, MOST_FASTER) > at(first(rivals, MOST_FASTER), MOST_FASTER):
        return None
    active = [rivals[0]]
    low, high = 1.0, MOST_FASTER
    while True:
        while high > 1.01 * low:
            middle = (low * high) ** 0.5
            slower = at(item, middle) > at(first(active, middle), middle)
            low, high = (middle, high) if slower else (low, middle)
        ahead = first(rivals, high)  # who is ahead there, of all
        if ahead in active or at(item, high) <= at(ahead, high):
            return high
        active.append(ahead)
        low, high = high, MOST_FASTER


def _where(found: JobEstimate) -> str:
    shares: list[tuple[float, str]] = sorted(
        ((value / found.step_seconds, PART_NAMES[name]) for name, value in found.seconds.items()), reverse=True
    )
    return ", ".join(f"{100 * share:.0f} % {text}" for share, text in shares if share > 0.02)
