"""Search: every layout of a model on a machine that makes sense, the ones that fit ranked by predicted step time."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from shardwise.errors import PlanError
from shardwise.planner.case import Case
from shardwise.planner.compute import device_rates
from shardwise.planner.confidence import published_words
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.software import least_factor
from shardwise.planner.stagecuts import best_cuts
from shardwise.planner.step import Estimate, Memo, estimate, quick_memory, room_bytes
from shardwise.spec.facts import Transformer
from shardwise.spec.machine import Machine
from shardwise.spec.plan import V_SHAPED, Plan, Prediction, in_runs

LONG_SEQUENCE = 16384
"""Shorter sequences are not worth splitting: one of them fits a device with any other kind of parallelism."""

Setting = tuple[int | str, ...]

SIMULATED = 8
"""Best layouts whose pipeline is simulated; the others keep the closed form."""

MANY = 4000
"""Layouts priced beyond which fewer workers are not: a space that rich uses all of them well."""

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
CHUNKS = (1, 2, 4)
RECOMPUTES = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What to train on what.

    Attributes:
        global_batch: sequences per optimizer step over all workers.
        workers: ranks; a multiple of what one node holds, or at most that.
    """

    model: Transformer
    machine: Machine
    workers: int
    seq_len: int
    global_batch: int
    precision: str = "bf16"
    attention: str = "flash"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "seq_len", "global_batch"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}={getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True)
class Candidate:
    """A layout and what it is expected to cost, and how many workers there are: it may leave some of them idle."""

    case: Case
    estimate: Estimate
    workers: int = 0

    @property
    def family(self) -> str:
        """The kinds of parallelism it uses, such as `tensor+pipeline`; `serial` for none."""
        return family(self.case)

    def __str__(self) -> str:
        used = self.case.workers
        return describe(self.case) + (f" on {used} of {self.workers} workers" if used < self.workers else "")


@dataclass(frozen=True)
class Found:
    """Result of a search: what fits, fastest first; what does not or may not; how many layouts were priced."""

    plans: tuple[Candidate, ...]
    too_large: tuple[Candidate, ...]
    priced: int

    @property
    def best(self) -> Candidate | None:
        """The winner, None if nothing fits."""
        return self.plans[0] if self.plans else None


def search(problem: Problem, constants: Constants = DEFAULT) -> Found:
    """Price every layout by the closed form, then simulate the pipelines of the best ones.

    `plans` and `too_large` hold the best layout of every setting of the degrees, so a ranking is not filled with
    neighbours that differ in the micro-batch alone. Layouts that leave workers idle are priced where they may win: a
    number of nodes may not divide the batch, or more of them bring more waiting than work.
    """
    best: dict[tuple[int, ...], Candidate] = {}
    least: dict[tuple[int, ...], Candidate] = {}
    priced = _price(problem, problem.workers, constants, best, least)
    for workers in fewer_workers(problem):
        fastest = min((item.estimate.step_seconds for item in best.values()), default=math.inf)
        if priced < MANY and _floor_seconds(problem, workers, constants) < fastest:
            some: dict[tuple[int, ...], Candidate] = {}
            priced += _price(replace(problem, workers=workers), problem.workers, constants, some, {})
            best.update({key: item for key, item in some.items() if item.estimate.step_seconds < fastest})
    ranked = sorted(best.values(), key=lambda item: item.estimate.step_seconds)
    head = [Candidate(*best_cuts(item.case, constants), item.workers) for item in ranked[:SIMULATED]]
    head.sort(key=lambda item: item.estimate.step_seconds)
    lost = [item for key, item in least.items() if key not in best]
    lost.sort(key=lambda item: item.estimate.step_seconds)
    return Found((*head, *ranked[SIMULATED:]), tuple(lost), priced)


def _price(
    problem: Problem,
    at_hand: int,
    constants: Constants,
    best: dict[tuple[int, ...], Candidate],
    least: dict[tuple[int, ...], Candidate],
) -> int:
    """Put the fastest fitting layout of every setting of the degrees into `best`, the smallest of those that do not fit
    into `least`; how many were priced, those included that cannot be either.

    Memory is counted first, and only what fits is timed. A layout whose bytes exceed the room even without what the allocator
    loses and without the temporaries of the update, which room that activations leave may hold, has no larger micro-batch that
    fits: activations in flight and logits only grow with it, and everything else stays. Nor is one of them smaller, if not for
    a last rank whose logits, which the least memory counts at less, then outweigh the first: it needs more all the same.
    """
    memo, smallest = Memo(), dict[tuple[int, ...], tuple[Case, float]]()
    priced = 0
    for base in _bases(problem):
        room = room_bytes(base)
        hopeless: set[tuple[str, int, int, str]] = set()
        settled: Setting | None = None
        for form in _forms(base):
            key = (base.data, base.tensor, base.pipeline, base.context, base.expert, form.zero_stage)
            if form[:4] == settled:
                continue  # it fits with less recomputation, and more of it only takes longer
            priced += 1
            if form[1:] in hopeless:
                continue
            case = form.of(base)
            memory = quick_memory(case, memo)
            if memory.total <= room:
                settled = form[:4]
                found = Candidate(case, estimate(case, constants, quick=True, memo=memo), at_hand)
                if key not in best or found.estimate.step_seconds < best[key].estimate.step_seconds:
                    best[key] = found
                continue
            if key not in smallest or memory.least < smallest[key][1]:
                smallest[key] = case, memory.least
            floor = memory.total - memory.slack - memory.update
            if floor > room and memory.least - memory.update >= smallest[key][1]:
                hopeless.add(form[1:])
    for degrees, (case, _) in smallest.items():
        if degrees not in best:
            least[degrees] = Candidate(case, estimate(case, constants, quick=True, memo=memo), at_hand)
    return priced


def fewer_workers(problem: Problem) -> tuple[int, ...]:
    """Numbers of workers that leave some idle: whole nodes, then parts of one; powers of two and three times these."""
    node = min(problem.workers, problem.machine.gpus_per_node)
    nodes = problem.workers // node
    counts = [count * node for count in _round_numbers(nodes)] + _round_numbers(node) + ([node] if nodes > 1 else [])
    return tuple(sorted({count for count in counts if count < problem.workers}, reverse=True))


def _round_numbers(limit: int) -> list[int]:
    return [times << power for times in (1, 3) for power in range(limit.bit_length()) if times << power <= limit]


def _floor_seconds(problem: Problem, workers: int, constants: Constants) -> float:
    """What a step takes at least on so many workers: its products at the best rate of the part, without anything else."""
    rate = device_rates(problem.machine.accelerator, problem.precision, constants).matmul_flops
    seconds = 3.0 * problem.global_batch * problem.model.forward_flops(problem.seq_len) / (workers * rate)
    return seconds * least_factor(problem.machine.software)


def cases(problem: Problem, tensors: Iterable[int] | None = None) -> Iterator[Case]:
    """Every layout worth pricing that uses all workers; `tensors` replaces the degrees of that axis that are worth it.

    Rules: tensor ranks stay inside a node, fill it and divide the heads; a pipeline has at most one stage per layer; the
    samples of a step are split evenly; context ranks only for long sequences; experts over ranks that hold different
    samples; states are sharded in full (stage 3) only without a pipeline, where every micro-batch would gather anew.
    """
    for base in _bases(problem, tensors):
        for form in _forms(base):
            yield form.of(base)


def _bases(problem: Problem, tensors: Iterable[int] | None = None) -> Iterator[Case]:
    """One case of every setting of the degrees."""
    model = problem.model
    for tensor in tensor_degrees(problem) if tensors is None else tensors:
        for pipeline in _divisors(problem.workers // tensor, model.layers):
            for context in _contexts(problem, tensor * pipeline):
                data = problem.workers // (tensor * pipeline * context)
                if problem.global_batch % data:
                    continue
                for expert in _experts(model, data):
                    yield _base(problem, tensor, pipeline, context, data, expert)


def tensor_degrees(problem: Problem) -> list[int]:
    """Tensor ranks that divide the heads and, where there are several nodes, the ranks of one: else groups straddle two."""
    node = problem.machine.gpus_per_node
    inside = [degree for degree in _divisors(problem.workers, node) if problem.model.heads % degree == 0]
    return [degree for degree in inside if node % degree == 0] if problem.workers > node else inside


def as_plan(item: Candidate, reasons: tuple[str, ...] = ()) -> Plan:
    """The candidate as a plan that can be written down, with its prediction; `spec/runnable.py` tells whether `train` runs it."""
    case, found = item.case, item.estimate
    prediction = Prediction(
        step_seconds=found.step_seconds,
        memory_bytes=round(found.memory.total),
        seconds_by_part=dict(found.seconds),
        bytes_by_part={name: round(size) for name, size in found.memory.by_part().items()},
        confidence=f"{published_words(case)}; {'certain to fit' if found.certain and found.fits else 'near the memory limit'}",
    )
    chunks = case.virtual_stages if case.schedule == "interleaved1f1b" else None
    plain = Plan(layout=case.layout(), schedule=case.schedule, virtual_stages=chunks, micro_batch=case.micro_batch)
    settings = {
        "precision": case.precision,
        "recompute": case.recompute,
        "compile": bool(case.compile),
        "zero_stage": case.zero_stage or None,
        "stage_layers": case.layers_per_stage if case.pipeline > 1 else (),
        "reasons": reasons,
    }
    plan = Plan.from_dict({**plain.to_dict(), **settings})
    return replace(plan, prediction=replace(prediction, made_for=plan.planned_for(case.global_batch)))


def case_of(plan: Plan, problem: Problem) -> Case:
    """The case that a plan of a described model is, as `as_plan` wrote it or by hand: what is not written is as `train` takes it.

    Raises:
        PlanError: it does not divide the batch, or has more stages than the model has layers.
    """
    layout = plan.layout
    data = layout.data * layout.shard * layout.expert
    v_shaped = plan.schedule in V_SHAPED
    chunks = (plan.virtual_stages or 2) if plan.schedule == "interleaved1f1b" or v_shaped else 1
    base = _base(problem, layout.tensor, layout.pipeline, layout.context, data, layout.expert)
    if problem.global_batch % data or layout.pipeline * chunks > problem.model.layers:
        raise PlanError(
            f"plan {layout}: the {problem.global_batch} sequences of a step must divide evenly over {data} data ranks, and "
            f"{problem.model.layers} layers are too few for {layout.pipeline * chunks} stages where they are fewer: give the "
            "--batch and --model that it ran with"
        )
    return replace(
        base,
        precision=plan.precision,
        compile=plan.compile,
        zero_stage=plan.zero_stage or (3 if layout.shard > 1 else 0),
        micro_batch=plan.micro_batch or problem.global_batch // data,
        recompute=plan.recompute,
        schedule=plan.schedule if layout.pipeline > 1 else "1f1b",
        virtual_stages=chunks if layout.pipeline > 1 else 1,
        stage_layers=plan.stage_layers,
    )


def _base(problem: Problem, tensor: int, pipeline: int, context: int, data: int, expert: int) -> Case:
    return Case(
        model=problem.model,
        machine=problem.machine,
        seq_len=problem.seq_len,
        global_batch=problem.global_batch,
        micro_batch=1,
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=expert,
        sequence_parallel=tensor > 1,
        attention=problem.attention,
        precision=problem.precision,
        compile=problem.compile,
    )


class _Form(NamedTuple):
    """What layouts of the same degrees differ in."""

    micro_batch: int
    schedule: str
    virtual_stages: int
    zero_stage: int
    recompute: str

    def of(self, base: Case) -> Case:
        """The layout with the degrees of `base`."""
        return replace(
            base,
            micro_batch=self.micro_batch,
            virtual_stages=self.virtual_stages,
            schedule=self.schedule,
            recompute=self.recompute,
            zero_stage=self.zero_stage,
        )


def _forms(base: Case) -> Iterator[_Form]:
    """Micro-batch, chunks, recomputation and sharding of one setting of the degrees; smaller micro-batches first."""
    share = base.global_batch // base.data
    stages = (0,) if base.data * base.context == 1 else ((0, 1, 2, 3) if base.pipeline == 1 else (0, 1))
    for micro_batch in _micro_batches(share):
        for schedule, chunks in _schedules(base, share // micro_batch):
            for stage in stages:
                for recompute in RECOMPUTES if schedule != "zbv" else ("none",):
                    yield _Form(micro_batch, schedule, chunks, stage, recompute)


def _schedules(base: Case, passes: int) -> Iterator[tuple[str, int]]:
    """(schedule, stages a rank) that software offers for so many micro-batches.

    A V needs as many micro-batches as it has stages (PyTorch, `ScheduleZBVZeroBubble`, `ScheduleDualPipeV`); software of the time
    before 2022 had none. Under zbv all backward passes are in halves, which nobody joins with recomputation. DualPipe is for
    exchanges with experts, which it hides, and recomputes (DeepSeek-V3, arXiv:2412.19437, sections 3.2.1 and 3.2.3).
    """
    yield "1f1b", 1
    if base.pipeline == 1:
        return
    for chunks in CHUNKS:
        if chunks > 1 and base.pipeline * chunks <= base.model.layers and passes % base.pipeline == 0:
            yield "interleaved1f1b", chunks
    if not base.classic and 2 * base.pipeline <= min(base.model.layers, passes):
        yield ("dualpipev" if base.expert > 1 else "zbv"), 2


def _micro_batches(share: int) -> list[int]:
    """Even parts of a rank's samples: powers of two, and what else divides them where powers of two hardly do."""
    return (
        [size for size in MICRO_BATCHES if share % size == 0]
        if share % 16 == 0
        else _divisors(share, MICRO_BATCHES[-1])
    )


def _contexts(problem: Problem, taken: int) -> Iterator[int]:
    for context in _divisors(problem.workers // taken, 64):
        if context == 1 or (problem.seq_len >= LONG_SEQUENCE and problem.seq_len % context == 0):
            yield context


def _experts(model: Transformer, data: int) -> Iterator[int]:
    """Ways to split the experts: divisors of both the experts and the data ranks; 1 for a dense model."""
    yield from _divisors(math.gcd(model.experts, data) if model.experts else 1, model.experts or 1)


def _divisors(number: int, limit: int) -> list[int]:
    return [value for value in range(1, min(number, limit) + 1) if number % value == 0]


def family(case: Case) -> str:
    """The kinds of parallelism of a case, joined by `+`."""
    names = []
    if case.data > 1:
        names.append(
            {0: "data", 1: "data (states sharded)", 2: "data (gradients sharded)", 3: "shard"}[case.zero_stage]
        )
    names += [axis for axis in ("tensor", "pipeline", "context", "expert") if getattr(case, axis) > 1]
    return "+".join(names) or "serial"


def describe(case: Case) -> str:
    """One line: the layout as `--why-not` and plan files take it, then the settings that are not the plain ones."""
    parts = [str(case.layout())]
    if case.zero_stage:
        parts.append(f"zero_stage={case.zero_stage}")
    parts.append(f"micro_batch={case.micro_batch}")
    if case.recompute != "none":
        parts.append(f"recompute={case.recompute}")
    if case.schedule in V_SHAPED:
        parts.append(f"schedule={case.schedule}")
    elif case.virtual_stages > 1:
        parts.append(f"virtual_stages={case.virtual_stages}")
    if case.stage_layers:
        parts.append(f"stage_layers={in_runs(case.stage_layers)}")
    return " ".join(parts)
