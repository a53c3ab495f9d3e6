"""Simulation of pipelines whose ranks run their actions in a fixed order: 1f1b, interleaved1f1b, zerobubble and gpipe.

Letters: p ranks, v chunks of each, m micro-batches. A rank takes its forward passes by position, 0, 1, ..., and so its backward
passes: p micro-batches through one chunk, the same p through the next chunk, and so on, then the next p (Narayanan et al. 2021,
section 2.2). So the position says which message an action waits for, and no table is made. Positions of micro-batches beyond
the last are passed over; with one chunk the position is the micro-batch.
"""

from collections import deque
from collections.abc import Sequence

from shardwise.planner.closedform import WEIGHT_SHARE, Wire
from shardwise.spec.plan import HALVED
from shardwise.spec.schedule import warm_up


def spans(
    schedule: str,
    counts: Sequence[int],
    forward: Sequence[float],
    backward: Sequence[float],
    wires: Sequence[Wire],
    ranks: int,
) -> list[float]:
    """Seconds until the last rank is done with so many micro-batches, for one count or two, the larger one first.

    Two runs are the same until the shorter one has no micro-batch left to begin: that part is simulated once.
    """
    run = _Run(schedule, counts[0], forward, backward, wires, ranks)
    if len(counts) == 1:
        return [run.finish(counts[0])]
    less = counts[1]
    shared = less // ranks * ranks * run.chunks + less % ranks
    run.go_on(counts[0], shared)
    return [run.copy().finish(counts[0]), run.finish(less)]


NEARLY = 0.1
"""Weight gradients fill a gap that is so much of them too short: the delay costs less than an idle gap."""

NO_WIRE = Wire(0.0, 0.0, 0.0)

Pass = tuple[float, int, float, float]
"""Of a rank's pass at a position: seconds; how many positions before its own the message has that it waits for, -1 for none; how
long that message fills the link, and its latency."""


class _Run:
    """How far every rank is, and when everything it did ended."""

    def __init__(
        self,
        schedule: str,
        micro_batches: int,
        forward: Sequence[float],
        backward: Sequence[float],
        wires: Sequence[Wire],
        ranks: int,
    ) -> None:
        self.ranks, self.chunks = ranks, len(forward) // ranks if schedule == "interleaved1f1b" else 1
        self.warm = [warm_up(schedule, rank, ranks, self.chunks, micro_batches) for rank in range(ranks)]
        self.clock = [0.0] * ranks
        # gradients of weights that wait for a gap
        self.pending = [0] * ranks
        # when each pass ended, by rank and position
        self.ahead: list[list[float]] = [[] for _ in range(ranks)]
        self.back: list[list[float]] = [[] for _ in range(ranks)]
        # when the link is free on which a rank gets activations, and behind these gradients; two ranks have one for both
        self.free = [0.0] * (2 * ranks)
        stages = ranks * self.chunks
        self.halved = schedule in HALVED
        self.weights = [WEIGHT_SHARE * time if self.halved else 0.0 for time in backward]
        # passes of every rank through its chunks, `ranks` micro-batches through each
        self.onward: list[list[Pass]] = []
        self.homeward: list[list[Pass]] = []
        for rank in range(ranks):
            onward: list[Pass] = []
            homeward: list[Pass] = []
            # a message comes from a neighbour; across the ends of the pipeline, from its pass through the chunk before
            before, behind = ranks if rank == 0 else 0, ranks if rank == ranks - 1 else 0
            for stage in range(rank, stages, ranks):
                entry, leave = wires[stage - 1] if stage else NO_WIRE, wires[stage] if stage < stages - 1 else NO_WIRE
                onward += [(forward[stage], before if stage else -1, entry.forward, entry.latency)] * ranks
                lag = behind if stage < stages - 1 else -1
                homeward = [(backward[stage], lag, leave.backward, leave.latency)] * ranks + homeward
            self.onward.append(onward)
            self.homeward.append(homeward)

    def copy(self) -> "_Run":
        """The same, to go on differently."""
        other: _Run = object.__new__(_Run)
        other.__dict__.update(self.__dict__)
        other.clock, other.pending, other.free = self.clock[:], self.pending[:], self.free[:]
        other.ahead, other.back = [row[:] for row in self.ahead], [row[:] for row in self.back]
        return other

    def finish(self, micro_batches: int) -> float:
        """Run all that is left with so many micro-batches; when the last rank is done."""
        self.go_on(micro_batches)
        ends = zip(self.clock, self.pending, self.weights, strict=False)
        return max(now + left * weight for now, left, weight in ends)

    def go_on(self, micro_batches: int, limit: int | None = None) -> None:
        """Run every rank until it is done, or would begin the forward pass at position `limit`."""
        ranks = self.ranks
        whole, rest = divmod(micro_batches, ranks)
        period = ranks * self.chunks
        full = whole * period  # positions of whole groups; of the last, smaller one every chunk has gaps
        total = micro_batches if self.chunks == 1 else full + (period if rest else 0)
        stop = total if limit is None else min(limit, total)
        queue, queued = deque(range(ranks)), [True] * ranks
        while queue:
            rank = queue.popleft()
            queued[rank] = False
            if self._advance(rank, total, stop, full, rest):
                other = rank + 1 if rank < ranks - 1 else 0
                if not queued[other]:
                    queued[other] = True
                    queue.append(other)
                other = rank - 1 if rank else ranks - 1
                if not queued[other]:
                    queued[other] = True
                    queue.append(other)

    def _advance(self, rank: int, total: int, stop: int, full: int, rest: int) -> bool:
        """Run what `rank` can before it has to wait for another one; whether there was anything.

        Args:
            total: positions in all; the forward pass at `stop` is not begun.
            full: positions of whole groups; of each `ranks` positions after them the first `rest` have a micro-batch.
        """
        ranks, free, warm, weight = self.ranks, self.free, self.warm[rank], self.weights[rank]
        ahead, back, onward, homeward = self.ahead[rank], self.back[rank], self.onward[rank], self.homeward[rank]
        before, behind = self.ahead[rank - 1], self.back[rank + 1 if rank < ranks - 1 else 0]
        came, returned, period = len(before), len(behind), len(onward)
        link_behind = rank + ranks if ranks > 2 else rank
        now, pending, ran, undone = self.clock[rank], self.pending[rank], len(ahead), len(back)
        began = ran + undone
        while True:
            if ran < total and ran - undone < warm:
                if ran == stop:
                    break
                if ran >= full and ran % ranks >= rest:
                    ahead.append(now)
                    ran += 1
                    continue
                seconds, lag, filled, latency = onward[ran % period]
                if lag >= 0:
                    if ran - lag >= came:
                        break
                    made, idle = before[ran - lag], free[rank]
                    ready = (made if made > idle else idle) + filled
                    free[rank] = ready
                    ready += latency
                    if ready > now:
                        if pending:
                            now, pending = _fill(now, ready, pending, weight)
                        now = ready if ready > now else now
                now += seconds
                ahead.append(now)
                ran += 1
            else:
                if undone == total:
                    break
                if undone >= full and undone % ranks >= rest:
                    back.append(now)
                    undone += 1
                    continue
                seconds, lag, filled, latency = homeward[undone % period]
                if lag >= 0:
                    if undone - lag >= returned:
                        break
                    made, idle = behind[undone - lag], free[link_behind]
                    ready = (made if made > idle else idle) + filled
                    free[link_behind] = ready
                    ready += latency
                    if ready > now:
                        if pending:
                            now, pending = _fill(now, ready, pending, weight)
                        now = ready if ready > now else now
                now = now + seconds - weight
                back.append(now)
                undone += 1
                pending += self.halved
        self.clock[rank], self.pending[rank] = now, pending
        return ran + undone > began


def _fill(now: float, until: float, pending: int, weight: float) -> tuple[float, int]:
    """The gap before a message filled with gradients of weights: when the last one ends, and how many are left."""
    fitting = min(pending, int((until - now) / weight + NEARLY)) if weight else 0
    return now + fitting * weight, pending - fitting
