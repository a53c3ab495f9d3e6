"""How far an inexact plan is from the serial run: a measurement, where a proof is out of the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardwise.prove.compare import Yardstick, norm, wide, worst_of_each_kind
from shardwise.prove.record import Record
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Comparison, Finding, Verdict


def measured_distance(
    exact: Verdict,
    plan: Plan,
    yardstick: Yardstick,
    candidate: Record,
    comparisons: Sequence[Comparison],
    faults: Sequence[str],
) -> Verdict:
    """The verdict on a plan with an inexact saver.

    Args:
        exact: the verdict on the plan without the saver: proved.
        plan: with it.
        yardstick: the serial runs.
        candidate: the run with it.
        comparisons: of that run with the reference.
        faults: what is wrong with that run and is no distance; any makes the verdict `refuted`.
    """
    gradient = _part(_square_off(candidate, yardstick, "gradient/"), _square(yardstick.exact, "gradient/"))
    moved = _part(_square_off(candidate, yardstick, "final/model/"), _movement(yardstick.exact))
    losses = zip(candidate.losses, yardstick.exact.losses, strict=True)
    loss = max((abs(a - b) / abs(b) for a, b in losses if b), default=0.0)
    distance = Finding(
        pattern="inexact",
        message=f"{plan}: after step 1 the gradient is {gradient:.1e} of its norm away from the float64 serial run; after "
        f"{exact.steps} steps the weights are {moved:.1e} of the way that training moved them away; losses differ by up to "
        f"{loss:.1e} of their value",
        factor=moved,
    )
    drifted = [name for name, values in candidate.starting_with("final/model/") if len(values) > 1]
    texts = [*faults, *(f"the workers' copies of {name} are no longer equal" for name in drifted)]
    uncovered = ["whether a training of full length ends as well: compare the metrics of whole runs"]
    if plan.local_steps > exact.steps:
        uncovered.append(f"steps between averages: {exact.steps} of {plan.local_steps} were taken; give --steps")
    wrong = [Finding(pattern="fault", message=text) for text in texts]
    # Nothing here could pass or fail by an allowance; the furthest of each kind by size is what a reader asks for.
    return replace(
        exact,
        outcome="refuted" if wrong else "inexact",
        plan=str(plan),
        worst=worst_of_each_kind(comparisons),
        findings=(*wrong, distance),
        not_covered=(*exact.not_covered, *uncovered),
        notes=(*exact.notes, "the same plan without its saver is proved"),
    )


def _part(square: float, whole: float) -> float:
    return float((square / whole) ** 0.5) if whole else 0.0


def _square(record: Record, prefix: str) -> float:
    return float(sum(norm(next(iter(values.values()))) ** 2 for _, values in record.starting_with(prefix)))


def _square_off(candidate: Record, yardstick: Yardstick, prefix: str) -> float:
    total = 0.0
    for name, values in yardstick.exact.starting_with(prefix):
        if name in yardstick.exact.buffers:
            continue
        exact, other = wide(next(iter(values.values()))), candidate.first(f"{prefix}{name}")
        total += norm(exact if other is None else wide(other) - exact) ** 2
    return total


def _movement(record: Record) -> float:
    total = 0.0
    for name, values in record.starting_with("final/model/"):
        start = record.first(f"initial/model/{name}")
        if name not in record.buffers and start is not None:
            total += norm(wide(next(iter(values.values()))) - wide(start)) ** 2
    return total
