"""How each training of a sweep runs: many side by side on one worker each, or fewer at once on more workers each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from shardwise.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from shardwise.run.choose import Priced, Pricer
    from shardwise.spec.job import Job
    from shardwise.spec.plan import Plan
    from shardwise.tasks.need import Capacity

WORTH = 1.1
"""A wider training must be predicted so much faster: predictions are no better, and a narrow one has the same bits everywhere."""

_SAME_BITS = "a wide training equals the narrow one up to rounding; --plan serial for the same bits everywhere"


@final
@dataclass(frozen=True)
class Width:
    """The decision.

    Attributes:
        plan: of each training.
        memory_bytes: that one training is expected to take; 0 where that is not known.
        reasons: sentences for people.
    """

    plan: Plan
    memory_bytes: int
    reasons: list[str]


@final
@dataclass(frozen=True)
class Choice:
    """Trainings of one width: how many run at once, and how many steps of all of them that makes in a second."""

    price: Priced
    slots: int
    steps_per_second: float
    short_of_memory: bool

    def __str__(self) -> str:
        width = self.price.plan.layout.workers
        each = "one worker" if width == 1 else f"{width} workers"
        many = f"{self.slots} side by side on {each} each" if self.slots > 1 else f"one at a time on {each}"
        full = ", no more fit in memory" if self.short_of_memory else ""
        return f"{many}{full}: {self.steps_per_second:.3g} steps/s"


def choose_width(
    job: Job,
    capacity: Capacity,
    *,
    device: str,
    plan: str | None,
    started_as: str | None,
    at_once: int,
    trainings: int,
    pricer: Pricer | None,
    elsewhere: bool,
) -> Width:
    """Decide on the plan of each training.

    Args:
        job: one of the trainings.
        capacity: what there is for all of them.
        device: type of device.
        plan: what the user asked for, None to decide.
        started_as: the plan of the sweep that is gone on with, None for a new one.
        at_once: trainings that can be under way together.
        trainings: all of them.
        pricer: prices plans; None goes by the number of cores alone.
        elsewhere: they run on other machines, of which nothing was measured.
    """
    from shardwise.run.choose import choose_plan
    from shardwise.run.options import TrainOptions, resolve_plan

    places = len(capacity.gpus) if device != "cpu" else int(capacity.cores)
    asked = plan or started_as
    if asked is not None:
        fixed = resolve_plan(job, TrainOptions(plan=asked, threads=1, device=device), device=device, world=None)
        return Width(fixed, 0, [f"each training runs as {fixed.layout}, as {'was asked for' if plan else 'before'}"])
    most = choose_plan(job, workers=None, threads=1, device=device).layout.workers
    width = 1 if at_once >= places else max(1, min(places // at_once, most))
    prices: Sequence[Priced] | str
    if pricer is None:
        prices = ""
    elif device != "cpu" or elsewhere:
        prices = "only CPU plans of this machine are priced for sweeps"
    elif job.compile:
        prices = "compiled models are not priced"
    else:
        prices = pricer(job, widths=_widths(width, min(places, most)), cores=places, trainings=trainings)
    if not isinstance(prices, str):
        return _by_price(prices, capacity, places=places, at_once=at_once, trainings=trainings)
    return _by_count(job, device, places, width, at_once, prices)


def _widths(rule: int, most: int) -> list[int]:
    powers = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    return sorted({*powers, rule, most})


def _by_count(job: Job, device: str, places: int, width: int, at_once: int, unpriced: str) -> Width:
    """The rule that needs no prices: one worker each, unless there are fewer trainings than places."""
    from shardwise.run.choose import choose_plan

    plan = choose_plan(job, workers=width, threads=1, device=device)
    head = f"{at_once} trainings for {places} {'GPUs' if device != 'cpu' else 'cores'}"
    if width == 1:
        reasons = [f"{head}: side by side, one worker with one thread each"]
    else:
        reasons = [f"{head}: each on {width}, so that fewer stand idle", _SAME_BITS]
    return Width(plan, 0, reasons + [f"not priced: {unpriced}"] * bool(unpriced))


def _by_price(prices: Sequence[Priced], capacity: Capacity, *, places: int, at_once: int, trainings: int) -> Width:
    choices = [_choice(price, capacity, places, at_once, trainings) for price in prices]
    narrow = min(choices, key=lambda item: item.price.plan.layout.workers)
    best = max(choices, key=lambda item: item.steps_per_second)
    if best.steps_per_second < WORTH * narrow.steps_per_second:
        best = narrow
    price = best.price
    others = "; ".join(str(item) for item in choices if item is not best)
    reasons = [f"{best}" + (f", against {others}" if others else "") + f" (predicted for all {trainings} trainings)"]
    reasons.append(
        f"each is predicted to take {format_seconds(price.step_seconds)} a step and {format_bytes(price.memory_bytes)} "
        f"of its own ({price.confidence})"
    )
    if price.plan.layout.workers > 1:
        reasons.append(_SAME_BITS)
    return Width(price.plan, price.memory_bytes, reasons)


def _choice(price: Priced, capacity: Capacity, places: int, at_once: int, trainings: int) -> Choice:
    room = max(1, int(capacity.memory_bytes // max(1, price.memory_bytes)))
    wanted = max(1, min(places // price.plan.layout.workers, at_once))
    slots = min(wanted, room)
    rounds = math.ceil(trainings / slots)
    return Choice(price, slots, trainings / (rounds * price.step_seconds), slots < wanted)


def plan_of_started(folder: Path | str | None, device: str) -> str | None:
    """The plan with which the sweep in a folder was started; None where there is none, or it ran on another device."""
    if folder is None:
        return None
    try:
        record: Any = json.loads((Path(folder) / "sweep.json").read_text(encoding="utf-8"))
        words = str(record["plan"]).split()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return words[0] if words and words[-1] == device else None
