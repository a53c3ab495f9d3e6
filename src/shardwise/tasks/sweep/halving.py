"""Successive halving: which trial goes on, which is paused, and when a new one starts.

ASHA (Li et al. 2020, "A system for massively parallel hyperparameter tuning") promotes a trial as soon as it is among the
best 1/eta of those that have come as far, and starts a new one when none is. Its decisions depend on which trial ends first.
Here they are taken on a clock of its own: a fixed number of lanes works through the trials, and a lane is busy for as many
ticks as epochs (or steps) are trained. So the same trials are run with the same results on any number of workers; real
workers run what the lanes have begun, in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from shardwise.errors import UserError
from shardwise.tasks.sweep.search import Search
from shardwise.tasks.sweep.space import Setting

DEFAULT_LANES = 8
DEFAULT_ETA = 3


@final
@dataclass(frozen=True)
class Unit:
    """A trial is trained on to the end of a rung."""

    trial: int
    rung: int


@final
@dataclass
class Trial:
    """One combination.

    Attributes:
        values: of the metric, one for each rung it has come to; None where the trial failed.
        promoted: highest rung it was sent to.
    """

    number: int
    setting: Setting
    values: list[float | None] = field(default_factory=list)
    promoted: int = 0

    @property
    def rung(self) -> int:
        """The last rung it completed, -1 for none."""
        return len(self.values) - 1

    @property
    def value(self) -> float | None:
        return self.values[-1] if self.values else None


def rungs_of(length: int, *, eta: int, least: int) -> tuple[int, ...]:
    """After how many epochs (or steps) trials are compared: `least`, then eta times as many each, then the whole length.

    Raises:
        UserError: numbers that make no rungs.
    """
    if eta < 2:
        raise UserError(f"asha: eta={eta}: at least 2, so that some trials are stopped")
    if not 1 <= least < length:
        raise UserError(
            f"asha: min={least}: trials are {length} long, so the first comparison is after 1 to {length - 1}"
        )
    rungs = []
    while least < length:
        rungs.append(least)
        least *= eta
    return (*rungs, length)


@final
class Course:
    """The trials of a sweep, and the units that the lanes are at."""

    def __init__(self, search: Search, rungs: Sequence[int], *, eta: int, lanes: int, maximize: bool) -> None:
        self._search, self._rungs, self._eta = search, tuple(rungs), eta
        self._lanes = lanes
        self._maximize = maximize
        self.trials: list[Trial] = []
        self._busy: list[tuple[int, int, Unit]] = []
        self._tick = self._begun = 0
        self._exhausted = False

    @property
    def busy(self) -> bool:
        return bool(self._busy)

    def advance(self, ended: Mapping[Unit, float | None]) -> list[Unit]:
        """Take the results of ended units in the lanes' order, as far as they are there; the units that then begin."""
        begun = self._fill()
        while self._busy:
            first = min(self._busy)
            if first[2] not in ended:
                break
            self._busy.remove(first)
            self._tick = first[0]
            self._note(first[2], ended[first[2]])
            begun += self._fill()
        return begun

    def best_first(self) -> list[Trial]:
        """Trials with a result: those that came furthest first, among them the best."""
        good = [trial for trial in self.trials if trial.values and _is_number(trial.value)]
        return sorted(good, key=lambda trial: (-trial.rung, -self._score(trial.value), trial.number))

    def _note(self, unit: Unit, value: float | None) -> None:
        trial = self.trials[unit.trial]
        trial.values.append(value)
        if unit.rung == 0:
            # A search that learns is told every trial once, at its first rung: all trials come so far, so the values
            # compare, and none has to wait for a trial that may stay paused.
            self._search.tell(unit.trial, value)

    def _fill(self) -> list[Unit]:
        begun = []
        while len(self._busy) < self._lanes:
            unit = self._next()
            if unit is None:
                break
            before = self._rungs[unit.rung - 1] if unit.rung else 0
            self._begun += 1
            self._busy.append((self._tick + self._rungs[unit.rung] - before, self._begun, unit))
            begun.append(unit)
        return begun

    def _next(self) -> Unit | None:
        unit = self._promotion()
        if unit is not None:
            return unit
        setting = None if self._exhausted else self._search.propose()
        if setting is not None:
            trial = Trial(len(self.trials), setting)
            self.trials.append(trial)
            return Unit(trial.number, 0)
        self._exhausted = True
        return self._last_promotion() if not self._busy else None

    def _promotion(self) -> Unit | None:
        for rung in range(len(self._rungs) - 2, -1, -1):
            there = [trial for trial in self.trials if trial.rung >= rung]
            best = sorted(there, key=lambda trial: (-self._score(trial.values[rung]), trial.number))
            for trial in best[: len(there) // self._eta]:
                if trial.rung == rung == trial.promoted and _is_number(trial.values[rung]):
                    return self._promote(trial)
        return None

    def _last_promotion(self) -> Unit | None:
        """With few trials, the best of them may not be among the best 1/eta of anything: it is trained to the end."""
        best = self.best_first()
        if not best or best[0].rung == len(self._rungs) - 1:
            return None
        return self._promote(best[0])

    def _promote(self, trial: Trial) -> Unit:
        trial.promoted = trial.rung + 1
        return Unit(trial.number, trial.promoted)

    def _score(self, value: float | None) -> float:
        if value is None or not math.isfinite(value):
            return -math.inf
        return value if self._maximize else -value


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def parse_stop(text: str | None) -> tuple[int, int] | None:
    """`asha`, `asha:eta=4,min=2` as (eta, min); None for no stopping.

    Raises:
        UserError: another word, or a setting that there is not.
    """
    if text is None:
        return None
    name, _, rest = text.partition(":")
    values = {"eta": DEFAULT_ETA, "min": 1}
    for part in filter(None, rest.split(",")):
        key, _, number = part.partition("=")
        if key.strip() not in values or not number.strip().isdecimal():
            raise UserError(f"--stop {text!r}: write asha, or asha:eta=3,min=1")
        values[key.strip()] = int(number)
    if name != "asha":
        raise UserError(f"--stop {text!r}: the way to stop is asha, or asha:eta=3,min=1")
    return values["eta"], values["min"]
