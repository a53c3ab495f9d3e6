"""Why the winner wins, what holds the others back, and what would help: sentences from the numbers of a search."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from shardwise.errors import PlanError
from shardwise.planner.case import Case
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.memory import context_bytes
from shardwise.planner.search import LONG_SEQUENCE, Candidate, Found, Problem, cases
from shardwise.planner.step import Estimate, estimate
from shardwise.spec.layout import Layout
from shardwise.spec.machine import Figure, Machine
from shardwise.units import format_bytes, format_seconds

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

FASTEST = 10_000.0
"""Gbit/s between nodes or GB/s inside one beyond which a speed that would make a layout win is not worth a sentence."""


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


def nothing_fits(found: Found) -> str:
    """What the layout that needs least memory lacks."""
    if not found.too_large:
        return "no layout divides this batch and model over so many workers: change the batch or the number of workers"
    nearest = min(found.too_large, key=lambda item: item.estimate.memory.total)
    needs = nearest.estimate.memory.total + context_bytes(nearest.case)
    room = nearest.case.machine.accelerator.memory_bytes.value
    return (
        f"nothing fits: the smallest layout ({nearest}) needs {format_bytes(needs)} of the {format_bytes(room)} of a "
        f"device; {_largest(nearest.estimate)}. Use more workers or devices with more memory"
    )


def losers(problem: Problem, found: Found, constants: Constants = DEFAULT) -> tuple[Reason, ...]:
    """For every family of layouts that does not win: what holds its best member back, or the speed at which it would win."""
    if found.best is None:
        return ()
    best = found.best
    members: dict[str, Candidate] = {}
    for item in found.plans:
        members.setdefault(item.family, item)
    reasons = [
        Reason(name, str(item), _loses(item, best, constants)) for name, item in members.items() if name != best.family
    ]
    for item in found.too_large:
        if item.family not in members:
            members[item.family] = item
            reasons.append(Reason(item.family, str(item), _too_large(item)))
    return tuple(reasons)


def why_not(problem: Problem, wanted: Layout, found: Found, constants: Constants = DEFAULT) -> str:
    """Why the layouts with these degrees are not the winner; `data` and `shard` ask for unsharded and sharded states.

    Axes that `wanted` leaves at 1 are free unless it names all workers.
    """
    degrees = {axis: degree for axis, degree in wanted.degrees.items() if degree > 1}
    matching = [case for case in cases(problem) if _matches(case, wanted)]
    if not matching:
        given = ",".join(f"{axis}={degree}" for axis, degree in degrees.items()) or "serial"
        return f"{given} is not possible here: {_broken_rules(problem, wanted)}"
    priced = [Candidate(case, estimate(case, constants, quick=True)) for case in matching]
    fitting = [item for item in priced if item.estimate.comfortable]
    if not fitting:
        item = min(priced, key=lambda one: one.estimate.memory.total)
        return f"its smallest form is {item}; {_too_large(item)}"
    item = min(fitting, key=lambda one: one.estimate.step_seconds)
    if found.best is None or item.estimate.step_seconds <= found.best.estimate.step_seconds:
        return f"nothing speaks against it: {item} is the best layout found"
    return f"its best form is {item}; {_loses(item, found.best, constants)}"


def _broken_rules(problem: Problem, wanted: Layout) -> str:
    """The rules of the search that a layout breaks, in words."""
    model, workers = problem.model, problem.workers
    rules = (
        (model.heads % wanted.tensor == 0, f"tensor must divide the {model.heads} heads"),
        (
            wanted.tensor <= problem.machine.gpus_per_node,
            f"tensor ranks stay within the {problem.machine.gpus_per_node} ranks of a node",
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


def break_even_gbits(case: Case, target_seconds: float, constants: Constants = DEFAULT) -> float | None:
    """Network speed in Gbit/s per rank at which `case` takes `target_seconds`; None if no speed up to 10 Tbit/s does."""

    def at(gbits: float) -> float:
        machine = case.machine.with_network(gbits, "asked")
        return estimate(replace(case, machine=machine), constants, quick=True).step_seconds

    return _break_even(at, target_seconds)


def break_even_link(case: Case, target_seconds: float, constants: Constants = DEFAULT) -> float | None:
    """Speed of the links inside a node, GB/s, at which `case` takes `target_seconds`; None if none up to 10 TB/s does."""
    link = case.machine.intra

    def at(gbytes: float) -> float:
        speed = Figure(gbytes * 1e9, "nominal", "asked")
        machine = replace(case.machine, intra=replace(link, bytes_per_second=speed))
        return estimate(replace(case, machine=machine), constants, quick=True).step_seconds

    return _break_even(at, target_seconds)


def break_even_batch(item: Case, best: Case, constants: Constants = DEFAULT) -> int | None:
    """Smallest of 2, 4, ... 64 times the global batch at which `item` is no slower than `best`; None if none."""
    factor = 2
    while factor <= 64:
        mine, theirs = (
            estimate(replace(case, global_batch=factor * case.global_batch), constants, quick=True).step_seconds
            for case in (item, best)
        )
        if mine <= theirs:
            return factor * item.global_batch
        factor *= 2
    return None


def _break_even(at: Callable[[float], float], target_seconds: float) -> float | None:
    if at(FASTEST) > target_seconds:
        return None
    low, high = 1e-3, FASTEST
    for _ in range(40):
        middle = (low * high) ** 0.5
        if at(middle) > target_seconds:
            low = middle
        else:
            high = middle
    return high


def _loses(item: Candidate, best: Candidate, constants: Constants) -> str:
    mine, theirs = item.estimate, best.estimate
    slower = mine.step_seconds / theirs.step_seconds - 1.0
    if slower <= 0.005:
        return f"it is as fast as the winner within {100 * max(slower, 0.001):.1f} %"
    extra = {name: mine.seconds.get(name, 0.0) - theirs.seconds.get(name, 0.0) for name in mine.seconds}
    worst = max(extra, key=lambda name: extra[name])
    share = 100 * mine.seconds[worst] / mine.step_seconds
    sentence = (
        f"it is {100 * slower:.0f} % slower than the winner, mostly by {PARTS[worst]} ({share:.0f} % of its step)"
    )
    even = _even(item, best, worst, constants)
    return f"{sentence}; {even}" if even else sentence


def _even(item: Candidate, best: Candidate, worst: str, constants: Constants) -> str:
    """What would have to change for the layout to win, or why nothing of the kind would do."""
    case, target = item.case, best.estimate.step_seconds
    if worst == "compute":
        more = 100 * (item.estimate.seconds[worst] / best.estimate.seconds[worst] - 1.0)
        return f"its products are smaller or its ends heavier and take {more:.0f} % longer"
    if worst == "bubble":
        batch = break_even_batch(case, best.case, constants)
        return f"it would win from a batch of {batch}" if batch else "no larger batch would make it win"
    if worst == "recompute":
        needs = estimate(replace(case, recompute="none"), constants, quick=True)
        room = format_bytes(needs.memory.total + context_bytes(case))
        wins = "and it would win" if needs.step_seconds <= target else "and it would still lose"
        return f"with {room} of device memory it need not, {wins}"
    if worst not in ("tensor", "context", "shards", "gradients"):
        return ""
    gbits, now = break_even_gbits(case, target, constants), case.machine.inter.bytes_per_second.value * 8 / 1e9
    if gbits is not None and gbits > now:
        return f"it would win above {gbits:.0f} Gbit/s per rank between nodes (now {now:.0f})"
    gbytes, now = break_even_link(case, target, constants), case.machine.intra.bytes_per_second.value / 1e9
    if gbytes is not None and gbytes > now:
        return f"it would win above {gbytes:.0f} GB/s inside a node (now {now:.0f})"
    return "no network between or inside nodes alone would make it win"


def _too_large(item: Candidate) -> str:
    needs = item.estimate.memory.total + context_bytes(item.case)
    room = item.case.machine.accelerator.memory_bytes.value
    word = "may not fit" if item.estimate.fits else "does not fit"
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
