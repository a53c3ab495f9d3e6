"""Schedules as tables: for every rank, the order in which it computes, sends and receives.

A message is listed in the same order by everybody: rows are cut out of one line of time, so that no two ranks wait for
each other's later messages, even where a rank's messages are worked off strictly one after the other (NCCL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from shardwise.errors import PlanError

Kind = Literal["F", "B", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
READY_SCHEDULES = ("gpipe", "1f1b", "interleaved1f1b", "zerobubble")
HALVED = ("zerobubble",)
"""Schedules whose backward pass is in two halves."""
"""Schedules this version runs."""
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
    """The rows of all ranks; prints itself."""

    name: str
    ranks: int
    stages: int
    micro_batches: int
    rows: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        head = f"{self.name}: {self.stages} stages on {self.ranks} ranks, {self.micro_batches} micro-batches"
        return "\n".join([head, *(f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.rows))])


def rank_of(stage: int, ranks: int) -> int:
    """The rank that runs a stage: round robin."""
    return stage % ranks


def stages_for(schedule: str, ranks: int, cuts: Sequence[str] = ()) -> int:
    """How many stages a model is cut into.

    Raises:
        PlanError: this version does not run the schedule, or the cuts do not fit the ranks.
    """
    if schedule not in READY_SCHEDULES:
        raise PlanError(
            f"plan schedule={schedule!r}: this version runs {', '.join(READY_SCHEDULES)}; {schedule} places the stages in a V, "
            "the first and the last one on the same rank, which it does not do. Use schedule='zerobubble' or "
            "'interleaved1f1b' for a smaller bubble"
        )
    if schedule != "interleaved1f1b":
        return ranks
    stages = len(cuts) + 1 if cuts else CHUNKS * ranks
    if stages % ranks or stages == ranks:
        raise PlanError(
            f"plan schedule='interleaved1f1b' with {stages} stages on {ranks} ranks: every rank needs the same number of "
            f"stages, at least two; name {CHUNKS * ranks - 1} cuts or none"
        )
    return stages


def schedule_table(schedule: str, ranks: int, stages: int, micro_batches: int) -> ScheduleTable:
    """The table for one optimizer step.

    gpipe: Huang et al. 2019. 1f1b: Narayanan et al. 2019 (PipeDream-flush). interleaved1f1b: Narayanan et al. 2021,
    section 2.2; a number of micro-batches that the ranks do not divide leaves gaps. zerobubble: in the manner of
    ZB-H1 of Qi et al. 2023, with the memory of 1f1b, but found greedily.
    """
    if schedule == "gpipe":
        rows = [_all_forward_all_backward(rank, micro_batches) for rank in range(ranks)]
    elif schedule == "1f1b":
        rows = [_one_forward_one_backward(rank, ranks, micro_batches) for rank in range(ranks)]
    elif schedule == "zerobubble":
        rows = _zero_bubble(ranks, micro_batches)
    elif schedule == "interleaved1f1b":
        rows = [_interleaved(rank, ranks, stages // ranks, micro_batches) for rank in range(ranks)]
    else:
        raise PlanError(f"plan schedule={schedule!r}: known tables are {', '.join(READY_SCHEDULES)}")
    return ScheduleTable(
        schedule, ranks, stages, micro_batches, _with_messages(rows, ranks, stages, schedule in HALVED)
    )


def forward_table(ranks: int, stages: int, micro_batches: int) -> ScheduleTable:
    """The table for an evaluation: forward passes only."""
    groups = [range(start, min(start + ranks, micro_batches)) for start in range(0, micro_batches, ranks)]
    rows = [
        [Action("F", stage, index) for group in groups for stage in range(rank, stages, ranks) for index in group]
        for rank in range(ranks)
    ]
    return ScheduleTable("forward", ranks, stages, micro_batches, _with_messages(rows, ranks, stages))


def _all_forward_all_backward(rank: int, micro_batches: int) -> list[Action]:
    forward = [Action("F", rank, index) for index in range(micro_batches)]
    return forward + [Action("B", rank, index) for index in range(micro_batches)]


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    warm = min(ranks - rank, micro_batches)
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
    warm = min(total, (ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1)

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


def _zero_bubble(ranks: int, micro_batches: int) -> list[list[Action]]:
    """Rows of F, B (gradients of activations) and W (of weights), found by letting time pass: a rank prefers B, for which
    others wait, to F, and F to W, and holds no more micro-batches than under 1f1b."""
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    done: dict[str, list[dict[int, int]]] = {kind: [{} for _ in range(ranks)] for kind in ("F", "B", "W")}
    now = 0
    while any(len(done["W"][rank]) < micro_batches for rank in range(ranks)):
        for rank in range(ranks):
            f, b, w = (len(done[kind][rank]) for kind in ("F", "B", "W"))
            arrived = rank == 0 or done["F"][rank - 1].get(f, now) < now
            returned = done["B"][rank + 1].get(b, now) < now if rank + 1 < ranks else b < f
            kind: Kind | None = None
            if b < f and returned:
                kind = "B"
            elif f < micro_batches and arrived and f - b < ranks - rank and f - w < ranks:
                kind = "F"
            elif w < b:
                kind = "W"
            if kind is not None:
                index = {"F": f, "B": b, "W": w}[kind]
                rows[rank].append(Action(kind, rank, index))
                done[kind][rank][index] = now
        now += 1
    return rows


def _with_messages(
    rows: Sequence[Sequence[Action]], ranks: int, stages: int, halved: bool = False
) -> tuple[tuple[Action, ...], ...]:
    """The rows with the messages between them, at the times at which they can be sent."""
    # (time, messages before computations at that time, a fixed order among messages, the action)
    timed: list[list[tuple[int, int, int, Action]]] = [[] for _ in range(ranks)]
    serial = 0
    for begin, end, rank, action in _simulate(rows, stages, halved):
        timed[rank].append((begin, 1, serial, action))
        if action.kind == "W":
            continue
        ahead = action.kind == "F"
        target = action.stage + 1 if ahead else action.stage - 1
        serial += 1
        if not 0 <= target < stages or rank_of(target, ranks) == rank:
            continue
        sends, receives = ("SEND_F", "RECV_F") if ahead else ("SEND_B", "RECV_B")
        timed[rank].append((end, 0, serial, Action(sends, action.stage, action.micro_batch)))  # type: ignore[arg-type]
        there = rank_of(target, ranks)
        timed[there].append((end, 0, serial, Action(receives, target, action.micro_batch)))  # type: ignore[arg-type]
    return tuple(tuple(action for *_, action in sorted(row)) for row in timed)


def _simulate(rows: Sequence[Sequence[Action]], stages: int, halved: bool) -> list[tuple[int, int, int, Action]]:
    """(begin, end, rank, action) of every computation if messages took no time, ordered by end and rank."""
    done: dict[tuple[str, int, int], int] = {}
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
                clock[rank] = begin + (BACKWARD_TIME if action.kind == "B" and not halved else FORWARD_TIME)
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
