"""Balancer: divides the global batch in proportion to the measured speed of the ranks, so that they end a step together.

Every rank decides for itself, without a message: the numbers of a `RanksEvent` that are looked at here were exchanged, so
that they are the same bits on every rank, and so is what follows from them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import final

from shardwise.data.source import Splits
from shardwise.errors import PlanError
from shardwise.monitor.straggler import PER_SAMPLE, WINDOW, WINDOW_SECONDS
from shardwise.spec.observations import RanksEvent
from shardwise.spec.plan import Plan
from shardwise.spec.shares import share_bounds

LEAST_GAIN = 0.1
"""The batch is divided anew where the slowest rank's work is expected to become shorter by this part. Chosen, not measured:
below `LEAST_SHARE` of monitor/straggler.py, because medians are compared here, and a division that is not needed does no harm."""

LEAST_PART = 0.1
"""No rank gets less than this part of an even share, nor less than one sample: a rank whose time does not depend on its
samples would end up with none, and its speed could not be measured any more."""


@final
class Balancer:
    """Give it every `RanksEvent` of a run in order.

    Args:
        batch_size: samples of a full global batch.
        sizes: how many of them each rank has now, in rank order.
    """

    def __init__(self, batch_size: int, sizes: Sequence[int]) -> None:
        self._batch_size = batch_size
        self.sizes = list(sizes)
        self._recent: deque[list[float]] = deque()
        self._seconds = 0.0
        self._skip = True

    def update(self, event: RanksEvent) -> list[int] | None:
        """How many samples of a full global batch each rank gets from the next step on, where that is to change."""
        if self._skip:  # the first steps load and compile things, and the first after a change open the data again
            self._skip = False
            return None
        table = [event.phase_seconds[phase] for phase in PER_SAMPLE]
        work = [sum(column) for column in zip(*table, strict=True)]
        computed = [samples * event.timed_steps / event.steps for samples in event.samples]
        if not all(computed) or not all(seconds > 0 for seconds in work):
            return None  # an accelerator whose steps were not timed, or a short batch alone
        self._recent.append([seconds / samples for seconds, samples in zip(work, computed, strict=True)])
        # `event.seconds` is rank 0's own clock. The phases were exchanged, and cover the timed steps.
        columns = zip(*event.phase_seconds.values(), strict=True)
        self._seconds += max(sum(column) for column in columns) * event.steps / event.timed_steps
        if len(self._recent) < WINDOW or self._seconds < WINDOW_SECONDS:
            return None
        costs = [median(rank) for rank in zip(*self._recent, strict=True)]  # seconds a sample; a hiccup does not count
        sizes = proportional_sizes(self._batch_size, [1 / cost for cost in costs])
        now, then = (max(size * cost for size, cost in zip(of, costs, strict=True)) for of in (self.sizes, sizes))
        self._recent.clear()
        self._seconds = 0.0
        if now - then < LEAST_GAIN * now:
            return None
        self.sizes, self._skip = sizes, True
        return sizes


def proportional_sizes(batch_size: int, speeds: Sequence[float]) -> list[int]:
    """Samples of a full global batch for each rank, in proportion to `speeds` (any unit), but some for every rank."""
    ranks = len(speeds)
    least = max(1, int(LEAST_PART * batch_size / ranks))
    sizes = [max(least, stop - start) for start, stop in share_bounds(batch_size, ranks, speeds)]
    while sum(sizes) > batch_size:
        sizes[sizes.index(max(sizes))] -= 1
    return sizes


def check_division(splits: Splits, plan: Plan, *, balance: bool = False) -> None:
    """Refuse shares where the data does not let the ranks divide a global batch by them.

    Args:
        splits: the data.
        plan: with or without shares.
        balance: the shares are to follow the measured speed.

    Raises:
        PlanError: says what the data or the plan is, and what to do.
    """
    if not (plan.shares or balance):
        return  # without a look at the data, which may not have been read yet
    train, layout = splits.train, plan.layout
    if plan.shares and train.sharded and layout.replicas > 1:
        raise PlanError(
            "plan shares with a sharded stream: each rank reads its own part of it, so that shares would decide which samples "
            "make a global batch; leave shares out, or build the stream with sharded=False"
        )
    if plan.local_steps > 1:
        raise PlanError(
            f"plan local_steps={plan.local_steps} with {'--balance' if balance else 'shares'}: the average of the weights counts "
            "each worker the same, whatever its share of the samples; leave one of the two out"
        )
    if not balance:
        return
    if layout.workers == 1 or layout.workers != layout.data * layout.shard:
        raise PlanError(
            f"--balance with plan {layout}: it divides the global batch over the workers of data and shard, where a worker's "
            "time is that of its own samples; use a plan of these axes with at least 2 workers, or leave --balance out"
        )
    if train.length is None or train.sharded:
        raise PlanError(
            "--balance with a stream: dividing anew goes on in the middle of an epoch, which a stream can only read from its "
            "start; give data that can be indexed, or the shares in a plan file"
        )
