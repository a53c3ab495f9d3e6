"""Search: every layout of a model on a machine that makes sense, the ones that fit ranked by predicted step time."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from shardwise.errors import PlanError
from shardwise.planner.case import Case
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.step import Estimate, Memo, estimate
from shardwise.spec.facts import Transformer
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan, Prediction

LONG_SEQUENCE = 16384
"""Shorter sequences are not worth splitting: one of them fits a device with any other kind of parallelism."""

Setting = tuple[int, ...]

SIMULATED = 8
"""Best layouts whose pipeline is simulated; the others keep the closed form."""

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
    """A layout and what it is expected to cost."""

    case: Case
    estimate: Estimate

    @property
    def family(self) -> str:
        """The kinds of parallelism it uses, such as `tensor+pipeline`; `serial` for none."""
        return family(self.case)

    def __str__(self) -> str:
        return describe(self.case)


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
    neighbours that differ in the micro-batch alone.
    """
    best: dict[tuple[int, ...], Candidate] = {}
    least: dict[tuple[int, ...], Candidate] = {}
    priced = 0
    settled: Setting | None = None
    memo = Memo()
    for case in cases(problem):
        key = (case.data, case.tensor, case.pipeline, case.context, case.expert, case.zero_stage)
        setting = (*key, case.micro_batch, case.virtual_stages)
        if setting == settled:
            continue  # it fits with less recomputation, and more of it only takes longer
        found = Candidate(case, estimate(case, constants, quick=True, memo=memo))
        priced += 1
        if found.estimate.comfortable:
            settled = setting
            if key not in best or found.estimate.step_seconds < best[key].estimate.step_seconds:
                best[key] = found
        elif key not in least or found.estimate.memory.least < least[key].estimate.memory.least:
            least[key] = found
    ranked = sorted(best.values(), key=lambda item: item.estimate.step_seconds)
    head = [Candidate(item.case, estimate(item.case, constants, memo=memo)) for item in ranked[:SIMULATED]]
    head.sort(key=lambda item: item.estimate.step_seconds)
    lost = [item for key, item in least.items() if key not in best]
    lost.sort(key=lambda item: item.estimate.step_seconds)
    return Found((*head, *ranked[SIMULATED:]), tuple(lost), priced)


def cases(problem: Problem) -> Iterator[Case]:
    """Every layout worth pricing.

    Rules: tensor ranks stay inside a node and divide the heads; a pipeline has at most one stage per layer; the
    samples of a step are split evenly; context ranks only for long sequences; experts over ranks that hold different
    samples; states are sharded in full (stage 3) only without a pipeline, where every micro-batch would gather anew.
    """
    model, machine = problem.model, problem.machine
    for tensor in _divisors(problem.workers, min(machine.gpus_per_node, model.heads)):
        if model.heads % tensor:
            continue
        for pipeline in _divisors(problem.workers // tensor, model.layers):
            for context in _contexts(problem, tensor * pipeline):
                data = problem.workers // (tensor * pipeline * context)
                if problem.global_batch % data:
                    continue
                for expert in _experts(model, data):
                    base = _base(problem, tensor, pipeline, context, data, expert)
                    yield from _settings(base)


def as_plan(item: Candidate, reasons: tuple[str, ...] = ()) -> Plan:
    """The candidate as a plan that can be written down and run, with its prediction.

    Raises:
        PlanError: a precision that plans do not have.
    """
    case, found = item.case, item.estimate
    prediction = Prediction(
        step_seconds=found.step_seconds,
        memory_bytes=round(found.memory.total),
        seconds_by_part=dict(found.seconds),
        bytes_by_part={name: round(size) for name, size in found.memory.by_part().items()},
        confidence="certain to fit" if found.certain and found.fits else "near the memory limit",
    )
    plain = Plan(layout=case.layout(), schedule=case.schedule, micro_batch=case.micro_batch, reasons=reasons)
    settings = {"precision": case.precision, "recompute": case.recompute, "compile": bool(case.compile)}
    return Plan.from_dict({**plain.to_dict(), **settings, "prediction": asdict(prediction)})


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


def _settings(base: Case) -> Iterator[Case]:
    """Micro-batch, chunks, recomputation and sharding of one setting of the degrees."""
    share = base.global_batch // base.data
    stages = (0,) if base.data * base.context == 1 else ((0, 1, 3) if base.pipeline == 1 else (0, 1))
    for micro_batch in MICRO_BATCHES:
        if share % micro_batch:
            continue
        for chunks in CHUNKS if base.pipeline > 1 else (1,):
            if base.pipeline * chunks > base.model.layers or (chunks > 1 and (share // micro_batch) % base.pipeline):
                continue
            schedule = "interleaved1f1b" if chunks > 1 else "1f1b"
            for stage in stages:
                for recompute in RECOMPUTES:
                    yield replace(
                        base,
                        micro_batch=micro_batch,
                        virtual_stages=chunks,
                        schedule=schedule,
                        recompute=recompute,
                        zero_stage=stage,
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
    """One line: degrees that are not 1, then the settings that are not the plain ones."""
    axes = ("data", "tensor", "pipeline", "context", "expert")
    parts = [f"{axis}={getattr(case, axis)}" for axis in axes if getattr(case, axis) > 1]
    if case.zero_stage:
        parts.append(f"zero_stage={case.zero_stage}")
    parts.append(f"micro_batch={case.micro_batch}")
    if case.recompute != "none":
        parts.append(f"recompute={case.recompute}")
    if case.virtual_stages > 1:
        parts.append(f"virtual_stages={case.virtual_stages}")
    return " ".join(parts)
