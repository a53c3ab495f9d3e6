"""Where to cut: the modules that start the stages, balanced by estimated work, and the table that says so."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import final

from shardwise.errors import PlanError
from shardwise.parallel.pipeline.trace import Trace
from shardwise.spec.balance import balanced
from shardwise.spec.work import CutFacts

MAX_CANDIDATES = 256
"""Most modules that are weighed against each other as starts of a stage; the outermost are kept. The search takes time
proportional to its square."""


@final
@dataclass(frozen=True)
class StageShare:
    """One row of the table of stages.

    Attributes:
        stage: its number.
        first: the module that starts it; the first stage starts with the inputs.
        cost_share: part of the estimated work of the forward pass that is done here.
        parameters: elements of the parameters it holds, those that other stages hold too included.
        shared: names of the parameters that other stages hold too.
        carried: (shape, module or function that made it) of every value that arrives from the stage before.
        carried_bytes: their size for the example inputs.
    """

    stage: int
    first: str
    cost_share: float
    parameters: int
    shared: tuple[str, ...]
    carried: tuple[tuple[str, str], ...]
    carried_bytes: int


@final
@dataclass(frozen=True)
class StageTable:
    """What every stage does; prints itself."""

    stages: tuple[StageShare, ...]

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the modules that start a stage, the first stage left out: what `Plan.cuts` takes."""
        return tuple(share.first for share in self.stages[1:])

    def __str__(self) -> str:
        lines = [f"{'stage':>5}  {'starts with':<28} {'work':>5} {'parameters':>12}  arrives with each micro-batch"]
        for share in self.stages:
            arrives = ", ".join(f"{shape} of {maker}" for shape, maker in share.carried) or "the inputs"
            lines.append(
                f"{share.stage:>5}  {share.first or '(inputs)':<28} {share.cost_share:>5.0%} {share.parameters:>12,}  {arrives}"
            )
            if share.shared:
                lines.append(f"{'':>7}holds too: {', '.join(share.shared)} (gradients are summed over the stages)")
        return "\n".join(lines)


def forbidden(trace: Trace) -> dict[int, str]:
    """Positions where no cut can be, with the reason."""
    reasons: dict[int, str] = {}
    for number, call in enumerate(trace.calls):
        for earlier in call.hidden:
            for position in range(earlier + 1, number + 1):
                reasons[position] = (
                    f"{call.name} reads what {trace.calls[earlier].name} made, but not through its arguments (an attribute?)"
                )
    for number, (one, other) in enumerate(pairwise(trace.calls), start=1):
        if one.region and one.region == other.region:
            reasons[number] = (
                "it lies inside of a part that is computed again in the backward pass (torch.utils.checkpoint)"
            )
    changed = {value: number for number, call in enumerate(trace.calls) for value in call.changes}
    makers = {value: number for number, call in enumerate(trace.calls) for value in call.defines}
    by_storage: dict[int, list[int]] = {}
    for value in changed:
        by_storage.setdefault(trace.values[value].storage, []).append(value)
    for values in by_storage.values():
        last = max(changed[value] for value in values)
        for position in range(min(makers[value] for value in values) + 1, last + 1):
            if len(set(values) & set(trace.live(position))) > 1:
                name = trace.calls[last].name
                reasons[position] = f"{name} changes a tensor in place that is seen through several views"
    return reasons


def check_named(names: Sequence[str], known: Sequence[str], stages: int) -> None:
    """Refuse cuts that cannot be.

    Raises:
        PlanError: a wrong number of cuts, an unknown module, or one that is named twice.
    """
    if len(names) != stages - 1:
        raise PlanError(
            f"plan cuts={list(names)} makes {len(names) + 1} stages, but {stages} are needed: name the {stages - 1} modules "
            "that start stages 1 and on, or leave cuts out to have them balanced"
        )
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise PlanError(f"plan cuts: the model has no module {name!r}{hint}")
    if len(set(names)) != len(names):
        raise PlanError(f"plan cuts={list(names)}: a module can start one stage only")


def choose(trace: Trace, stages: int) -> tuple[str, ...]:
    """The modules that start stages 1, 2, ...: the busiest stage does (nearly) the least possible work, and among such
    cuts the fewest bytes cross.

    Args:
        trace: of a forward pass in which every module was walked through.

    Raises:
        PlanError: the model has too few places to cut.
    """
    candidates = _candidates(trace)
    if len(candidates) < stages - 1:
        looked = ", ".join(name for name, _ in candidates) or "none"
        raise PlanError(
            f"the model cannot be cut into {stages} stages: a stage starts where a module is called, and the places found "
            f"are {looked}; use a smaller pipeline"
        )
    costs = _costs(trace)
    work = [0.0, *(costs[position] for _, position in candidates), costs[-1]]
    chosen = balanced(work, [_penalty(trace, name, position) for name, position in candidates], stages)
    return tuple(candidates[index - 1][0] for index in chosen)


def places(trace: Trace, blocks: Sequence[str]) -> tuple[CutFacts, ...]:
    """Every place that `choose` weighs, with what a cut there would send; bytes are of all samples of the example.

    Args:
        trace: of a forward pass in which every module was walked through.
        blocks: names of modules, in the order in which they are called.
    """
    costs = _costs(trace)
    entries = dict(reversed(trace.entries))
    starts = [(entries[name], index) for index, name in enumerate(blocks) if name in entries]
    found = []
    for name, position in _candidates(trace):
        start, block = max([(0, 0), *((at, index) for at, index in starts if at <= position)])
        end = min((at for at, _ in starts if at > start), default=len(trace.calls))
        live = trace.live(position)
        found.append(
            CutFacts(
                name=name,
                work=costs[position] / (costs[-1] or 1.0),
                block=block,
                inside=(costs[position] - costs[start]) / ((costs[end] - costs[start]) or 1.0),
                sent_bytes=sum(trace.values[value].bytes for value in live),
                returned_bytes=sum(v.bytes for v in (trace.values[n] for n in live) if v.needs_gradient(position)),
            )
        )
    return tuple(found)


def shared_names(trace: Trace, name: str) -> frozenset[str]:
    """Parameters and buffers that calls on both sides of a cut at module `name` use."""
    (position,) = trace.starts([name])
    sides = trace.calls[:position], trace.calls[position:]
    before, after = (
        frozenset(used for call in calls if not call.everywhere for used in call.tensors) for calls in sides
    )
    return before & after


def _costs(trace: Trace) -> list[float]:
    """Estimated work of the calls before each position."""
    return [0.0, *accumulate(0.0 if call.everywhere else call.cost for call in trace.calls)]


def _candidates(trace: Trace) -> list[tuple[str, int]]:
    """(module, position) of every place for a cut, in order; where several modules start, the outermost."""
    bound = [number for number, call in enumerate(trace.calls) if not call.everywhere]
    reasons = forbidden(trace)
    places: dict[int, str] = {}
    for name, position in trace.entries:
        if bound and bound[0] < position <= bound[-1] and position not in reasons:
            places.setdefault(position, name)
    found = sorted((position, name) for position, name in places.items())
    # Two places with nothing but questions between them are one.
    kept: list[tuple[str, int]] = []
    for position, name in found:
        if not kept or any(kept[-1][1] <= number < position for number in bound):
            kept.append((name, position))
    depth = max((name.count(".") for name, _ in kept), default=0)
    while len(kept) > MAX_CANDIDATES and depth > 0:
        depth -= 1
        kept = [(name, position) for name, position in kept if name.count(".") <= depth]
    return kept


def _penalty(trace: Trace, name: str, position: int) -> float:
    """Bytes that cross, a little more for a module deep in the tree: whole blocks make readable stages."""
    crossing = sum(trace.values[value].bytes for value in trace.live(position))
    return crossing * (1.0 + 0.01 * name.count("."))
