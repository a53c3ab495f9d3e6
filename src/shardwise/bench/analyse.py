"""From runs to cases: medians and spreads, speed-ups round by round, where the time goes, and what differs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

from shardwise.bench.cases import Wanted
from shardwise.bench.execute import Attempt
from shardwise.bench.known import Known
from shardwise.bench.reading import Reading
from shardwise.bench.result import PARTS, Case, Metric, Outcome, RankSplit, Spread


@final
@dataclass(kw_only=True)
class Measurement:
    """The runs of one case, by round.

    Attributes:
        failed: outcome, reason and details of the run that ended the case; None while all went well.
    """

    wanted: Wanted
    rounds: dict[int, tuple[Attempt, Reading]] = field(default_factory=dict)
    failed: tuple[Outcome, str, str] | None = None

    def by_round(self, value: Callable[[Attempt, Reading], float | None]) -> dict[int, float]:
        """Round -> number, where there is one."""
        found = {number: value(*run) for number, run in self.rounds.items()}
        return {number: one for number, one in found.items() if one is not None and math.isfinite(one)}


@final
@dataclass(frozen=True, kw_only=True)
class Context:
    """What cases are held against.

    Attributes:
        cores: of the machine, that this process may use.
        steps_per_epoch: of the job's own batch size; None where unknown.
        known: operations, peak rates and predictions, as far as they are known.
    """

    device: str
    cores: int
    price: float | None
    steps_per_epoch: int | None
    known: Known


def _step(attempt: Attempt, reading: Reading) -> float:
    return reading.step_seconds


def _total(attempt: Attempt, reading: Reading) -> float:
    return attempt.seconds


def _target(attempt: Attempt, reading: Reading) -> float | None:
    return attempt.target_seconds


def _start(attempt: Attempt, reading: Reading) -> float:
    return reading.first_step_at - attempt.started


def fastest_alone(found: Sequence[Measurement]) -> Measurement:
    """The one-worker case that speed-ups are over: the fastest, because a slow one would flatter every other plan."""
    alone = [one for one in found if one.wanted.plan.layout.workers == 1 and one.rounds]
    return min(alone, key=lambda one: statistics.median(one.by_round(_step).values()), default=found[0])


def make_cases(found: Sequence[Measurement], one_unit: str, context: Context) -> list[Case]:
    """All cases with everything that needs no other words than numbers."""
    baseline = fastest_alone(found)
    unit = next(each for each in found if each.wanted.name == one_unit)
    return [_case(each, baseline, unit, context) for each in found]


def _case(one: Measurement, baseline: Measurement, unit: Measurement, context: Context) -> Case:
    wanted = one.wanted
    workers, units = wanted.plan.layout.workers, wanted.units(context.device)
    outcome, reason, details = one.failed or ("measured", "", "")
    if wanted.refused:
        outcome, reason = "refused", wanted.refused
    elif not one.rounds and one.failed is None:
        outcome, reason = "interrupted", "the bench was interrupted before it was measured"
    prediction = context.known.prediction(wanted)
    case = Case(
        name=wanted.name,
        plan=wanted.plan.to_dict(),
        workers=workers,
        threads=wanted.threads,
        units=units,
        batch_size=wanted.batch_size,
        scaling=wanted.scaling,
        outcome=outcome,
        reason=reason,
        details=details,
        predicted_step_seconds=prediction.step_seconds if prediction is not None else None,
        predicted_memory_bytes=prediction.memory_bytes if prediction is not None else None,
    )
    if not one.rounds:
        return case
    growth = wanted.batch_size / baseline.wanted.batch_size
    step, start = one.by_round(_step), one.by_round(_start)
    speedup = _ratios(baseline.by_round(_step), step, growth)
    over_unit = _ratios(unit.by_round(_step), step, growth)
    readings = [reading for _, reading in one.rounds.values()]
    ranks = [_split(rank, readings) for rank in range(workers)]
    seconds = statistics.median(step.values())
    flops = context.known.flops * growth / seconds if context.known.flops else None
    peak = context.known.peak(wanted)
    case = replace(
        case,
        step_seconds=Spread.of(list(step.values())),
        step_low_seconds=statistics.median(reading.step_low_seconds for reading in readings),
        step_high_seconds=statistics.median(reading.step_high_seconds for reading in readings),
        samples_per_second=Spread.of([wanted.batch_size / one_step for one_step in step.values()]),
        total_seconds=Spread.of(list(one.by_round(_total).values())),
        start_seconds=Spread.of(list(start.values())),
        target_seconds=Spread.of(list(one.by_round(_target).values())),
        speedup=Spread.of(speedup),
        total_speedup=Spread.of(_ratios(baseline.by_round(_total), one.by_round(_total), growth)),
        target_speedup=Spread.of(_ratios(baseline.by_round(_target), one.by_round(_target), 1.0)),
        efficiency=Spread.of([value / units for value in over_unit]),
        ranks=ranks,
        traffic_bytes=max(reading.traffic_bytes for reading in readings),
        payload_bytes=max(reading.payload_bytes for reading in readings),
        core_use=_core_use(ranks, seconds, context) if context.device == "cpu" else None,
        flops_per_second=flops,
        mfu=flops / peak if flops and peak else None,
        cost_per_epoch=_cost(seconds, workers, growth, context),
        metrics=_metrics(one, baseline) if growth == 1 else [],
        timeline=readings[-1].timeline,
        course=readings[-1].course,
    )
    return replace(case, lost_seconds=_lost(case, unit, growth), break_even_steps=_break_even(one, baseline, growth))


def _ratios(before: Mapping[int, float], after: Mapping[int, float], growth: float) -> list[float]:
    """How many times faster, in each round that has both."""
    return [growth * before[number] / after[number] for number in sorted(after) if number in before]


def _split(rank: int, readings: Sequence[Reading]) -> RankSplit:
    own = [reading.ranks[rank] for reading in readings]
    queues = [each.queue_seconds for each in own if each.queue_seconds is not None]
    return RankSplit(
        rank=rank,
        seconds={part: statistics.fmean(each.seconds[part] for each in own) for part in PARTS},
        late_seconds=statistics.fmean(each.late_seconds for each in own),
        slowest=statistics.fmean(each.slowest for each in own),
        core_seconds=statistics.fmean(each.core_seconds for each in own),
        queue_seconds=statistics.fmean(queues) if queues else None,
        peak_memory_bytes=max(reading.peak_memory_bytes[rank] for reading in readings),
    )


def _core_use(ranks: Sequence[RankSplit], step_seconds: float, context: Context) -> float:
    return sum(rank.core_seconds for rank in ranks) / (step_seconds * context.cores)


def _lost(case: Case, unit: Measurement, growth: float) -> dict[str, float]:
    """What each part of the step takes beyond its share of the one-unit step. The sum is the whole loss."""
    if not unit.rounds:
        return {}
    readings = [reading for _, reading in unit.rounds.values()]
    alone = _split(0, readings).seconds
    mean = case.mean_seconds
    return {part: mean[part] - growth * alone[part] / case.units for part in PARTS}


def _break_even(one: Measurement, baseline: Measurement, growth: float) -> int | None:
    """Steps from which on the plan is the faster one, its longer start included; None if never or from the first on."""
    if one is baseline or growth != 1:
        return None
    steps, starts = (
        statistics.median(baseline.by_round(value).values()) - statistics.median(one.by_round(value).values())
        for value in (_step, _start)
    )
    return math.ceil(-starts / steps) if steps > 0 > starts else None


def _cost(step_seconds: float, workers: int, growth: float, context: Context) -> float | None:
    if context.price is None or context.steps_per_epoch is None:
        return None
    return context.price * workers * step_seconds * context.steps_per_epoch / growth / 3600


def _metrics(one: Measurement, baseline: Measurement) -> list[Metric]:
    """Each final metric beside that of the one-worker run with the same seed.

    The rounds have different seeds, so the spread of the one-worker run's own values is what chance makes of this metric.
    A plan that only rounds differently stays far within it.
    """
    found = []
    names = {name: None for _, reading in one.rounds.values() for name in reading.metrics}
    for name in names:
        values = one.by_round(lambda _, reading: reading.metrics.get(name))  # noqa: B023  # used before the next turn
        alone = baseline.by_round(lambda _, reading: reading.metrics.get(name))  # noqa: B023
        both = sorted(values.keys() & alone.keys())
        if not both:
            continue
        difference = statistics.median(values[number] - alone[number] for number in both)
        largest = max(abs(values[number] - alone[number]) for number in both)
        noise = max(alone.values()) - min(alone.values()) if len(alone) > 1 else None
        verdict = judge(largest, noise) if one is not baseline else "baseline"
        found.append(
            Metric(
                name=name,
                value=statistics.median(values.values()),
                difference=difference,
                noise=noise,
                verdict=verdict,
            )
        )
    return found


def judge(difference: float, noise: float | None) -> Literal["same", "differs", "unknown"]:
    """`same` where a difference is within the noise, `differs` beyond it, `unknown` without a measure of noise."""
    if noise is None:
        return "unknown"
    return "same" if difference <= noise else "differs"
