"""Who holds the others up, and why: from what each rank did, settlement by settlement.

In a synchronous step all ranks end together, so the durations of phases that hold a collective are equal on all ranks and
tell nothing. What tells is how much *work* a rank does before it is ready (its phases without what it was blocked in
collectives), and when it *arrives* at the first collective of the step. The slow rank works longest, arrives last and is
blocked least.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import final

from shardwise.spec.event import Event
from shardwise.spec.observations import BottleneckEvent, RanksEvent, StragglerEvent
from shardwise.units import format_seconds

WINDOW = 4
"""Settlements looked at together, at least: what holds in each of them is no hiccup."""

WINDOW_SECONDS = 1.5
"""And the time they cover, at least: settlements are closer together where epochs are short."""

LEAST_SHARE = 0.15
"""A rank is slow, or a loss is worth a word, from this part of the step on: below it, differences come and go by
themselves on shared machines (measured on two shared cores, 2026-11-26)."""

LEAST_SECONDS = 1e-3
"""And from this many seconds a step on."""

SCARCE_SHARE = 0.2
"""Cores are scarce when the ranks together wait this part of the time for one."""

WORK = ("data", "forward", "backward", "optimizer", "other")
"""Phases that are work and no waiting."""

PER_SAMPLE = ("data", "forward", "backward")
"""Phases that take as much longer as there are more samples."""

_CAUSES = {
    "core": "it waits for a core that other processes have",
    "waiting": "it sleeps, or waits for input and output",
    "computing": "its processor computes longer",
    "unknown": "",
}


@final
class Detector:
    """Finds stragglers and bottlenecks. Give it every `RanksEvent` of a run in order; it says each thing once.

    Args:
        threads: compute threads of each rank, for advice.
        cores: of the machine, for advice.
        device: kind of device; processor times say nothing about what an accelerator does.
        balances: the run sets shares itself, so that it need not be advised to.
    """

    def __init__(
        self, *, threads: int | None = None, cores: int | None = None, device: str = "cpu", balances: bool = False
    ) -> None:
        self._threads, self._cores, self._device, self._balances = threads, cores, device, balances
        self._recent: deque[RanksEvent] = deque()
        self._seen = 0
        self._said: set[tuple[str, ...]] = set()

    def update(self, event: RanksEvent) -> list[Event]:
        """What is new with this event."""
        self._seen += 1
        if self._seen == 1:  # the first steps of a run load and compile things
            return []
        self._recent.append(event)
        while _enough(list(self._recent)[1:]):
            self._recent.popleft()
        if not _enough(self._recent):
            return []
        found = [*self._bottlenecks(), *self._stragglers()]
        now = {_key(item) for item in found}
        new = [item for item in found if _key(item) not in self._said]
        self._said = now
        return new

    def _stragglers(self) -> list[Event]:
        window = list(self._recent)
        slow = slowest(window)
        if slow is None or any(_slowest_of(each) != slow[0] for each in window):
            return []
        rank, phase, lost, step_seconds = slow
        if lost < LEAST_SECONDS or lost < LEAST_SHARE * step_seconds:
            return []
        cause = self._cause(window, rank, lost)
        shares = balanced_shares(window) if phase in PER_SAMPLE and cause != "waiting" else []
        steps = sum(each.steps for each in window)
        late = sum(each.late_seconds[rank] * each.steps for each in window) / steps
        why = f"; {_CAUSES[cause]}" if _CAUSES[cause] else ""
        arrival = (
            f", it comes {format_seconds(late)} after the first to the first collective" if late > lost / 2 else ""
        )
        advice = ""
        if shares:
            advice = (
                ". With shares of " + ", ".join(f"{share:.2f}" for share in shares) + " of the global batch all ranks "
            )
            advice += "would take equally long" + ("" if self._balances else "; --balance divides it so")
        message = (
            f"rank {rank} is slow in {phase}: {format_seconds(lost)} more a step than the other ranks, of "
            f"{format_seconds(step_seconds)}{arrival}{why}{advice}"
        )
        return [
            StragglerEvent(
                step=window[-1].first_step + window[-1].steps,
                rank=rank,
                phase=phase,
                cause=cause,
                lost_seconds=lost,
                step_seconds=step_seconds,
                shares=shares,
                message=message,
            )
        ]

    def _cause(self, window: Sequence[RanksEvent], rank: int, lost: float) -> str:
        """What the excess consists of: neither on a core nor waiting for one is asleep.

        Ranks that are blocked poll for a while, so processor time is compared with the rank's own work, not with others'.
        """
        if self._device != "cpu":
            return "unknown"
        steps = sum(each.steps for each in window)
        work = sum(each.phase_seconds.get(phase, [0.0] * (rank + 1))[rank] for each in window for phase in WORK) / steps
        cpu = sum(each.cpu_seconds[rank] for each in window) / steps
        core = sum(each.core_wait_seconds[rank] for each in window) / steps
        if work - cpu - core > lost / 2:
            return "waiting"
        return (
            "core" if _excess([[each.core_wait_seconds for each in window]], rank) / steps > lost / 2 else "computing"
        )

    def _bottlenecks(self) -> list[Event]:
        window = list(self._recent)
        step = window[-1].first_step + window[-1].steps
        found: list[Event] = []
        parts = [_part(each.phase_seconds["data"], each) for each in window]
        # Each settlement and each rank by itself: one slow rank, or one hiccup, is not everybody's bottleneck.
        if min(parts) >= LEAST_SHARE and _data_seconds(window) >= LEAST_SECONDS:
            share = median(parts)
            found.append(
                BottleneckEvent(
                    step=step,
                    what="data",
                    share=share,
                    message=f"{share:.0%} of every rank's step is spent waiting for data: raise loader_workers, make the "
                    "transforms cheaper, or pack the data set",
                )
            )
        waits = [_core_part(each) for each in window]
        if self._device == "cpu" and min(waits) >= SCARCE_SHARE:
            share = median(waits)
            found.append(BottleneckEvent(step=step, what="cores", share=share, message=self._scarce(window[-1], share)))
        return found

    def _scarce(self, event: RanksEvent, share: float) -> str:
        ranks = len(event.samples)
        text = f"{share:.0%} of the time the ranks wait for a core: this machine is oversubscribed"
        if self._threads and self._cores and ranks * self._threads > self._cores:
            return (
                f"{text} ({ranks} ranks of {self._threads} threads on {self._cores} cores): use fewer workers or "
                "--threads"
            )
        return f"{text}; other processes use its cores: stop them, or use fewer workers"


def slowest(window: Sequence[RanksEvent]) -> tuple[int, str, float, float] | None:
    """The rank that works longest, over some settlements.

    Returns:
        Rank, the phase in which it loses most, seconds a step that it works longer than the median of the other ranks, and
        mean seconds of a step; None where there is a single rank or nothing was timed.
    """
    ranks = len(window[0].samples)
    timed = sum(each.timed_steps for each in window)
    if ranks == 1 or not timed:
        return None
    over = {phase: [each.phase_seconds.get(phase, [0.0] * ranks) for each in window] for phase in WORK}
    totals = [_excess(list(over.values()), rank) for rank in range(ranks)]
    rank = max(range(ranks), key=totals.__getitem__)
    phase = max(WORK, key=lambda name: _excess([over[name]], rank))
    steps = sum(each.steps for each in window)
    return rank, phase, totals[rank] / timed, sum(each.seconds for each in window) / steps


def balanced_shares(window: Sequence[RanksEvent]) -> list[float]:
    """Parts of the global batch with which all ranks would take equally long, at their measured seconds a sample.

    A rank without samples, or without a measurement, keeps the mean speed of the others. The parts add up to 1.
    """
    ranks = len(window[0].samples)
    speeds: list[float] = []
    for rank in range(ranks):
        samples = sum(each.samples[rank] * each.timed_steps / each.steps for each in window)
        seconds = sum(each.phase_seconds.get(phase, [0.0] * ranks)[rank] for each in window for phase in PER_SAMPLE)
        speeds.append(samples / seconds if samples and seconds > 0 else 0.0)
    known = [speed for speed in speeds if speed]
    if not known:
        return [1 / ranks] * ranks
    filled = [speed or sum(known) / len(known) for speed in speeds]
    return [speed / sum(filled) for speed in filled]


def _enough(window: Sequence[RanksEvent]) -> bool:
    return len(window) >= WINDOW and sum(event.seconds for event in window) >= WINDOW_SECONDS


def _slowest_of(event: RanksEvent) -> int:
    found = slowest([event])
    return -1 if found is None else found[0]


def _excess(tables: Sequence[Sequence[Sequence[float]]], rank: int) -> float:
    """How much larger the rank's sum over all tables and settlements is than the median of the other ranks' sums."""
    ranks = len(tables[0][0])
    sums = [sum(row[each] for table in tables for row in table) for each in range(ranks)]
    return sums[rank] - median(sums[:rank] + sums[rank + 1 :])


def _part(seconds: Sequence[float], event: RanksEvent) -> float:
    """The smallest rank's part of the step that these seconds are."""
    total = [sum(column) for column in zip(*event.phase_seconds.values(), strict=True)]
    return min((own / of if of else 0.0) for own, of in zip(seconds, total, strict=True))


def _data_seconds(window: Sequence[RanksEvent]) -> float:
    timed = sum(each.timed_steps for each in window)
    smallest: float = min(
        sum(column) for column in zip(*(each.phase_seconds["data"] for each in window), strict=True)
    ) / max(timed, 1)
    return smallest


def _core_part(event: RanksEvent) -> float:
    """Part of the ranks' time in which they were ready and had no core."""
    return sum(event.core_wait_seconds) / (len(event.samples) * event.seconds) if event.seconds else 0.0


def _key(event: Event) -> tuple[str, ...]:
    if isinstance(event, StragglerEvent):
        return event.kind, str(event.rank), event.phase
    assert isinstance(event, BottleneckEvent)
    return event.kind, event.what
