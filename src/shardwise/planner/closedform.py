"""How long a pipeline takes by formula, and the words for it: wires between stages, and the timeline of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardwise.spec.plan import V_SHAPED
from shardwise.spec.schedule import rank_of, warm_up

WEIGHT_SHARE = 0.5
"""Share of the backward pass that computes weight gradients; a linear layer has one product for each."""


class Wire(NamedTuple):
    """What messages over one cut take, in seconds: from when a message starts until it is there, latency and the time for
    which it fills its direction of the link, so that the next one waits. Activations go forward, gradients back."""

    latency: float
    forward: float
    backward: float


def even(stages: int, latency: float, filled: float = 0.0) -> tuple[Wire, ...]:
    """The same wire between all of `stages` stages."""
    return (Wire(latency, filled, filled),) * (stages - 1)


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


def closed_form(
    schedule: str,
    micro_batches: int,
    forward_seconds: tuple[float, ...],
    backward_seconds: tuple[float, ...],
    wires: tuple[Wire, ...],
    ranks: int,
) -> Timeline:
    """What `simulate` finds, by the formula for stages of equal time: exact for those, close for others, and fast.

    Without messages: 1f1b and gpipe take every stage once and the slowest stage for the other micro-batches. Interleaved with
    v chunks: the ramp is v times shorter (Narayanan et al. 2021, section 2.2). zerobubble: the ramp holds forward + backward -
    2 x weight gradient (Qi et al. 2023, table 2); V schedules: for equal times only the last rank's later start. What messages
    add is in `_one_by_one`, `_back_and_forth` and `_in_groups`; exact for gpipe, 1f1b and zerobubble, near for the others.
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
    seconds = micro_batches * busiest + ramp
    if ranks > 1:
        ways = [wire for stage, wire in enumerate(wires) if schedule not in V_SHAPED or stage != ranks - 1]
        there_and_back = sum(2.0 * wire.latency + wire.forward + wire.backward for wire in ways)
        if schedule == "gpipe":
            seconds = _one_by_one(micro_batches, forward_seconds, backward_seconds, ways) + there_and_back
        elif chunks == 1:
            halves = WEIGHT_SHARE if schedule == "zerobubble" else 0.0
            parts = [pair - halves * back for pair, back in zip(pairs, backward_seconds, strict=True)]
            bound = _back_and_forth(micro_batches, parts, ways) + halves * backward_seconds[0]
            seconds = max(seconds + there_and_back, bound)
        else:
            halves = WEIGHT_SHARE if schedule in V_SHAPED else 0.0
            once = sum(pairs) - halves * sum(backward_seconds[1:]) + there_and_back
            # down and up, a V's link has one message of each kind in each direction; two ranks share one link also for the way
            # from the last rank to the first
            loads = 2 if schedule in V_SHAPED else 2 * chunks - 1 if ranks == 2 else chunks
            bound = _in_groups(micro_batches, once, busiest, chunks, ways, loads, ranks)
            seconds = max(seconds + there_and_back / chunks, bound)
    busy = micro_batches * busiest
    return Timeline(seconds, busy, flight(schedule, micro_batches, chunks, ranks))


def _one_by_one(
    micro_batches: int, forward: Sequence[float], backward: Sequence[float], wires: Sequence[Wire]
) -> float:
    """gpipe without what one micro-batch spends on the way: stages and links in a row, the slowest of which sets the pace."""
    ahead = max(*forward, *(wire.forward for wire in wires))
    back = max(*backward, *(wire.backward for wire in wires))
    return sum(forward) + sum(backward) + (micro_batches - 1) * (ahead + back)


def _back_and_forth(micro_batches: int, pairs: Sequence[float], wires: Sequence[Wire]) -> float:
    """1f1b: of the last k ranks the first has k micro-batches in flight, so one trip through these ranks and back takes at
    least as long as k micro-batches; messages that the slowest stage does not hide come on top."""
    ranks, slowest = len(pairs), max(pairs)
    hops = [2.0 * wire.latency + wire.forward + wire.backward for wire in wires]

    def extra(count: int) -> float:
        """What a trip through the last `count` ranks takes longer than so many micro-batches on the slowest."""
        if count == 1:
            return max(0.0, *(max(wire.forward, wire.backward) - slowest for wire in wires))
        return max(0.0, sum(pairs[-count:]) + sum(hops[1 - count :]) - count * slowest)

    trips, rest = divmod(micro_batches - 1, ranks)
    more = trips * extra(ranks) + (extra(rest) if rest else 0.0)
    return sum(pairs) + sum(hops) + (micro_batches - 1) * slowest + more


def _in_groups(
    micro_batches: int, once: float, busiest: float, chunks: int, wires: Sequence[Wire], loads: int, ranks: int
) -> float:
    """Several chunks a rank: a first group of `ranks` micro-batches, one chunk behind the other; then the slowest of the busiest
    rank, the link with `loads` messages a micro-batch, and a whole trip with the 2 ranks - 1 micro-batches in flight."""
    filled = max(max(wire.forward, wire.backward) for wire in wires)
    first = min(micro_batches, ranks)
    pace = max(busiest, loads * filled, once / (2 * ranks - 1))
    return once + (first - 1) * max(busiest / chunks, filled) + (micro_batches - first) * pace


def flight(schedule: str, micro_batches: int, chunks: int, ranks: int) -> tuple[int, ...]:
    """Chunks in flight on every rank."""
    if schedule in V_SHAPED:
        return (min(2 * micro_batches, 2 * ranks),) * ranks
    most = micro_batches * chunks
    ordered = schedule if chunks == 1 else "interleaved1f1b"
    return tuple(min(most, warm_up(ordered, rank, ranks, chunks, micro_batches)) for rank in range(ranks))
