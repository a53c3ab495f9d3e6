"""Pipeline schedules as tables, and their duration by simulating the table.

A table has one row per pipeline rank: the order in which that rank runs its actions. Legend: F forward, B backward
(with `zerobubble` and the V schedules only the gradient of the input), W gradient of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from shardwise.errors import PlanError
from shardwise.spec.plan import HALVED, V_SHAPED

Action = tuple[str, int, int]
"""(kind, stage, micro-batch)."""

WEIGHT_SHARE = 0.5
"""Share of the backward pass that computes weight gradients; a linear layer has one product for each."""


MAX_GREEDY = 256
"""Largest ranks x micro-batches for which a V schedule is placed action by action."""

MAX_ACTIONS = 150_000
"""Largest table that is simulated, about half a second; a larger one takes the closed form."""


@dataclass(frozen=True)
class Timeline:
    """Result of a simulation.

    Attributes:
        seconds: until the last rank is done.
        busiest_seconds: work of the busiest rank.
        in_flight: largest number of chunks in flight, one entry a rank.
    """

    seconds: float
    busiest_seconds: float
    in_flight: tuple[int, ...]

    @property
    def bubble(self) -> float:
        """Idle share of the busiest rank."""
        return 1.0 - self.busiest_seconds / self.seconds if self.seconds else 0.0


def rank_of(stage: int, ranks: int, schedule: str) -> int:
    """Pipeline rank that holds `stage`: round robin, or down and up again for the V schedules."""
    if schedule in V_SHAPED:
        return stage if stage < ranks else 2 * ranks - 1 - stage
    return stage % ranks


def stages_per_rank(schedule: str, virtual_stages: int) -> int:
    """Chunks of the model on each rank: V schedules have two, plain schedules one."""
    if schedule in V_SHAPED:
        return 2
    return virtual_stages if schedule == "interleaved1f1b" else 1


def table(schedule: str, ranks: int, micro_batches: int, virtual_stages: int = 1) -> list[list[Action]]:
    """The order of actions of every rank.

    gpipe: Huang et al. 2019. 1f1b: Narayanan et al. 2019 (PipeDream-flush). interleaved1f1b: Narayanan et al. 2021,
    section 2.2. zerobubble: 1f1b whose weight gradients fill the gaps (Qi et al. 2023, ZB-H1); they are placed by the
    simulation. zbv and dualpipev have no fixed order here: the simulation builds one.

    Raises:
        PlanError: an unknown schedule.
    """
    if schedule == "gpipe":
        forward = [[("F", rank, index) for index in range(micro_batches)] for rank in range(ranks)]
        return [row + [("B", rank, index) for index in range(micro_batches)] for rank, row in enumerate(forward)]
    if schedule in ("1f1b", "zerobubble"):
        return [_one_forward_one_backward(rank, ranks, micro_batches) for rank in range(ranks)]
    if schedule == "interleaved1f1b":
        return [_interleaved(rank, ranks, micro_batches, virtual_stages) for rank in range(ranks)]
    raise PlanError(f"schedule {schedule!r}: a table exists for gpipe, 1f1b, interleaved1f1b and zerobubble")


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    warm = min(ranks - rank, micro_batches)
    row: list[Action] = [("F", rank, index) for index in range(warm)]
    for index in range(micro_batches):
        row.append(("B", rank, index))
        if warm + index < micro_batches:
            row.append(("F", rank, warm + index))
    return row


def _interleaved(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[Action]:
    """Micro-batches advance in groups of `ranks`; a last, smaller group leaves its gaps empty."""
    padded = -(-micro_batches // ranks) * ranks
    total = padded * chunks
    warm = min(total, (ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1)

    def item(position: int, kind: str) -> Action:
        chunk = position // ranks % chunks
        chunk = chunk if kind == "F" else chunks - 1 - chunk
        return kind, chunk * ranks + rank, position // (ranks * chunks) * ranks + position % ranks

    row = [item(position, "F") for position in range(warm)]
    for position in range(total):
        row.append(item(position, "B"))
        if warm + position < total:
            row.append(item(warm + position, "F"))
    return [action for action in row if action[2] < micro_batches]


def closed_form(
    schedule: str,
    micro_batches: int,
    forward_seconds: tuple[float, ...],
    backward_seconds: tuple[float, ...],
    send_seconds: float,
    ranks: int,
) -> Timeline:
    """What `simulate` finds, by the formula for stages of equal time: exact for those, close for others, and fast.

    1f1b and gpipe: every stage once and the slowest stage for the other micro-batches. Interleaved with v chunks: the
    ramp is v times shorter (Narayanan et al. 2021, section 2.2). zerobubble: the ramp holds forward + backward - 2 x
    weight gradient (Qi et al. 2023, table 2); V schedules: for equal times only the last rank's later start.
    """
    stages = len(forward_seconds)
    chunks = stages // ranks
    pairs = [ahead + back for ahead, back in zip(forward_seconds, backward_seconds, strict=True)]
    owned: list[float] = [0.0] * ranks
    for stage, pair in enumerate(pairs):
        owned[rank_of(stage, ranks, schedule)] += pair
    busiest = max(owned)
    if schedule in V_SHAPED:
        ramp = sum(forward_seconds) / stages * (ranks - 1)
    elif schedule == "zerobubble":
        ramp = (sum(pairs) - 2.0 * WEIGHT_SHARE * sum(backward_seconds)) * (ranks - 1) / ranks
    elif chunks > 1:
        ramp = sum(pairs) / chunks * (ranks - 1) / ranks
    else:
        ramp = sum(pairs) - busiest
    sends = 2.0 * (ranks - 1) * send_seconds
    if schedule == "gpipe":
        flight = [micro_batches] * ranks
    elif schedule in V_SHAPED:
        flight = [min(2 * micro_batches, 2 * ranks)] * ranks
    elif chunks > 1:
        flight = [
            min(micro_batches * chunks, (ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1) for rank in range(ranks)
        ]
    else:
        flight = [min(micro_batches, ranks - rank) for rank in range(ranks)]
    return Timeline(micro_batches * busiest + ramp + sends, micro_batches * busiest, tuple(flight))


@lru_cache(maxsize=4096)
def simulate(
    schedule: str,
    micro_batches: int,
    forward_seconds: tuple[float, ...],
    backward_seconds: tuple[float, ...],
    send_seconds: float,
    ranks: int,
) -> Timeline:
    """Run the table: an action starts when its rank is free and what it needs has arrived.

    Args:
        forward_seconds, backward_seconds: per stage, in model order; `ranks * stages_per_rank` entries.
        send_seconds: time of an activation or a gradient between two ranks; the sender goes on computing.

    Long runs repeat themselves: beyond four groups of `ranks` micro-batches (three on more than 16 ranks) the rest is
    extended by the period of the last simulated group, which is at least the work of the busiest rank. One rank, and
    tables too long to place action by action, take the closed form.
    """
    actions = ranks * min(micro_batches, 4 * ranks)
    too_long = (
        actions > MAX_GREEDY if schedule in V_SHAPED else 2 * actions * len(forward_seconds) > MAX_ACTIONS * ranks
    )
    if ranks == 1 or too_long:
        return closed_form(schedule, micro_batches, forward_seconds, backward_seconds, send_seconds, ranks)
    settle = (4 if ranks <= 16 else 3) * ranks
    if micro_batches >= settle + ranks:
        extra = (micro_batches - settle) % ranks
        short = _run(schedule, settle + extra, forward_seconds, backward_seconds, send_seconds, ranks)
        shorter = _run(schedule, settle + extra - ranks, forward_seconds, backward_seconds, send_seconds, ranks)
        groups = (micro_batches - settle - extra) // ranks
        pace = short.busiest_seconds * ranks / (settle + extra)
        return Timeline(
            short.seconds + groups * max(pace, short.seconds - shorter.seconds),
            short.busiest_seconds * micro_batches / (settle + extra),
            short.in_flight if schedule != "gpipe" else tuple(micro_batches for _ in range(ranks)),
        )
    return _run(schedule, micro_batches, forward_seconds, backward_seconds, send_seconds, ranks)


def _run(
    schedule: str, micro_batches: int, forward: Sequence[float], backward: Sequence[float], send: float, ranks: int
) -> Timeline:
    if schedule in V_SHAPED:
        return _greedy(schedule, micro_batches, forward, backward, send, ranks)
    stages = len(forward)
    rows = table(schedule, ranks, micro_batches, stages // ranks)
    split = schedule in HALVED
    weights = [time * WEIGHT_SHARE if split else 0.0 for time in backward]
    done_f = [[-1.0] * micro_batches for _ in range(stages)]
    done_b = [[-1.0] * micro_batches for _ in range(stages)]
    clock, place, pending = [0.0] * ranks, [0] * ranks, [0] * ranks
    waiting = list(range(ranks))
    hop = send if ranks > 1 else 0.0
    while waiting:
        rank = waiting.pop()
        row, now = rows[rank], clock[rank]
        while place[rank] < len(row):
            kind, stage, index = row[place[rank]]
            ready = _ready(kind, stage, index, stages, done_f, done_b, hop)
            if ready < 0.0:
                break
            if split and ready > now and pending[rank]:
                filled = min(pending[rank], int((ready - now) / weights[stage]) if weights[stage] else 0)
                now, pending[rank] = now + filled * weights[stage], pending[rank] - filled
            start = ready if ready > now else now
            if kind == "F":
                now = start + forward[stage]
                done_f[stage][index] = now
                wakes = (stage + 1) % ranks if stage + 1 < stages else rank
            else:
                now = start + backward[stage] - weights[stage]
                done_b[stage][index] = now
                pending[rank] += split
                wakes = (stage - 1) % ranks if stage else rank
            place[rank] += 1
            if wakes != rank and wakes not in waiting:
                waiting.append(wakes)
        clock[rank] = now
    if split:
        clock = [now + pending[rank] * weights[rank] for rank, now in enumerate(clock)]
    busy = [micro_batches * sum(forward[s] + backward[s] for s in range(rank, stages, ranks)) for rank in range(ranks)]
    return Timeline(max(clock), max(busy), tuple(_peak(row) for row in rows))


def _ready(
    kind: str, stage: int, index: int, stages: int, done_f: list[list[float]], done_b: list[list[float]], hop: float
) -> float:
    """When the input of an action has arrived; negative while it has not been produced."""
    if kind == "F":
        if stage == 0:
            return 0.0
        before = done_f[stage - 1][index]
        return before + hop if before >= 0.0 else -1.0
    if done_f[stage][index] < 0.0:
        return -1.0
    if stage == stages - 1:
        return done_f[stage][index]
    before = done_b[stage + 1][index]
    return before + hop if before >= 0.0 else -1.0


def _peak(row: Sequence[Action]) -> int:
    """Largest number of chunks whose forward pass ran and whose backward pass did not."""
    level = peak = 0
    for kind, _, _ in row:
        level += 1 if kind == "F" else -1
        peak = max(peak, level)
    return peak


def _greedy(
    schedule: str, micro_batches: int, forward: Sequence[float], backward: Sequence[float], send: float, ranks: int
) -> Timeline:
    """V-shaped stages without a fixed order: backward first, then forward within 2 x ranks chunks in flight, weights in gaps."""
    stages = len(forward)
    weights = [time * WEIGHT_SHARE for time in backward]
    clock, pending = [0.0] * ranks, [[0.0] * 0 for _ in range(ranks)]
    level, peak = [0] * ranks, [0] * ranks
    ready: list[list[tuple[float, str, int, int]]] = [[] for _ in range(ranks)]
    for index in range(micro_batches):
        ready[0].append((0.0, "F", 0, index))
    left = 2 * stages * micro_batches
    while left:
        chosen: tuple[float, int, int, int, int, str, int] | None = None
        for rank in range(ranks):
            for time, kind, stage, index in ready[rank]:
                if kind == "F" and stage < ranks and level[rank] >= 2 * ranks - 1:
                    continue
                start = max(time, clock[rank])
                key = (start, 0 if kind == "B" else 1, -stage if kind == "F" else stage, index, rank, kind, stage)
                chosen = key if chosen is None or key < chosen else chosen
        if chosen is None:
            raise AssertionError("the greedy schedule is stuck")
        start, _, _, index, rank, kind, stage = chosen
        ready[rank] = [item for item in ready[rank] if item[1:] != (kind, stage, index)]
        while pending[rank] and clock[rank] + pending[rank][0] <= start:
            clock[rank] += pending[rank].pop(0)
        seconds = forward[stage] if kind == "F" else backward[stage] - weights[stage]
        clock[rank] = max(clock[rank], start) + seconds
        level[rank] += 1 if kind == "F" else -1
        peak[rank] = max(peak[rank], level[rank])
        if kind == "B":
            pending[rank].append(weights[stage])
        _release(ready, kind, stage, index, stages, clock[rank], send, ranks, schedule)
        left -= 1
    ends = [clock[rank] + sum(pending[rank]) for rank in range(ranks)]
    owned = [[stage for stage in range(stages) if rank_of(stage, ranks, schedule) == rank] for rank in range(ranks)]
    busy = [micro_batches * sum(forward[s] + backward[s] for s in mine) for mine in owned]
    return Timeline(max(ends), max(busy), tuple(peak))


def _release(
    ready: list[list[tuple[float, str, int, int]]],
    kind: str,
    stage: int,
    index: int,
    stages: int,
    end: float,
    send: float,
    ranks: int,
    schedule: str,
) -> None:
    here = rank_of(stage, ranks, schedule)
    if kind == "F" and stage == stages - 1:
        ready[here].append((end, "B", stage, index))
        return
    following = stage + 1 if kind == "F" else stage - 1
    if following < 0:
        return
    there = rank_of(following, ranks, schedule)
    ready[there].append((end + (send if there != here else 0.0), kind, following, index))
