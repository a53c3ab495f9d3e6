"""Which combination to try next. What a search proposes depends on what it was told, and in which order, alone."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, final

from shardwise.errors import UserError
from shardwise.tasks.sweep.space import Axis, Setting, all_combinations

SearchName = Literal["grid", "random", "tpe"]

DEFAULT_TRIALS = 20
"""Combinations that are tried where the search has no end of its own."""


class Search(ABC):
    """Proposes combinations."""

    @abstractmethod
    def propose(self) -> Setting | None:
        """The next combination, None when there are no more."""

    @abstractmethod
    def tell(self, number: int, value: float | None) -> None:
        """Proposal `number` (from 0) reached this value, None where it failed."""

    @property
    @abstractmethod
    def learns(self) -> bool:
        """Whether proposals depend on what was told."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many combinations it will propose."""


@final
class Listed(Search):
    """A list that is known beforehand: a grid, or combinations drawn at random."""

    learns = False

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = list(settings)
        self._next = 0

    @property
    def size(self) -> int:
        return len(self._settings)

    def propose(self) -> Setting | None:
        if self._next >= len(self._settings):
            return None
        self._next += 1
        return self._settings[self._next - 1]

    def tell(self, number: int, value: float | None) -> None:
        """Nothing is learned."""


@final
class Tpe(Search):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011). Trials under way count as bad ones meanwhile
    (`constant_liar`), so that it proposes different ones."""

    learns = True

    def __init__(self, axes: Sequence[Axis], trials: int, seed: int, *, maximize: bool) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError("--search tpe needs Optuna: pip install 'shardwise[sweep]'") from error
        import warnings

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._axes, self._trials = list(axes), trials
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is marked as experimental
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._study: Any = optuna.create_study(sampler=sampler, direction="maximize" if maximize else "minimize")
        self._asked: list[Any] = []
        self._failed = optuna.trial.TrialState.FAIL
        self._kinds = {axis.name: _distribution(axis, optuna.distributions) for axis in axes}

    @property
    def size(self) -> int:
        return self._trials

    def propose(self) -> Setting | None:
        if len(self._asked) >= self._trials:
            return None
        trial = self._study.ask(self._kinds)
        self._asked.append(trial)
        return tuple((axis.name, _text(axis, trial.params[axis.name])) for axis in self._axes)

    def tell(self, number: int, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            self._study.tell(self._asked[number], state=self._failed)
        else:
            self._study.tell(self._asked[number], value)


def make_search(name: SearchName, axes: Sequence[Axis], *, trials: int | None, seed: int, maximize: bool) -> Search:
    """The search of a sweep.

    Raises:
        UserError: a grid without points, a number of trials below 1, or Optuna is missing.
    """
    if trials is not None and trials < 1:
        raise UserError(f"--trials {trials}: at least 1")
    if name == "grid":
        settings = all_combinations(axes)
        return Listed(settings if trials is None else settings[:trials])
    count = DEFAULT_TRIALS if trials is None else trials
    if name == "random":
        return Listed([_drawn(axes, seed, number) for number in range(count)])
    return Tpe(axes, count, seed, maximize=maximize)


def _drawn(axes: Sequence[Axis], seed: int, number: int) -> Setting:
    """Depends on the seed, the trial's number and the axis alone: more trials or axes leave it as it is."""
    return tuple((axis.name, axis.draw(random.Random(f"{seed}/{number}/{axis.name}").random())) for axis in axes)


def _distribution(axis: Axis, distributions: Any) -> Any:
    if axis.choices:
        return distributions.CategoricalDistribution(axis.choices)
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _text(axis: Axis, value: Any) -> str:
    if axis.choices:
        return str(value)
    return str(int(value)) if axis.whole else repr(float(value))
