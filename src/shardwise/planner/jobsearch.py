"""Every layout of a job that its workers allow, priced, checked by those who run it, and ranked."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from shardwise.errors import PlanError
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.jobstep import JobEstimate, JobMemo, estimate_job
from shardwise.spec.layout import AXES, Layout
from shardwise.spec.machine import Machine
from shardwise.spec.plan import HALVED, V_SHAPED, Plan, Prediction
from shardwise.spec.runnable import refusals
from shardwise.spec.schedule import stages_for
from shardwise.spec.work import JobFacts

MOST_LAYOUTS = 4000
"""Layouts priced at most; more workers than that many layouts need is a matter for `--model`."""

Check = Callable[[Sequence[Plan]], list[str | None]]
"""Plans -> for each why it cannot run, None where it can: the checks of `train` itself."""


@dataclass(frozen=True, kw_only=True)
class JobProblem:
    """What to train on what.

    Attributes:
        facts: the job.
        machine: this machine (measured) or one of the catalogue.
        workers: ranks at most; with `exactly`, ranks.
        axes: axes that may be used.
        memory_bytes: what one worker may use, where that is less than the machine says.
        base: settings that every plan shares (precision, compile, micro_batch of the job).
        threads: compute threads per worker, where the user fixed them.
        nodes: machines like the measured one; a plan runs on one of them or on all. Catalogue machines have theirs in
            `workers`.
    """

    facts: JobFacts
    machine: Machine
    workers: int
    axes: tuple[str, ...] = AXES
    exactly: bool = False
    memory_bytes: float | None = None
    base: Plan = field(default_factory=Plan)
    threads: int | None = None
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise PlanError(f"workers={self.workers}: at least 1 is needed")
        if self.nodes > 1 and self.machine.measured is None:
            raise PlanError(f"nodes={self.nodes}: a catalogue machine has its nodes in the number of workers")


@dataclass(frozen=True)
class JobCandidate:
    """A plan and what it is expected to cost; `nodes`: measured machines that its workers are spread over."""

    plan: Plan
    estimate: JobEstimate
    samples: int
    nodes: int = 1

    @property
    def family(self) -> str:
        """The kinds of parallelism, joined by `+`; `serial` for none."""
        return family_of(self.plan)

    @property
    def samples_per_second(self) -> float:
        """Samples of the global batch over the step."""
        return self.samples / self.estimate.step_seconds

    def __str__(self) -> str:
        return f"{self.plan} on {self.nodes} nodes" if self.nodes > 1 else str(self.plan)

    def as_plan(self, reasons: tuple[str, ...] = ()) -> Plan:
        """The plan with its prediction, ready to be written down and run."""
        found = self.estimate
        prediction = Prediction(
            step_seconds=found.step_seconds,
            memory_bytes=round(found.memory_bytes),
            seconds_by_part={name: value for name, value in found.seconds.items() if value > 0},
            bytes_by_part={name: round(value) for name, value in found.memory.items() if value > 0},
            confidence=found.confidence,
            made_for=self.plan.planned_for(self.samples),
        )
        return replace(self.plan, prediction=prediction, reasons=reasons)


@dataclass(frozen=True)
class Refused:
    """A plan that is out, and why: it cannot run, or does not fit."""

    plan: Plan
    reason: str
    estimate: JobEstimate | None = None


@dataclass(frozen=True)
class JobFound:
    """Result of a search: what can run and fits, fastest first; the rest with reasons."""

    plans: tuple[JobCandidate, ...]
    refused: tuple[Refused, ...]
    priced: int

    @property
    def best(self) -> JobCandidate | None:
        """The winner, None if nothing can run and fits."""
        return self.plans[0] if self.plans else None


def search_job(problem: JobProblem, check: Check, constants: Constants = DEFAULT, *, wanted: int = 12) -> JobFound:
    """Price every layout, and let `check` say which of them can run, from the fastest on until `wanted` can.

    The fastest of every family is checked too, so that there is a word about each.
    """
    memo = JobMemo()
    priced = [price(problem, plan, constants, nodes, memo) for plan, nodes in placed_plans(problem)]
    priced = _with_room(problem, priced, constants, memo)
    priced.sort(key=_order)
    firsts = {item.family: item for item in reversed(priced)}
    plans: list[JobCandidate] = []
    refused: list[Refused] = []
    queue = list(priced)
    while queue and len(plans) < wanted:
        batch, queue = queue[:wanted], queue[wanted:]
        _sort_out(batch, check, plans, refused)
    seen = {id(item) for item in priced[: len(priced) - len(queue)]}
    _sort_out([item for item in firsts.values() if id(item) not in seen], check, plans, refused)
    plans.sort(key=_order)
    return JobFound(tuple(plans), tuple(refused), len(priced))


def price(
    problem: JobProblem, plan: Plan, constants: Constants = DEFAULT, nodes: int = 1, memo: JobMemo | None = None
) -> JobCandidate:
    """What a plan is expected to cost; `nodes`: measured machines that its workers are spread over; `memo`: of this problem."""
    found = estimate_job(problem.facts, problem.machine, plan, constants, nodes=nodes, memo=memo)
    if problem.memory_bytes is not None:
        found = replace(found, room_bytes=min(found.room_bytes, problem.memory_bytes))
    return JobCandidate(plan, found, problem.facts.batch_size, nodes)


def plans_of(problem: JobProblem) -> Iterator[Plan]:
    """Every layout over the allowed axes and numbers of workers, with the threads that go with it."""
    return (plan for plan, _ in placed_plans(problem))


def placed_plans(problem: JobProblem) -> Iterator[tuple[Plan, int]]:
    """The same, each with the measured machines that it is spread over: one, where it has the cores, or all."""
    facts = problem.facts
    count = 0
    for workers in _worker_counts(problem):
        for layout in layouts(workers, problem.axes, facts.batch_size):
            if layout.expert > 1 and not facts.expert_bytes:
                continue
            for nodes in _node_counts(problem, workers):
                for threads, micro in product(_threads(problem, workers // nodes), _micro_batches(problem, layout)):
                    plan = replace(problem.base.with_layout(layout), threads=threads, micro_batch=micro)
                    for scheduled in _schedules(problem, plan):
                        count += 1
                        if count > MOST_LAYOUTS:
                            return
                        yield scheduled, nodes


def _schedules(problem: JobProblem, plan: Plan) -> Iterator[Plan]:
    """The plan; where it shards, the same at ZeRO stage 2; and where its pipeline has several micro-batches and its schedule is
    open, the same under others that run.

    Those with several stages a worker need as many places for cuts; those with halved passes do not go with experts.
    """
    yield plan
    facts, layout = problem.facts, plan.layout
    if layout.shard > 1 and plan.zero_stage is None:
        yield replace(plan, zero_stage=2)
    share = math.ceil(facts.batch_size / layout.replicas)
    if layout.pipeline == 1 or plan.schedule != Plan().schedule or not plan.micro_batch or plan.micro_batch >= share:
        return
    for schedule in ("interleaved1f1b", "zerobubble", *V_SHAPED):
        other = replace(plan, schedule=schedule)
        stages = stages_for(schedule, layout.pipeline)
        if stages > layout.pipeline and len(facts.cuts) < stages - 1:
            continue
        if schedule in HALVED and facts.expert_bytes:
            continue
        if next(refusals(other), None) is None:
            yield other


def _micro_batches(problem: JobProblem, layout: Layout) -> list[int | None]:
    """What may go through a pipeline at a time, where the job leaves it open: the whole share of a replica, so that stages work
    one after the other, or half of a stage's part of it."""
    given = problem.base.micro_batch
    share = math.ceil(problem.facts.batch_size / layout.replicas)
    if given is not None or layout.pipeline == 1 or problem.facts.norm_layers or share == 1:
        return [given]
    return [None, math.ceil(share / (2 * layout.pipeline))]


def _node_counts(problem: JobProblem, workers: int) -> list[int]:
    if problem.nodes == 1 or problem.machine.measured is None:
        return [1]
    alone = [1] if workers <= problem.machine.measured.cores else []
    return [*alone, problem.nodes] if workers % problem.nodes == 0 else alone


def layouts(workers: int, axes: Sequence[str], batch_size: int) -> Iterator[Layout]:
    """All ways to write `workers` as a product of degrees of `axes` in which every worker has a sample."""
    used = [axis for axis in AXES if axis in axes]
    for degrees in _products(workers, len(used)):
        layout = Layout(**dict(zip(used, degrees, strict=True)))
        if layout.replicas <= batch_size:
            yield layout


def _products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `number` as a product of so many whole numbers, in order."""
    if factors == 0:
        yield from [()] if number == 1 else []
    elif factors == 1:
        yield (number,)
    else:
        for first in (value for value in range(1, number + 1) if number % value == 0):
            yield from ((first, *rest) for rest in _products(number // first, factors - 1))


def family_of(plan: Plan) -> str:
    """`data+tensor` for a plan that uses both; `serial` for none."""
    return "+".join(axis for axis in AXES if plan.layout.degrees[axis] > 1) or "serial"


def _order(item: JobCandidate) -> tuple[bool, float, int, int]:
    """What fits first, then the fastest; of equals the one that splits in the plainest way."""
    others = sum(degree > 1 for axis, degree in item.plan.layout.degrees.items() if axis != "data")
    return not item.estimate.fits, item.estimate.step_seconds, item.nodes, others


def _sort_out(batch: Sequence[JobCandidate], check: Check, plans: list[JobCandidate], refused: list[Refused]) -> None:
    if not batch:
        return
    for item, reason in zip(batch, check([item.plan for item in batch]), strict=True):
        if reason is not None:
            refused.append(Refused(item.plan, reason))
        elif not item.estimate.fits:
            refused.append(Refused(item.plan, too_large(item.estimate), item.estimate))
        else:
            plans.append(item)


def too_large(found: JobEstimate) -> str:
    """How much a plan needs, how much there is, and what takes most."""
    from shardwise.units import format_bytes

    name, size = max(found.memory.items(), key=lambda one: one[1])
    return (
        f"it does not fit: it needs {format_bytes(found.memory_bytes)} of {format_bytes(found.room_bytes)} a worker, "
        f"{format_bytes(size)} of it {name}"
    )


def _with_room(
    problem: JobProblem, priced: list[JobCandidate], constants: Constants, memo: JobMemo
) -> list[JobCandidate]:
    """Plans that do not fit, with the largest micro-batch (a half, a quarter, ... of a share) at which they do."""
    found = []
    for item in priced:
        share = math.ceil(problem.facts.batch_size / item.plan.layout.replicas)
        smaller = item
        micro = item.plan.micro_batch or share
        while not smaller.estimate.fits and micro > 1 and problem.facts.norm_layers == 0:
            micro = math.ceil(micro / 2)
            smaller = price(problem, replace(item.plan, micro_batch=micro), constants, item.nodes, memo)
        found.append(smaller if smaller.estimate.fits else item)
    return found


def _worker_counts(problem: JobProblem) -> list[int]:
    if problem.exactly:
        return [problem.workers]
    if problem.workers <= 8:
        return list(range(1, problem.workers + 1))
    counts = [value for value in range(1, problem.workers + 1) if problem.workers % value == 0]
    powers = [1 << power for power in range(problem.workers.bit_length()) if 1 << power <= problem.workers]
    return sorted({*counts[-3:], *powers[-4:], 1})


def _threads(problem: JobProblem, workers: int) -> list[int | None]:
    if problem.threads is not None:
        return [problem.threads]
    if problem.base.threads is not None:
        return [problem.base.threads]
    if problem.machine.measured is None:
        return [None]
    each = max(1, problem.machine.measured.cores // workers)
    return [1] if each == 1 else [each, 1]
