"""How a pipeline cuts a counted job: the part of each block that every stage does, and what crosses between stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from shardwise.spec.balance import balanced
from shardwise.spec.plan import V_SHAPED, Plan
from shardwise.spec.schedule import rank_of, stages_for
from shardwise.spec.work import CutFacts, JobFacts


@dataclass(frozen=True)
class Stages:
    """The stages of a plan.

    Attributes:
        parts: of every stage: block -> the part of its work that is done there.
        sent_bytes, returned_bytes: of every cut, for one sample: what goes on, and the gradients that come back.
        shared_bytes: parameters that several stages hold, whose gradients are summed over them.
        schedule, ranks: what they are priced with.
    """

    parts: tuple[Mapping[int, float], ...]
    sent_bytes: tuple[float, ...]
    returned_bytes: tuple[float, ...]
    shared_bytes: float
    schedule: str
    ranks: int

    def by_rank(self, values: Sequence[float]) -> list[float]:
        """Sums over the stages of every rank."""
        found = [0.0] * self.ranks
        for stage, value in enumerate(values):
            found[rank_of(stage, self.ranks, self.schedule)] += value
        return found


def stages_of(facts: JobFacts, plan: Plan) -> Stages:
    """The stages that training would make, where the places for cuts are known; else whole blocks.

    There are fewer than the plan's schedule asks for where the model has too few places.
    """
    count = 1 if plan.layout.pipeline == 1 else stages_for(plan.schedule, plan.layout.pipeline, *_said(plan))
    if count == 1:
        return Stages((dict.fromkeys(range(len(facts.model.blocks)), 1.0),), (), (), 0.0, plan.schedule, 1)
    cuts = _chosen(facts.cuts, count, plan.cuts)
    if cuts is not None:
        ends = [(0, 0.0), *((cut.block, cut.inside) for cut in cuts), (len(facts.model.blocks), 0.0)]
        parts = tuple(_between(start, end) for start, end in pairwise(ends))
        sent, returned = ([getattr(cut, name) for cut in cuts] for name in ("sent_bytes", "returned_bytes"))
        shared = max(cut.shared_bytes for cut in cuts)
    else:
        whole = stage_blocks(facts, count)
        parts = tuple(dict.fromkeys(blocks, 1.0) for blocks in whole)
        sent = returned = [facts.model.blocks[blocks[-1]].output_bytes for blocks in whole[:-1]]
        shared = 0.0
    schedule, ranks = _placed(plan, len(parts))
    return Stages(parts, tuple(sent), tuple(returned), shared, schedule, ranks)


def _said(plan: Plan) -> tuple[Sequence[object], int | None]:
    """What a plan says about its stages: an entry for each cut, and stages a rank."""
    return plan.cuts or plan.stage_layers[1:], plan.virtual_stages


@lru_cache(maxsize=512)
def _chosen(cuts: tuple[CutFacts, ...], stages: int, named: tuple[str, ...]) -> tuple[CutFacts, ...] | None:
    """The cuts that training makes; None where they are not known."""
    if named:
        known = {cut.name: cut for cut in cuts}
        wanted = [known.get(name) for name in named]
        return tuple(cut for cut in wanted if cut is not None) if None not in wanted else None
    if len(cuts) < stages - 1:
        return None
    # as parallel/pipeline/cuts.py weighs them: bytes that cross, a little more for a module deep in the tree
    penalties = [cut.sent_bytes * (1.0 + 0.01 * cut.name.count(".")) for cut in cuts]
    return tuple(cuts[index - 1] for index in balanced([0.0, *(cut.work for cut in cuts), 1.0], penalties, stages))


def _between(start: tuple[int, float], end: tuple[int, float]) -> dict[int, float]:
    """Block -> the part of it that lies between two places, each a block and a part of it."""
    found = {}
    for block in range(start[0], end[0] + 1):
        part = (end[1] if block == end[0] else 1.0) - (start[1] if block == start[0] else 0.0)
        if part > 0.0:
            found[block] = part
    return found


def stage_blocks(facts: JobFacts, stages: int) -> list[list[int]]:
    """Blocks of every pipeline stage: consecutive, the busiest stage with the least work (by FLOPs and bytes moved)."""
    blocks = facts.model.blocks
    work = [block.forward_flops + block.forward_bytes for block in blocks]
    stages = min(stages, len(blocks))
    low, high = max(work, default=0.0), sum(work)
    for _ in range(50):
        middle = (low + high) / 2
        if len(_pack(work, middle)) <= stages:
            high = middle
        else:
            low = middle
    packed = _pack(work, high)
    while len(packed) < stages:  # a stage of one block cannot be cut: take the largest of the others
        index = max((i for i, part in enumerate(packed) if len(part) > 1), key=lambda i: len(packed[i]))
        part = packed[index]
        packed[index : index + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return packed


def _pack(work: Sequence[float], most: float) -> list[list[int]]:
    found: list[list[int]] = [[]]
    filled = 0.0
    for index, each in enumerate(work):
        if found[-1] and filled + each > most:
            found.append([])
            filled = 0.0
        found[-1].append(index)
        filled += each
    return found


def _placed(plan: Plan, stages: int) -> tuple[str, int]:
    """The schedule and the number of ranks that so many stages are priced with."""
    least = plan.layout.pipeline * (2 if plan.schedule in (*V_SHAPED, "interleaved1f1b") else 1)
    if stages < least or stages % plan.layout.pipeline:
        return "1f1b", stages  # the model has too few blocks to say how it would be cut
    return plan.schedule, plan.layout.pipeline
