"""Why a plan is not faster: its losses as sentences with numbers, the largest first, and what would reduce each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from shardwise.bench.result import PART_NAMES, Case, Finding, RankSplit
from shardwise.units import format_bytes, format_seconds

WORTH_TELLING = 0.03
"""Losses below this part of the step are left out: they are within the spread of a quiet machine."""

QUEUE_SHARE = 0.10
"""Waiting for a core is told from this part of the step on; the scheduler's own turns stay below 2 % on a quiet machine
(measured on two cores, 2026-11)."""

SLOW_EXCESS = 0.10
"""A rank is called slow when it works longer than the others by this part of the step ..."""

SLOW_STEADY = 0.7
"""... and is the one with the most work in this part of the steps; chance alone gives one in the number of ranks."""


def find_losses(case: Case, one_unit: Case, *, cores: int, device: str) -> list[Finding]:
    """The losses of a measured case, the one to act on first at the top.

    Args:
        case: with its split over the ranks.
        one_unit: the case on one core or accelerator.
        cores: of the machine.
        device: where it ran.
    """
    if case.step_seconds is None or not case.ranks:
        return []
    step = statistics.fmean(sum(rank.seconds.values()) for rank in case.ranks)
    found = [
        *_queue(case, cores, device),
        *_data(case, step),
        *_slow_rank(case, step),
        *_communication(case, step),
        *_bubble(case, step),
        *_compute(case, one_unit, step),
        *_repeated(case, step),
    ]
    told = [finding for finding in found if finding.share >= WORTH_TELLING]
    # Waiting for a core makes every other part longer: it comes first whatever its size.
    return sorted(told, key=lambda finding: (finding.kind != "cores", -finding.share))


def queue_share(case: Case) -> float:
    """The part of its step in which the rank that waits most is ready and has no core; 0 where nobody counts it."""
    shares = [rank.queue_seconds / sum(rank.seconds.values()) for rank in case.ranks if rank.queue_seconds is not None]
    return max(shares, default=0.0)


def _queue(case: Case, cores: int, device: str) -> list[Finding]:
    """More threads than cores. What other programs take is no loss of the plan: see `crowd_remark`."""
    share = queue_share(case)
    if device != "cpu" or case.units <= cores or share < QUEUE_SHARE:
        return []
    wants = f"{case.workers} x {_count(case.threads, 'thread')} on {_count(cores, 'core')}"
    message = f"a rank stands in line for a core for {share:.0%} of its step: {wants}, the machine is oversubscribed"
    advice = f"use at most {_count(cores, 'worker')} (or fewer threads each), or a machine with {case.units} cores"
    return [Finding(kind="cores", share=share, message=message, advice=advice)]


def crowd_remark(cases: Sequence[Case], cores: int) -> str:
    """What other programs on the machine did to the numbers; empty where they did nothing to speak of."""
    shares = {case.name: queue_share(case) for case in cases if case.ranks and case.units <= cores}
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is None or shares[worst] < QUEUE_SHARE:
        return ""
    return (
        f"other programs used this machine: ranks stood in line for a core for up to {shares[worst]:.0%} of their step "
        f"({worst}), although all their threads would fit on {_count(cores, 'core')}; end them and measure again before you "
        "believe any of these times"
    )


def _data(case: Case, step: float) -> list[Finding]:
    worst = max(case.ranks, key=lambda rank: rank.seconds["data"])
    share = worst.seconds["data"] / step
    who = "every rank's" if _alike(case.ranks, "data") else f"rank {worst.rank}'s"
    return [
        Finding(
            kind="data",
            share=share,
            message=f"{share:.0%} of {who} step waits for data ({format_seconds(worst.seconds['data'])})",
            advice="read ahead in more processes (loader_workers of the data source), convert the data once and not in "
            "every epoch, or keep it in memory",
        )
    ]


def _slow_rank(case: Case, step: float) -> list[Finding]:
    """A rank that has steadily more work of its own than the others, which wait for it."""
    if case.workers == 1:
        return []
    slow = _slowest(case, step)
    if slow is None:
        # Nobody in particular is slow: ranks wait for whoever happens to be last.
        share = statistics.fmean(rank.seconds["waiting"] for rank in case.ranks) / step
        message = f"ranks wait for one another {share:.0%} of the step, each time for another one"
        return [
            Finding(
                kind="jitter",
                share=share,
                message=message,
                advice="uneven samples or a busy machine: a larger batch evens them out; nothing else should run beside",
            )
        ]
    others = [rank for rank in case.ranks if rank is not slow]
    excess = _excess(slow, others)
    waiting = max(rank.seconds["waiting"] for rank in others)
    part = max(
        ("forward", "backward", "data", "optimizer", "other"),
        key=lambda name: slow.seconds[name] - statistics.median(rank.seconds[name] for rank in others),
    )
    more = slow.seconds[part] - statistics.median(rank.seconds[part] for rank in others)
    if any(rank.seconds["bubble"] > 0 for rank in case.ranks):
        message = (
            f"the pipeline stage of rank {slow.rank} has {format_seconds(excess)} more work a step than the others, which wait "
            "for it"
        )
        advice = "move cut points (cuts of the plan) so that its stage gets less of the model"
        return [Finding(kind="slow rank", share=excess / step, message=message, advice=advice)]
    message = (
        f"rank {slow.rank} is slower than the others in {slow.slowest:.0%} of the steps, by {format_seconds(excess)}, most of "
        f"it in its {PART_NAMES[part]} (+{format_seconds(more)}); it comes to its first collective "
        f"{format_seconds(slow.late_seconds)} late, and the others wait {waiting / step:.0%} of their step for it"
    )
    advice = "look at what is different there: its core, its data, other programs beside it; or give it a smaller share"
    return [Finding(kind="slow rank", share=excess / step, message=message, advice=advice)]


def _slowest(case: Case, step: float) -> RankSplit | None:
    """The rank that is steadily slower than the others; None where there is none."""
    if case.workers == 1:
        return None
    slow = max(case.ranks, key=_own)
    late = _excess(slow, [rank for rank in case.ranks if rank is not slow])
    return None if late < SLOW_EXCESS * step or slow.slowest < SLOW_STEADY else slow


def _excess(slow: RankSplit, others: Sequence[RankSplit]) -> float:
    return _own(slow) - statistics.median(map(_own, others))


def _passes(case: Case, step: float) -> float:
    """Forward and backward pass, as the mean over the ranks; of replicas without a slow one, whose excess is told apart."""
    slow = None if any(rank.seconds["bubble"] > 0 for rank in case.ranks) else _slowest(case, step)
    return statistics.fmean(
        rank.seconds["forward"] + rank.seconds["backward"] for rank in case.ranks if rank is not slow
    )


def _communication(case: Case, step: float) -> list[Finding]:
    seconds = statistics.fmean(rank.seconds["communication"] for rank in case.ranks)
    compute = _passes(case, step)
    sent = f", {format_bytes(case.traffic_bytes)} sent by a rank" if case.traffic_bytes else ""
    message = (
        f"batch {case.batch_size} gives each worker {format_seconds(compute)} of compute for {format_seconds(seconds)} of "
        f"communication a step{sent}"
    )
    advice = "larger batch or fewer workers, so that there is more compute for every message; or faster links"
    return [Finding(kind="communication", share=seconds / step, message=message, advice=advice)]


def _bubble(case: Case, step: float) -> list[Finding]:
    worst = max(case.ranks, key=lambda rank: rank.seconds["bubble"])
    share = worst.seconds["bubble"] / step
    micro = case.plan.get("micro_batch")
    pieces = f"micro-batches of {micro}" if micro else "the number of micro-batches that shardwise took"
    message = (
        f"the pipeline stage of rank {worst.rank} waits for its neighbours for {share:.0%} of the step, with {pieces}"
    )
    advice = "more and smaller micro-batches (--micro-batch) fill the pipeline; cut points that balance the stages; fewer stages"
    return [Finding(kind="bubble", share=share, message=message, advice=advice)]


def _compute(case: Case, one_unit: Case, step: float) -> list[Finding]:
    """Forward and backward passes that did not shrink with the number of workers."""
    if case.units == 1 or not case.lost_seconds or case.name == one_unit.name:
        return []
    mean, now = case.mean_seconds, _passes(case, step)
    ideal = sum(mean[part] - case.lost_seconds[part] for part in ("forward", "backward"))
    lost = now - ideal
    what = f"{_count(case.workers, 'worker')} with {_count(case.threads, 'thread')} each"
    message = (
        f"forward and backward pass take {format_seconds(now)} on {what}; a perfect division of the run on one would take "
        f"{format_seconds(ideal)}"
    )
    if case.workers == 1:
        advice = "threads share every single operation, and small operations gain nothing: workers with a part of the batch each"
    elif any(axis in str(case.plan.get("layout")) for axis in ("tensor", "context", "pipeline", "expert")):
        advice = "pieces of the model are small here: a larger model or batch, or split over the data axis instead"
    else:
        advice = (
            f"{case.batch_size // case.workers} samples a worker keep it busy with fixed costs of each operation, or the cores "
            "share memory bandwidth and clock: a larger batch, or fewer workers"
        )
    return [Finding(kind="compute", share=lost / step, message=message, advice=advice)]


def _repeated(case: Case, step: float) -> list[Finding]:
    """What every worker does in full."""
    if case.workers == 1 or not case.lost_seconds:
        return []
    if any(axis in str(case.plan.get("layout")) for axis in ("shard", "tensor", "pipeline")):
        update = "its calls cost the same on smaller pieces: a fused optimizer, or a larger model"
    else:
        update = "every replica updates all parameters: the shard axis divides that; a fused optimizer is faster"
    found = []
    for part, advice in (
        ("optimizer", update),
        (
            "other",
            "fixed costs of a step (gradients copied for sending, bookkeeping): a larger batch makes them count less",
        ),
    ):
        seconds = case.mean_seconds[part]
        message = f"{PART_NAMES[part]} takes {format_seconds(seconds)} on every worker, however many there are"
        found.append(Finding(kind=part, share=case.lost_seconds[part] / step, message=message, advice=advice))
    return found


def start_up_note(case: Case, baseline: Case) -> str:
    """What the longer start means for short trainings; empty where it means nothing."""
    if case.break_even_steps is None or case.start_seconds is None or baseline.start_seconds is None:
        return ""
    more = case.start_seconds.median - baseline.start_seconds.median
    return f"starts {format_seconds(more)} later than one worker; ahead from step {case.break_even_steps:,} on"


def _own(rank: RankSplit) -> float:
    return sum(rank.seconds[part] for part in ("forward", "backward", "data", "optimizer", "other"))


def _alike(ranks: Sequence[RankSplit], part: str) -> bool:
    values = [rank.seconds[part] for rank in ranks]
    return min(values) > 0.5 * max(values)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
