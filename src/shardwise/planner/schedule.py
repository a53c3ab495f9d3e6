"""How long a pipeline takes, by simulating its schedule; the order of the passes is that of `spec/schedule.py`.

Legend: F forward, B backward (with `zerobubble` and the V schedules only the gradient of the input), W gradient of the weights.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import inf
from operator import sub

from shardwise.planner.closedform import WEIGHT_SHARE, Timeline, Wire, closed_form, flight
from shardwise.planner.inorder import spans
from shardwise.spec.plan import V_SHAPED
from shardwise.spec.schedule import computations, rank_of, schedule_table, warm_up

Action = tuple[str, int, int]
"""(kind, stage, micro-batch)."""

COMPUTES = ("F", "B", "W")
"""Kinds of actions that are no messages."""

MAX_GREEDY = 256
"""Largest ranks x micro-batches for which a V schedule is placed action by action."""

MAX_ACTIONS = 150_000
"""Largest table that is simulated, about half a second; a larger one takes the closed form."""


@lru_cache(maxsize=4096)
def simulate(
    schedule: str,
    micro_batches: int,
    forward_seconds: tuple[float, ...],
    backward_seconds: tuple[float, ...],
    wires: tuple[Wire, ...],
    ranks: int,
    meeting: bool = False,
) -> Timeline:
    """Run the table: an action starts when its rank is free and what it needs has arrived.

    A message starts when it was made and its direction of the link between the two ranks is free; the sender goes on computing.

    Args:
        forward_seconds, backward_seconds: per stage, in model order; as many for every rank.
        wires: of the cuts between the stages, in the same order.
        meeting: the table is that of a training, with its places for weight gradients, and a message also waits until the other
            rank asks for it (gloo sends nothing before): when it takes the one before from the same rank, or where the table
            says so, if that is earlier.

    Long runs repeat themselves: beyond four groups of `ranks` micro-batches (three on more than 16 ranks) the rest is
    extended by the period of the last simulated group, which is at least the work of the busiest rank. One rank, and
    tables too long to place action by action, take the closed form.
    """
    actions = ranks * min(micro_batches, 4 * ranks)
    too_long = (
        actions > MAX_GREEDY if schedule in V_SHAPED else 2 * actions * len(forward_seconds) > MAX_ACTIONS * ranks
    )
    if ranks == 1 or too_long:
        return closed_form(schedule, micro_batches, forward_seconds, backward_seconds, wires, ranks)

    settle = (4 if ranks <= 16 else 3) * ranks
    groups, extra = divmod(micro_batches - settle, ranks) if micro_batches >= settle + ranks else (0, 0)
    counts = (settle + extra, settle + extra - ranks) if groups else (micro_batches,)
    found = _runs(schedule, counts, forward_seconds, backward_seconds, wires, ranks, meeting)
    if not groups:
        return found[0]
    short, shorter = found
    pace = short.busiest_seconds * ranks / counts[0]
    return Timeline(
        short.seconds + groups * max(pace, short.seconds - shorter.seconds),
        short.busiest_seconds * micro_batches / counts[0],
        short.in_flight if schedule != "gpipe" else tuple(micro_batches for _ in range(ranks)),
    )


def _runs(
    schedule: str,
    counts: tuple[int, ...],
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    wires: tuple[Wire, ...],
    ranks: int,
    meeting: bool,
) -> list[Timeline]:
    """The table run with each of these numbers of micro-batches."""
    if meeting:
        return [_meeting(schedule, count, forward, backward, wires, ranks) for count in counts]
    if schedule in V_SHAPED:
        return [_greedy(schedule, count, forward, backward, wires, ranks) for count in counts]
    owner = [rank_of(stage, ranks, schedule) for stage in range(len(forward))]
    return [
        Timeline(
            seconds,
            _busiest(count, forward, backward, owner),
            _in_flight(schedule, count, len(forward) // ranks, ranks),
        )
        for count, seconds in zip(counts, spans(schedule, counts, forward, backward, wires, ranks), strict=True)
    ]


def _in_flight(schedule: str, micro_batches: int, chunks: int, ranks: int) -> tuple[int, ...]:
    """Chunks in flight on every rank; where a last group has gaps that the first backward passes meet, counted by position.

    After its first `warm` positions a rank takes the backward pass at one position and the forward pass `warm` further in turn;
    what is at a gap is passed over, forward and backward at the same positions.
    """
    if schedule != "interleaved1f1b":
        return flight(schedule, micro_batches, chunks, ranks)
    warm = [warm_up(schedule, rank, ranks, chunks, micro_batches) for rank in range(ranks)]
    whole, rest = divmod(micro_batches, ranks)
    if not rest or whole > 1:
        return tuple(min(micro_batches * chunks, ahead) for ahead in warm)
    last = [*[1] * rest, *[0] * (ranks - rest)] * chunks
    taken = [0, *accumulate([*[1] * (whole * ranks * chunks), *last])]  # passes at the positions before each
    first = [min(ahead, len(taken) - 1) for ahead in warm]
    return tuple(max(taken[ahead], *map(sub, taken[ahead + 1 :], taken[1:]), 0) for ahead in first)


def _meeting(
    schedule: str,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    wires: Sequence[Wire],
    ranks: int,
) -> Timeline:
    """The table of a training, with messages that wait until they are asked for: when a rank asks depends on the order."""
    stages, chunks = len(forward), len(forward) // ranks
    rows = _rows(schedule, ranks, micro_batches, chunks)
    owner = [rank_of(stage, ranks, schedule) for stage in range(stages)]
    asked = _asked(schedule, ranks, micro_batches, chunks)
    later = [{(stage, index) for kind, stage, index in row if kind == "W"} for row in rows]
    # all of the first stage's passes: nobody waits for them (parallel/pipeline/runner.py)
    weights = [time * WEIGHT_SHARE if stage else time for stage, time in enumerate(backward)]
    done_f = [[-1.0] * micro_batches for _ in range(stages)]
    done_b = [[-1.0] * micro_batches for _ in range(stages)]
    clock, place = [0.0] * ranks, [0] * ranks
    ends: list[list[float]] = [[0.0] for _ in range(ranks)]
    free = [[0.0] * ranks for _ in range(ranks)]
    taken = [[0.0] * ranks for _ in range(ranks)]
    under_way: list[list[list[tuple[float, float]]]] = [[[] for _ in range(ranks)] for _ in range(ranks)]
    waiting = list(range(ranks))
    while waiting:
        rank = waiting.pop()
        row, now = rows[rank], clock[rank]
        while place[rank] < len(row):
            kind, stage, index = row[place[rank]]
            if kind == "W":
                now += weights[stage]
                place[rank] += 1
                ends[rank].append(now)
                continue
            if kind == "F":
                made = done_f[stage - 1][index] if stage else 0.0
                source = stage - 1
            else:
                made = done_b[stage + 1][index] if stage < stages - 1 else done_f[stage][index]
                source = stage + 1
            if made < 0.0:
                break
            ready = made
            if 0 <= source < stages and owner[source] != rank:
                wire, sender = wires[min(stage, source)], owner[source]
                wished = min(ends[rank][asked[rank][place[rank]]], taken[sender][rank])
                begin = max(made, free[sender][rank], _behind(wished, under_way[rank][sender]) + wire.latency)
                free[sender][rank] = begin + (wire.forward if kind == "F" else wire.backward)
                under_way[sender][rank].append((begin, free[sender][rank]))
                ready = free[sender][rank] + wire.latency
            start = ready if ready > now else now
            if 0 <= source < stages and owner[source] != rank:
                taken[owner[source]][rank] = start
            if kind == "F":
                now = start + forward[stage]
                done_f[stage][index] = now
                wakes = owner[stage + 1] if stage + 1 < stages else rank
            else:
                now = start + backward[stage] - (weights[stage] if (stage, index) in later[rank] else 0.0)
                done_b[stage][index] = now
                wakes = owner[stage - 1] if stage else rank
            place[rank] += 1
            ends[rank].append(now)
            if wakes != rank and wakes not in waiting:
                waiting += [rank, wakes]  # the other rank first: what it takes now is under way when this one asks
                break
        clock[rank] = now
    return Timeline(max(clock), _busiest(micro_batches, forward, backward, owner), tuple(_peak(row) for row in rows))


def _behind(wished: float, way: list[tuple[float, float]]) -> float:
    """When a wish sets out: it travels behind the message, of these, that is under way then."""
    last = bisect_right(way, (wished, inf)) - 1
    return way[last][1] if last >= 0 and way[last][1] > wished else wished


def _busiest(micro_batches: int, forward: Sequence[float], backward: Sequence[float], owner: Sequence[int]) -> float:
    """Work of the busiest rank."""
    found = [0.0] * (max(owner) + 1)
    for stage, rank in enumerate(owner):
        found[rank] += forward[stage] + backward[stage]
    return micro_batches * max(found)


@lru_cache(maxsize=256)
def _rows(schedule: str, ranks: int, micro_batches: int, chunks: int) -> tuple[tuple[Action, ...], ...]:
    """What the ranks of a training compute, in their order: passes, and weight gradients where they come later."""
    return tuple(map(tuple, computations(schedule, ranks, ranks * chunks, micro_batches)))


@lru_cache(maxsize=256)
def _asked(schedule: str, ranks: int, micro_batches: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """For every action of every rank how many actions of that rank end before its table asks for what this one needs."""
    found = []
    for row in schedule_table(schedule, ranks, ranks * chunks, micro_batches).rows:
        places: dict[tuple[str, int, int], int] = {}
        done, asked = 0, []
        for kind, stage, index in row:
            if kind in COMPUTES:
                asked.append(places.get((kind, stage, index), done))
                done += 1
            elif kind.startswith("RECV"):
                places[kind[-1], stage, index] = done
        found.append(tuple(asked))
    return tuple(found)


def _peak(row: Sequence[Action]) -> int:
    """Largest number of chunks whose forward pass ran and whose backward pass did not."""
    level = peak = 0
    for kind, _, _ in row:
        level += {"F": 1, "B": -1}.get(kind, 0)
        peak = max(peak, level)
    return peak


def _greedy(
    schedule: str,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    wires: Sequence[Wire],
    ranks: int,
) -> Timeline:
    """V-shaped stages without a fixed order: backward first, then forward within 2 x ranks chunks in flight, weights in gaps."""
    stages = len(forward)
    weights = [time * WEIGHT_SHARE for time in backward]
    clock, pending = [0.0] * ranks, [[0.0] * 0 for _ in range(ranks)]
    level, peak = [0] * ranks, [0] * ranks
    free = [[0.0] * ranks for _ in range(ranks)]
    # of the forward passes through the first stage, all of which could begin, the first is enough
    ready: list[list[tuple[float, str, int, int]]] = [[(0.0, "F", 0, 0)], *([] for _ in range(ranks - 1))]
    nothing: _Choice = (inf, 0, 0, 0, 0, "", 0)
    best, changed = [nothing] * ranks, {0}
    left = 2 * stages * micro_batches
    while left:
        for rank in changed:  # those of the other ranks are as they were
            best[rank] = nothing
            for time, kind, stage, index in ready[rank]:
                if kind == "F" and stage < ranks and level[rank] >= 2 * ranks - 1:
                    continue
                start = time if time > clock[rank] else clock[rank]
                key = (start, 0 if kind == "B" else 1, -stage if kind == "F" else stage, index, rank, kind, stage)
                best[rank] = min(best[rank], key)
        chosen = min(best)
        if chosen is nothing:
            raise AssertionError("the greedy schedule is stuck")
        start, _, _, index, rank, kind, stage = chosen
        ready[rank] = [item for item in ready[rank] if item[1:] != (kind, stage, index)]
        if kind == "F" and stage == 0 and index + 1 < micro_batches:
            ready[0].append((0.0, "F", 0, index + 1))
        while pending[rank] and clock[rank] + pending[rank][0] <= start:
            clock[rank] += pending[rank].pop(0)
        seconds = forward[stage] if kind == "F" else backward[stage] - weights[stage]
        clock[rank] = max(clock[rank], start) + seconds
        level[rank] += 1 if kind == "F" else -1
        peak[rank] = max(peak[rank], level[rank])
        if kind == "B":
            pending[rank].append(weights[stage])
        changed = {rank, _release(ready, free, (kind, stage, index), clock[rank], wires, ranks, schedule)}
        left -= 1
    ends = [clock[rank] + sum(pending[rank]) for rank in range(ranks)]
    owner = [rank_of(stage, ranks, schedule) for stage in range(stages)]
    return Timeline(max(ends), _busiest(micro_batches, forward, backward, owner), tuple(peak))


_Choice = tuple[float, int, int, int, int, str, int]
"""An action that could be next; the smallest one is."""


def _release(
    ready: list[list[tuple[float, str, int, int]]],
    free: list[list[float]],
    action: Action,
    end: float,
    wires: Sequence[Wire],
    ranks: int,
    schedule: str,
) -> int:
    """What an action that ended makes possible, when its message is there; the rank that can do it."""
    kind, stage, index = action
    here = rank_of(stage, ranks, schedule)
    if kind == "F" and stage == len(wires):
        ready[here].append((end, "B", stage, index))
        return here
    following = stage + 1 if kind == "F" else stage - 1
    if following < 0:
        return here
    there = rank_of(following, ranks, schedule)
    if there != here:
        wire = wires[min(stage, following)]
        free[here][there] = max(end, free[here][there]) + (wire.forward if kind == "F" else wire.backward)
        end = free[here][there] + wire.latency
    ready[there].append((end, kind, following, index))
    return there
