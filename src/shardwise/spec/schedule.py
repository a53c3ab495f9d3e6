"""Schedules as tables: for every rank, the order in which it computes, sends and receives.

A message is listed in the same order by everybody: rows are cut out of one line of time, so that no two ranks wait for
each other's later messages, even where a rank's messages are worked off strictly one after the other (NCCL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from shardwise.errors import PlanError
from shardwise.spec.plan import SCHEDULES, V_SHAPED

Kind = Literal["F", "B", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
CHUNKS = 2
"""Stages per rank of the interleaved schedule where no cuts say otherwise."""
FORWARD_TIME, BACKWARD_TIME = 1, 2
"""Relative durations that order the messages: a backward pass computes two products for one of the forward pass."""


class Action(NamedTuple):
    """One entry of a row: F and B compute, and W what a halved B left, the gradients of weights; SEND_F hands a stage's
    activations on, RECV_F takes those a stage needs; SEND_B and RECV_B do so with gradients."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@final
@dataclass(frozen=True)
class ScheduleTable:
    """The rows of all ranks; prints itself.

    Attributes:
        placement: the rank of every stage.
    """

    name: str
    placement: tuple[int, ...]
    micro_batches: int
    rows: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.placement)

    def __str__(self) -> str:
        head = f"{self.name}: {self.stages} stages on {self.ranks} ranks, {self.micro_batches} micro-batches"
        return "\n".join([head, *(f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.rows))])


def rank_of(stage: int, ranks: int, schedule: str) -> int:
    """The pipeline rank that has a stage: round robin, or from the first rank to the last and back for a V."""
    if schedule in V_SHAPED:
        return stage if stage < ranks else 2 * ranks - 1 - stage
    return stage % ranks


def placement_of(schedule: str, ranks: int, stages: int) -> tuple[int, ...]:
    """The rank of every stage."""
    return tuple(rank_of(stage, ranks, schedule) for stage in range(2 * ranks if schedule in V_SHAPED else stages))


def warm_up(schedule: str, rank: int, ranks: int, chunks: int, micro_batches: int) -> int:
    """Forward passes that a rank runs before its first backward pass, and then is ahead by, in schedules of one fixed order."""
    if schedule == "gpipe":
        return micro_batches
    return (ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1 if schedule == "interleaved1f1b" else ranks - rank


def stages_for(schedule: str, ranks: int, cuts: Sequence[object] = (), virtual_stages: int | None = None) -> int:
    """How many stages a model is cut into.

    Args:
        cuts: one entry for each, of any kind; empty where they are chosen.
        virtual_stages: of every rank, where the plan says so.

    Raises:
        PlanError: these do not fit the ranks, or each other.
    """
    if schedule in V_SHAPED:
        return 2 * ranks
    if schedule != "interleaved1f1b":
        return ranks
    stages = len(cuts) + 1 if cuts else (virtual_stages or CHUNKS) * ranks
    if virtual_stages is not None and stages != virtual_stages * ranks:
        raise PlanError(
            f"plan virtual_stages={virtual_stages} makes {virtual_stages * ranks} stages on {ranks} ranks, but its cuts make "
            f"{stages}: leave one of them out"
        )
    if stages % ranks or stages == ranks:
        raise PlanError(
            f"plan schedule='interleaved1f1b' with {stages} stages on {ranks} ranks: every rank needs the same number of "
            f"stages, at least two; name {CHUNKS * ranks - 1} cuts or none"
        )
    return stages


def schedule_table(schedule: str, ranks: int, stages: int, micro_batches: int) -> ScheduleTable:
    """The table for one optimizer step.

    gpipe: Huang et al. 2019. 1f1b: Narayanan et al. 2019 (PipeDream-flush). interleaved1f1b: Narayanan et al. 2021,
    section 2.2; a number of micro-batches that the ranks do not divide leaves gaps. zerobubble and zbv: in the manner of
    ZB-H1 and ZB-V of Qi et al. 2023, with the memory of 1f1b, but found greedily. dualpipev: DeepSeek-AI 2024 (DualPipe), on
    one V instead of two ("cut in half").
    """
    placement = placement_of(schedule, ranks, stages)
    rows = computations(schedule, ranks, stages, micro_batches)
    return ScheduleTable(schedule, placement, micro_batches, _with_messages(rows, placement))


def computations(schedule: str, ranks: int, stages: int, micro_batches: int) -> list[list[Action]]:
    """The rows of the table without their messages.

    Raises:
        PlanError: an unknown schedule.
    """
    if schedule in ("gpipe", "1f1b"):
        warm = [min(micro_batches, warm_up(schedule, rank, ranks, 1, micro_batches)) for rank in range(ranks)]
        return [_taking_turns(rank, warm[rank], micro_batches) for rank in range(ranks)]
    if schedule in ("zerobubble", "zbv"):
        return _zero_bubble(placement_of(schedule, ranks, stages), ranks, micro_batches)
    if schedule == "dualpipev":
        return [_dual_pipe(rank, ranks, micro_batches) for rank in range(ranks)]
    if schedule == "interleaved1f1b":
        return [_interleaved(rank, ranks, stages // ranks, micro_batches) for rank in range(ranks)]
    raise PlanError(f"plan schedule={schedule!r}: known tables are {', '.join(SCHEDULES)}")


def forward_table(placement: tuple[int, ...], ranks: int, micro_batches: int) -> ScheduleTable:
    """The table for an evaluation: forward passes only."""
    groups = [range(start, min(start + ranks, micro_batches)) for start in range(0, micro_batches, ranks)]
    owned = [[stage for stage, at in enumerate(placement) if at == rank] for rank in range(ranks)]
    rows = [[Action("F", stage, index) for group in groups for stage in mine for index in group] for mine in owned]
    return ScheduleTable("forward", placement, micro_batches, _with_messages(rows, placement))


def _taking_turns(rank: int, warm: int, micro_batches: int) -> list[Action]:
    row = [Action("F", rank, index) for index in range(warm)]
    for index in range(micro_batches):
        row.append(Action("B", rank, index))
        if warm + index < micro_batches:
            row.append(Action("F", rank, warm + index))
    return row


def _interleaved(rank: int, ranks: int, chunks: int, micro_batches: int) -> list[Action]:
    """Micro-batches advance in groups of `ranks` through a rank's stages; a last, smaller group leaves its gaps empty."""
    padded = -(-micro_batches // ranks) * ranks
    total = padded * chunks
    warm = min(total, warm_up("interleaved1f1b", rank, ranks, chunks, micro_batches))

    def action(place: int, kind: Kind) -> Action:
        chunk = place // ranks % chunks
        chunk = chunk if kind == "F" else chunks - 1 - chunk
        return Action(kind, chunk * ranks + rank, place // (ranks * chunks) * ranks + place % ranks)

    row = [action(place, "F") for place in range(warm)]
    for place in range(total):
        row.append(action(place, "B"))
        if warm + place < total:
            row.append(action(warm + place, "F"))
    return [item for item in row if item.micro_batch < micro_batches]


def _zero_bubble(placement: tuple[int, ...], ranks: int, micro_batches: int) -> list[list[Action]]:
    """Rows of F, B (gradients of activations) and W (of weights), found by letting time pass: a rank prefers B, for which
    others wait, to F, and F to W, and its later stage to its earlier one; it holds no more than under 1f1b."""
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    owned = [[stage for stage, at in enumerate(placement) if at == rank][::-1] for rank in range(ranks)]
    ends: dict[tuple[str, int, int], int] = {}
    count: dict[tuple[str, int], int] = {(kind, stage): 0 for kind in "FBW" for stage in range(len(placement))}
    chunks = len(placement) // ranks

    def ready(kind: Kind, stage: int, now: int) -> bool:
        index = count[kind, stage]
        needed = _needed(Action(kind, stage, index), len(placement))
        return index < micro_batches and (needed is None or ends.get(needed, now) < now)

    def room(rank: int, stage: int) -> bool:
        held = sum(count["F", own] - count["W", own] for own in owned[rank])
        if chunks == 1:
            return held < ranks and count["F", stage] - count["B", stage] < ranks - rank
        return held < chunks * ranks - (stage < ranks)  # the way up frees memory first: it always finds room

    now = 0
    while any(count["W", stage] < micro_batches for stage in range(len(placement))):
        for rank in range(ranks):
            wanted: list[tuple[Kind, int]] = [("B", stage) for stage in owned[rank]]
            wanted += [("F", stage) for stage in owned[rank] if room(rank, stage)]
            wanted += [("W", stage) for stage in owned[rank]]
            chosen = next((item for item in wanted if ready(*item, now)), None)
            if chosen is not None:
                action = Action(*chosen, count[chosen])
                rows[rank].append(action)
                ends[action.kind, action.stage, action.micro_batch] = now
                count[chosen] += 1
        now += 1
    return rows


def _dual_pipe(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Down and up again the V: F and B of different micro-batches take turns, and passes are halved where others wait.

    Fewer micro-batches than twice the ranks leave their gaps empty.
    """
    count = max(micro_batches, 2 * ranks)
    down, up = rank, 2 * ranks - 1 - rank
    before, after = rank + 1, ranks - rank - 1
    row: list[Action] = []
    waiting: list[Action] = []
    seen: dict[tuple[Kind, int], int] = {}

    def add(kind: Kind, stage: int, *, halved: bool = False) -> None:
        index = seen.get((kind, stage), 0)
        seen[kind, stage] = index + 1
        row.append(Action(kind, stage, index))
        if halved:
            waiting.append(Action("W", stage, index))

    for _ in range(2 * after):
        add("F", down)
    for _ in range(before):
        add("F", down)
        add("F", up)
    for _ in range(after):
        add("B", up, halved=True)
        row.append(waiting.pop())
        add("F", up)
    for step in range(count - 2 * ranks + before + after):
        if step < count - 2 * ranks + before:
            add("F", down)
        add("B", up)
        add("F", up)
        add("B", down)
    for step in range(before):
        add("B", up, halved=step >= before // 2)
        add("B", down, halved=step >= before // 2)
    for _ in range(after):
        row.append(waiting.pop(0))
        add("B", down, halved=True)
    return [action for action in row + waiting if action.micro_batch < micro_batches]


def _with_messages(rows: Sequence[Sequence[Action]], placement: tuple[int, ...]) -> tuple[tuple[Action, ...], ...]:
    """The rows with the messages between them, at the times at which they can be sent."""
    # (time, messages before computations at that time, a fixed order among messages, the action)
    timed: list[list[tuple[int, int, int, Action]]] = [[] for _ in rows]
    serial = 0
    for begin, end, rank, action in _simulate(rows, len(placement)):
        timed[rank].append((begin, 1, serial, action))
        if action.kind == "W":
            continue
        ahead = action.kind == "F"
        target = action.stage + 1 if ahead else action.stage - 1
        serial += 1
        if not 0 <= target < len(placement) or placement[target] == rank:
            continue
        sends, receives = ("SEND_F", "RECV_F") if ahead else ("SEND_B", "RECV_B")
        timed[rank].append((end, 0, serial, Action(sends, action.stage, action.micro_batch)))  # type: ignore[arg-type]
        there = placement[target]
        timed[there].append((end, 0, serial, Action(receives, target, action.micro_batch)))  # type: ignore[arg-type]
    return tuple(tuple(action for *_, action in sorted(row)) for row in timed)


def halved_passes(row: Sequence[Action]) -> frozenset[tuple[int, int]]:
    """(stage, micro-batch) of the backward passes in two halves: those that a W completes."""
    return frozenset((action.stage, action.micro_batch) for action in row if action.kind == "W")


def _simulate(rows: Sequence[Sequence[Action]], stages: int) -> list[tuple[int, int, int, Action]]:
    """(begin, end, rank, action) of every computation if messages took no time, ordered by end and rank."""
    done: dict[tuple[str, int, int], int] = {}
    halved = [halved_passes(row) for row in rows]
    clock = [0] * len(rows)
    place = [0] * len(rows)
    found: list[tuple[int, int, int, Action]] = []
    while any(at < len(row) for at, row in zip(place, rows, strict=True)):
        moved = False
        for rank, row in enumerate(rows):
            while place[rank] < len(row):
                action = row[place[rank]]
                needed = _needed(action, stages)
                if needed is not None and needed not in done:
                    break
                begin = max(clock[rank], done[needed] if needed is not None else 0)
                whole = action.kind == "B" and action[1:] not in halved[rank]
                clock[rank] = begin + (BACKWARD_TIME if whole else FORWARD_TIME)
                done[(action.kind, action.stage, action.micro_batch)] = clock[rank]
                found.append((begin, clock[rank], rank, action))
                place[rank] += 1
                moved = True
        if not moved:
            raise AssertionError("the schedule waits for itself")
    return sorted(found, key=lambda item: (item[1], item[2]))


def _needed(action: Action, stages: int) -> tuple[str, int, int] | None:
    if action.kind == "F":
        return ("F", action.stage - 1, action.micro_batch) if action.stage else None
    if action.kind == "W":
        return ("B", action.stage, action.micro_batch)
    if action.stage == stages - 1:
        return ("F", action.stage, action.micro_batch)
    return ("B", action.stage + 1, action.micro_batch)
