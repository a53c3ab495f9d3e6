"""Why the winner wins, what holds the others back, and what would help: sentences from the numbers of a search."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from shardwise.errors import PlanError
from shardwise.planner.breakeven import Budget, even_batch, even_link, even_memory
from shardwise.planner.case import Case
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.memory import context_bytes
from shardwise.planner.search import (
    LONG_SEQUENCE,
    SIMULATED,
    Candidate,
    Found,
    Problem,
    cases,
    search,
)
from shardwise.planner.stagecuts import best_cuts
from shardwise.planner.step import Estimate, estimate
from shardwise.spec.layout import Layout
from shardwise.spec.machine import Figure, Machine
from shardwise.units import format_bytes, format_seconds, format_slower

PARTS = {
    "compute": "computing",
    "recompute": "computing activations again",
    "tensor": "exchanging activations between tensor ranks and experts",
    "context": "passing keys and values around",
    "shards": "gathering and reducing shards",
    "bubble": "waiting in the pipeline",
    "gradients": "reducing gradients",
    "optimizer": "updating the weights",
}
"""Part of a step -> what the workers do meanwhile."""


@dataclass(frozen=True)
class Reason:
    """One family of layouts, its best member, and a sentence."""

    family: str
    layout: str
    sentence: str


def why_best(found: Found) -> str:
    """Where the time of the winner goes, in one sentence.

    Raises:
        PlanError: nothing fits.
    """
    if found.best is None:
        raise PlanError(nothing_fits(found))
    best = found.best.estimate
    step = best.step_seconds
    shares = sorted(best.seconds.items(), key=lambda item: -item[1])
    told = ", ".join(f"{100 * value / step:.0f} % {PARTS[name]}" for name, value in shares if value > 0.02 * step)
    return f"{found.best} takes {format_seconds(step)} a step and {format_bytes(best.memory.total)} on the fullest rank: {told}."


def nothing_fits(found: Found, enough: int | None = None) -> str:
    """What the layout that needs least memory lacks; `enough` are so many workers that something fits (`enough_workers`)."""
    more = f": {enough} of these devices are enough" if enough is not None else ""
    if not found.too_large:
        return "no layout divides this batch and model over so many workers: change the batch or the number of workers"
    nearest = min(found.too_large, key=lambda item: item.estimate.memory.total)
    needs = nearest.estimate.memory.total + context_bytes(nearest.case)
    room = nearest.case.machine.accelerator.memory_bytes.value
    return (
        f"nothing fits: the smallest layout ({nearest}) needs {format_bytes(needs)} of the {format_bytes(room)} of a "
        f"device; {_largest(nearest.estimate)}. Use more workers{more}, or devices with more memory"
    )


def enough_workers(problem: Problem, constants: Constants = DEFAULT) -> int | None:
    """The first of twice, four times, ... 64 times the workers on which something fits; None if nothing does."""
    for factor in (2, 4, 8, 16, 32, 64):
        if search(replace(problem, workers=factor * problem.workers), constants).best is not None:
            return factor * problem.workers
    return None


def losers(problem: Problem, found: Found, constants: Constants = DEFAULT) -> tuple[Reason, ...]:
    """For every family of layouts that does not win: what holds its best member back, or the speed at which it would win."""
    if found.best is None:
        return ()
    best = found.best
    members = _members(found)
    budget = Budget.of(found.priced)
    reasons = [
        Reason(name, str(item), _loses(item, problem, found, budget, constants))
        for name, item in members.items()
        if name != best.family
    ]
    for item in found.too_large:
        if item.family not in members:
            members[item.family] = item
            reasons.append(Reason(item.family, str(item), _too_large(item)))
    return tuple(reasons)


def _members(found: Found) -> dict[str, Candidate]:
    """The best layout of every family that fits, fastest first."""
    members: dict[str, Candidate] = {}
    for item in found.plans:
        members.setdefault(item.family, item)
    return members


def why_not(problem: Problem, wanted: Layout, found: Found, constants: Constants = DEFAULT) -> str:
    """Why the layouts with these degrees are not the winner; `data` and `shard` ask for unsharded and sharded states.

    Axes that `wanted` leaves at 1 are free unless it names all workers; `serial` is one worker.
    """
    given = ",".join(f"{axis}={degree}" for axis, degree in wanted.degrees.items() if degree > 1) or "serial"
    asked, prefix = replace(problem, workers=1) if wanted.workers == 1 else problem, ""
    matching = [case for case in cases(asked) if _matches(case, wanted)]
    if not matching:
        prefix = f"{given} is not possible here: {_broken_rules(problem, wanted)}"
        matching = _across_nodes(problem, wanted)
        if not matching:
            return prefix
        prefix += ". Priced all the same, "
    priced = [Candidate(case, estimate(case, constants, quick=True), problem.workers) for case in matching]
    fitting = sorted((item for item in priced if item.estimate.comfortable), key=lambda one: one.estimate.step_seconds)
    if not fitting:
        item = min(priced, key=lambda one: one.estimate.memory.total)
        return f"{prefix}its smallest form is {item}; {_too_large(item)}"
    some = [Candidate(*best_cuts(one.case, constants), problem.workers) for one in fitting[:SIMULATED]]
    item = min(some, key=lambda one: one.estimate.step_seconds)
    if found.best is None or item.estimate.step_seconds <= found.best.estimate.step_seconds:
        if prefix:
            return f"{prefix}{item} takes {format_seconds(item.estimate.step_seconds)}, no more than the winner"
        return f"nothing speaks against it: {item} is the best layout found"
    return f"{prefix}its best form is {item}; {_loses(item, problem, found, Budget.of(found.priced), constants)}"


def _across_nodes(problem: Problem, wanted: Layout) -> list[Case]:
    """The cases of tensor ranks over several whole nodes, which the search leaves out; none for anything else."""
    node = problem.machine.gpus_per_node
    possible = problem.model.heads % wanted.tensor == 0 and problem.workers % wanted.workers == 0
    if not possible or wanted.tensor <= node or wanted.tensor % node:
        return []
    return [case for case in cases(problem, (wanted.tensor,)) if _matches(case, wanted)]


def _broken_rules(problem: Problem, wanted: Layout) -> str:
    """The rules of the search that a layout breaks, in words."""
    model, workers = problem.model, problem.workers
    rules = (
        (model.heads % wanted.tensor == 0, f"tensor must divide the {model.heads} heads"),
        (
            wanted.tensor <= problem.machine.gpus_per_node,
            f"tensor ranks stay within the {problem.machine.gpus_per_node} ranks of a node",
        ),
        (
            wanted.tensor >= problem.machine.gpus_per_node
            or workers <= problem.machine.gpus_per_node
            or model.heads % wanted.tensor > 0
            or problem.machine.gpus_per_node % wanted.tensor == 0,
            f"tensor must divide the {problem.machine.gpus_per_node} ranks of a node, or its groups straddle two nodes",
        ),
        (wanted.pipeline <= model.layers, f"a pipeline has at most {model.layers} stages"),
        (
            problem.global_batch % wanted.replicas == 0,
            f"the {problem.global_batch} sequences of a step must divide evenly over {wanted.replicas} data ranks",
        ),
        (
            wanted.expert == 1 or (model.experts > 0 and model.experts % wanted.expert == 0),
            f"expert must divide the {model.experts} experts" if model.experts else "the model has no experts",
        ),
        (
            wanted.context == 1 or problem.seq_len >= LONG_SEQUENCE,
            f"sequences are split only from {LONG_SEQUENCE} tokens on",
        ),
        (workers % wanted.workers == 0, f"{wanted.workers} must divide the {workers} workers"),
    )
    broken = [told for kept, told in rules if not kept]
    return "; ".join(broken) or "its degrees do not divide the batch, the workers and the model together"


def what_helps(found: Found, constants: Constants = DEFAULT) -> tuple[str, ...]:
    """What shortens the winner's step most: each resource doubled, and the memory that would allow a faster layout."""
    if found.best is None:
        return ()
    case, now = found.best.case, found.best.estimate.step_seconds
    changes: dict[str, Callable[[Machine], Machine]] = {
        "a network twice as fast": lambda machine: machine.with_network(
            machine.inter.bytes_per_second.value * 16 / 1e9, "doubled"
        ),
        "links inside the node twice as fast": lambda machine: replace(
            machine, intra=replace(machine.intra, bytes_per_second=_twice(machine.intra.bytes_per_second))
        ),
        "device memory twice as fast": lambda machine: replace(
            machine,
            accelerator=replace(
                machine.accelerator, memory_bytes_per_second=_twice(machine.accelerator.memory_bytes_per_second)
            ),
        ),
    }
    gains: list[tuple[float, str]] = []
    for name, change in changes.items():
        then = estimate(replace(case, machine=change(case.machine)), constants).step_seconds
        gains.append((now / then, f"{name}: {now / then:.2f} times as fast"))
    double = replace(case, global_batch=2 * case.global_batch)
    gain = 2 * now / estimate(double, constants).step_seconds
    gains.append((gain, f"twice the global batch: {gain:.2f} times the samples per second"))
    faster = [item for item in found.too_large if item.estimate.step_seconds < now]
    if faster:
        item = min(faster, key=lambda one: one.estimate.step_seconds)
        gain = now / item.estimate.step_seconds
        needs = format_bytes(item.estimate.memory.total + context_bytes(item.case))
        gains.append((gain, f"{needs} of device memory would allow {item}: {gain:.2f} times as fast"))
    return tuple(sentence for gain, sentence in sorted(gains, key=lambda one: -one[0]) if gain > 1.01)


def _loses(item: Candidate, problem: Problem, found: Found, budget: Budget, constants: Constants) -> str:
    assert found.best is not None
    mine, theirs = item.estimate, found.best.estimate
    slower = mine.step_seconds / theirs.step_seconds - 1.0
    if slower <= 0.005:
        return f"it is as fast as the winner within {100 * max(slower, 0.001):.1f} %"
    extra = {name: mine.seconds.get(name, 0.0) - theirs.seconds.get(name, 0.0) for name in mine.seconds}
    worst = max(extra, key=lambda name: extra[name])
    share = 100 * mine.seconds[worst] / mine.step_seconds
    sentence = f"{format_slower(slower)}, mostly by {PARTS[worst]} ({share:.0f} % of its step)"
    even = _even(item, problem, found, budget, worst, constants)
    return f"{sentence}; {even}" if even else sentence


def _even(item: Candidate, problem: Problem, found: Found, budget: Budget, worst: str, constants: Constants) -> str:
    """What would have to change for the layout to win, or why nothing of the kind would do."""
    assert found.best is not None
    case, best = item.case, found.best
    rivals = [best.case, *(one.case for name, one in _members(found).items() if name not in (item.family, best.family))]
    if worst == "compute":
        more = 100 * (item.estimate.seconds[worst] / best.estimate.seconds[worst] - 1.0)
        return f"its products are smaller, or its first and last stage carry more, and take {more:.0f} % longer"
    if worst == "bubble":
        return even_batch(case, problem, rivals, budget, constants)
    if worst == "recompute":
        return even_memory(case, problem, best, budget, constants)
    if worst not in ("tensor", "context", "shards", "gradients"):
        return ""
    return even_link(case, problem, rivals, budget, constants)


def _too_large(item: Candidate) -> str:
    needs = item.estimate.memory.total + context_bytes(item.case)
    room = item.case.machine.accelerator.memory_bytes.value
    word = "may not fit" if item.estimate.likely else "does not fit"
    return f"it {word}: it needs {format_bytes(needs)} of {format_bytes(room)}, {_largest(item.estimate)}"


def _largest(found: Estimate) -> str:
    name, size = max(found.memory.by_part().items(), key=lambda one: one[1])
    return f"{format_bytes(size)} of it {name}"


def _matches(case: Case, wanted: Layout) -> bool:
    for axis in ("tensor", "pipeline", "context", "expert"):
        degree = getattr(wanted, axis)
        if degree > 1 and getattr(case, axis) != degree:
            return False
    if wanted.data * wanted.shard > 1 and case.data != wanted.replicas:
        return False
    if wanted.shard > 1 and case.zero_stage == 0:
        return False
    if wanted.data > 1 and wanted.shard == 1 and case.zero_stage > 0:
        return False
    return wanted.workers <= case.workers


def _twice(figure: Figure) -> Figure:
    return replace(figure, value=2 * figure.value, source=f"twice: {figure.source}")
