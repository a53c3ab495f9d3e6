"""The ledger of losses, and the one small message in which ranks agree on what happens next.

Losses stay on the device and on their rank until the ledger is settled, so that a step waits for nobody. Settling is one
sum over the ranks of a short vector: this rank's part of each loss since the last time, and three control values. What
every rank must do at the same step (stop, save, settle again) is decided by that sum alone, never by a local clock or
signal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import final

import torch
from torch import Tensor

from shardwise.dist.collectives import Group
from shardwise.run.step import StepResult

SETTLE_SECONDS = 0.5
"""Aim for the time between two settlements: how fresh the progress bar is and how fast Ctrl-C is noticed."""

_MOST_STEPS = 500
_OFFSETS = 21  # settlements over which clocks of machines are compared: their median forgives a late one


@final
@dataclass(frozen=True)
class Settlement:
    """What all ranks know after settling.

    Attributes:
        losses: mean loss over the global batch, one a step since the last settlement.
        seconds: wall seconds of this rank, one a step.
        samples: samples of the global batch, one number a step.
        stop: a rank was asked to stop.
        save: a checkpoint is due.
        late_seconds: mean over the steps of how much later than the mean of all ranks this one came to the first
            collective of a step.
        gradient_norm: of the last step, where the job clips.
        objectives: of a job with several, name -> mean loss a step; None of a step that did not take it.
    """

    losses: list[float]
    seconds: list[float]
    samples: list[int]
    stop: bool
    save: bool
    late_seconds: float = 0.0
    gradient_norm: float | None = None
    objectives: dict[str, list[float | None]] = field(default_factory=dict)


@final
@dataclass
class Ledger:
    """Losses of the steps since the last settlement.

    Attributes:
        group: all ranks.
        counts_loss: whether this rank's losses count, see `Assembly.counts_loss`.
        device: where losses live.
        stop_requested: whether this process was asked to stop.
        save_due: whether a checkpoint is due by the clock; only rank 0's answer counts.
        one_clock: the ranks are processes of one machine, so that their readings of the clock can be compared.
    """

    group: Group
    counts_loss: bool
    device: torch.device
    stop_requested: Callable[[], bool]
    save_due: Callable[[], bool]
    one_clock: bool = True
    _arrivals: list[float] = field(default_factory=list)
    _norm: Tensor | None = None
    _left: float = 0.0
    _offsets: deque[float] = field(default_factory=lambda: deque(maxlen=_OFFSETS))
    _sums: list[Tensor] = field(default_factory=list)
    _named: list[Mapping[str, Tensor]] = field(default_factory=list)
    _weights: list[float | Tensor] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    _samples: list[int] = field(default_factory=list)
    _settle_after: int = 1
    _last: float = field(default_factory=perf_counter)

    def add(self, result: StepResult) -> None:
        """Note a step."""
        now = perf_counter()
        self._sums.append(result.loss_sum)
        self._weights.append(result.weight)
        self._named.append(result.losses)
        self._seconds.append(now - self._last)
        self._samples.append(result.samples)
        arrival = self.group.meter.first_arrival if self.group.meter is not None else None
        self._arrivals.append(arrival or 0.0)
        self._norm = result.gradient_norm
        self._last = now

    def skip_time(self) -> None:
        """Do not count the time since the last step (an evaluation, a checkpoint) towards the next one."""
        self._last = perf_counter()

    @property
    def due(self) -> bool:
        """Enough steps were noted; the same on every rank."""
        return len(self._sums) >= self._settle_after

    @property
    def settle_pending(self) -> bool:
        """Steps were noted since the last settlement; the same on every rank."""
        return bool(self._sums)

    def settle(self) -> Settlement:
        """Sum up and agree. Collective."""
        steps = len(self._sums)
        mean_seconds = sum(self._seconds) / steps if steps else SETTLE_SECONDS
        is_first = self.group.rank == 0
        settle_after = min(_MOST_STEPS, max(1, round(SETTLE_SECONDS / max(mean_seconds, 1e-6))))
        control = torch.tensor(
            [
                float(self.stop_requested()),
                float(is_first and self.save_due()),
                float(settle_after if is_first else 0),
            ],
            dtype=torch.float64,
            device=self.device,
        )
        arrivals = torch.tensor([self._left, *self._arrivals], dtype=torch.float64, device=self.device)
        vector = torch.cat([control, arrivals])
        if steps:
            losses = _column(self._sums, self.device) / _column(self._weights, self.device)
            named = [loss for each in self._named for loss in each.values()]
            if named:
                losses = torch.cat([losses, _column(named, self.device)])
            vector = torch.cat([vector, losses * float(self.counts_loss)])
        stop, save, agreed_after, *numbers = self.group.sum_(vector, "the losses, and what to do next").tolist()
        settled = Settlement(
            numbers[1 + steps : 1 + 2 * steps],
            self._seconds,
            self._samples,
            stop > 0,
            save > 0,
            self._late(numbers[: 1 + steps]),
            None if self._norm is None else float(self._norm),
            _by_name(self._named, iter(numbers[1 + 2 * steps :])),
        )
        self._named = []
        # The first steps of a run are slow (warm-up): grow the interval gently.
        self._settle_after = min(int(agreed_after), 2 * self._settle_after)
        self._sums, self._weights, self._seconds, self._samples, self._arrivals = [], [], [], [], []
        self._left = perf_counter()
        return settled

    @property
    def offset_seconds(self) -> float:
        """How far this rank's clock is ahead of the mean of all ranks' clocks, as far as is known."""
        return 0.0 if self.one_clock or not self._offsets else median(self._offsets)

    def _late(self, sums: list[float]) -> float:
        """How much later than the mean of the ranks this one came, given the sums over the ranks of what it sent.

        Clocks of different machines are compared at the end of the settlement before, which all ranks leave within the
        time of a message of each other.
        """
        left, *arrivals = sums
        if self.group.size == 1 or not arrivals or 0.0 in self._arrivals:
            return 0.0
        if self._left:
            self._offsets.append(self._left - left / self.group.size)
        pairs = zip(self._arrivals, arrivals, strict=True)
        return sum(own - total / self.group.size for own, total in pairs) / len(arrivals) - self.offset_seconds


def _by_name(steps: list[Mapping[str, Tensor]], values: Iterator[float]) -> dict[str, list[float | None]]:
    """Values in the order of the steps and of the names in each, as one list a name."""
    names = dict.fromkeys(name for each in steps for name in each)
    taken = [{name: next(values) for name in each} for each in steps]
    return {name: [each.get(name) for each in taken] for name in names}


def _column(values: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Scalars as a float64 vector, by few operations: there may be hundreds of them."""
    if all(isinstance(value, float) for value in values):
        return torch.tensor(values, dtype=torch.float64, device=device)
    scalars = [torch.as_tensor(value, device=device) for value in values]
    if len({scalar.dtype for scalar in scalars}) > 1:
        scalars = [scalar.to(torch.float64) for scalar in scalars]
    return torch.stack(scalars).to(torch.float64)
