"""Which of several plans is the fastest, from their predictions and short trials of them, each as far as it can be trusted.

Neither is the truth. A prediction is off by what its kind was found to be off by. A trial is off in three ways: by what its
steps vary from round to round; by what the machine does to all plans at once, for a while; and by what it does to one plan
for a while, which no number of trials in the same moment shows. The last is largest for plans whose worker computes with
several threads: a virtual machine's cores move apart and together every few seconds to minutes, a message between their
caches takes 85 or 420 ns, and such a plan, which has one for every operation, a step 40 % longer (measured 2026-11-26).

So plans are compared within rounds, in which all are tried one after another, and what is believed is the posterior of

    log t[plan, round] = truth[plan] + moment[plan] + everybody[round] + noise,

with a normal prior on the truth around the log of the prediction, a normal moment that is the same for all rounds, nothing
known about what strikes everybody, and noise with long tails (Student's t with 4 degrees of freedom, by reweighting: West
1984) of a size that the rounds tell. Another round is run only while it is expected to save the training more time than it
takes (the value of information, with several rounds looked ahead: Frazier and Powell 2010), and only of plans that may still
win. No plan loses its place by being slower once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOUR_OF_FIVE = 1.2816
"""Standard deviations of a normal distribution that four of five are within."""

DRIFT, THREADS_DRIFT = 0.04, 0.13
"""How far the log of one plan's step, against that of others, moves between moments 20 s apart: for workers of one thread and
of several (benchmarks/trials.py tells them as `drift`: ten models on two virtual cores, twelve rounds, 2026-11-26)."""

NOISE, NOISE_ROUNDS = 0.08, 4.0
"""What the noise of a trial is taken for before rounds tell, and how many rounds that is worth."""

TAIL = 4.0
"""Degrees of freedom of the noise."""

AHEAD = (1, 2, 4, 8)
"""Rounds that are looked ahead: one may change nothing where several would."""

CONFIRMED = 2
"""Rounds in which the predicted winner is seen beside another one before it loses its place, where there is time for them."""

MOST_ROUNDS = 20

DISTURBED_ROUNDS = 3
"""Rounds in a row that other programs may spoil before trying is given up."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """One trial: seconds of a step, what the trial took, whether other programs were in it, why it failed."""

    step_seconds: float = 0.0
    took_seconds: float = 0.0
    disturbed: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Contender:
    """A plan before it was tried.

    Attributes:
        predicted_seconds: of a step.
        within: what four of five predictions for its kind stay within, 0.1 for 10 %.
        threads: of one worker.
        trial_seconds: what one trial of it will take, roughly.
    """

    predicted_seconds: float
    within: float
    threads: int
    trial_seconds: float

    @property
    def drift(self) -> float:
        """Standard deviation of the log of its step between moments."""
        return THREADS_DRIFT if self.threads > 1 else DRIFT

    @property
    def doubt(self) -> float:
        """Standard deviation of the log of its step around the prediction, which was made in a moment, too."""
        return math.hypot(math.log1p(self.within) / FOUR_OF_FIVE, self.drift)


@dataclass(frozen=True)
class Outcome:
    """What a contest found.

    Attributes:
        winner: number of the contender that is believed to be fastest; None if all of them failed.
        chance: how likely it is faster than the one that comes closest.
        rounds: that were run.
        disturbed: trials that other programs spoiled.
        failed: numbers of the contenders that cannot run.
    """

    winner: int | None
    chance: float
    rounds: int
    disturbed: int
    failed: tuple[int, ...]


@dataclass
class Belief:
    """Posterior of the logs of the steps of all contenders."""

    contenders: Sequence[Contender]
    rounds: list[dict[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prior: Vector = np.log([item.predicted_seconds for item in self.contenders])
        self._doubt2: Vector = np.square([item.doubt for item in self.contenders])
        self._drift2: Vector = np.square([item.drift for item in self.contenders])
        self._settle()

    def add(self, seconds: Mapping[int, float]) -> None:
        """A round: contender -> seconds of a step. One alone tells nothing about the others."""
        if len(seconds) > 1:
            self.rounds.append({index: math.log(value) for index, value in seconds.items()})
            self._settle()

    def order(self, among: Sequence[int]) -> list[int]:
        """The contenders, the one believed to be fastest first."""
        return sorted(among, key=lambda index: float(self.mean[index]))

    def together(self, one: int, other: int) -> int:
        """Rounds in which both were seen."""
        return sum(one in found and other in found for found in self.rounds)

    def chance(self, one: int, other: int) -> float:
        """How likely `one` is faster than `other`."""
        spread = math.sqrt(_difference(self.covariance, one, other))
        gap = float(self.mean[other] - self.mean[one])
        return NormalDist().cdf(gap / spread) if spread else float(gap > 0)

    def value(self, leader: int, other: int, rounds: int) -> float:
        """Part of a training that so many rounds of two contenders are expected to save by changing the choice."""
        pair = [leader, other]
        precision = self._precision.copy()
        precision[np.ix_(pair, pair)] += rounds * _within([1.0, 1.0]) / self.noise**2
        learned = np.outer(self._trust, self._trust) * (np.linalg.inv(self._precision) - np.linalg.inv(precision))
        spread = math.sqrt(_difference(learned, leader, other))
        return _expected_excess(float(self.mean[leader] - self.mean[other]), spread)

    def _settle(self) -> None:
        """`mean` and `covariance` of the truth; `noise` of a trial."""
        weights = [dict.fromkeys(found, 1.0) for found in self.rounds]
        self.noise = NOISE
        for _ in range(8 if self.rounds else 0):
            residuals, freedom = self._residuals(weights)
            squares = sum(w[i] * e[i] ** 2 for w, e in zip(weights, residuals, strict=True) for i in e)
            self.noise = math.sqrt((NOISE_ROUNDS * NOISE**2 + squares) / (NOISE_ROUNDS + freedom))
            weights = [
                {i: (TAIL + 1) / (TAIL + (e / self.noise) ** 2) for i, e in found.items()} for found in residuals
            ]
        matrix, vector = self._sums(weights)
        spread2 = self._doubt2 + self._drift2  # of the truth and the moment together: what trials show
        self._precision = np.diag(1.0 / spread2) + matrix / self.noise**2
        covariance = np.linalg.inv(self._precision)
        shown = covariance @ (self._prior / spread2 + vector / self.noise**2)
        self._trust: Vector = self._doubt2 / spread2
        self.mean: Vector = self._prior + self._trust * (shown - self._prior)
        self.covariance = np.diag(self._trust * self._drift2) + np.outer(self._trust, self._trust) * covariance

    def _sums(self, weights: Sequence[Mapping[int, float]]) -> tuple[Vector, Vector]:
        """What the rounds say of differences: normal equations, with what struck everybody in a round taken out."""
        count = len(self.contenders)
        matrix, vector = np.zeros((count, count)), np.zeros(count)
        for found, weight in zip(self.rounds, weights, strict=True):
            who = list(found)
            part = _within([weight[i] for i in who])
            matrix[np.ix_(who, who)] += part
            vector[who] += part @ np.array([found[i] for i in who])
        return matrix, vector

    def _residuals(self, weights: Sequence[Mapping[int, float]]) -> tuple[list[dict[int, float]], int]:
        """What neither the contender nor the round explains, and the degrees of freedom of that."""
        matrix, vector = self._sums(weights)
        fitted = np.linalg.pinv(matrix) @ vector
        residuals = []
        for found, weight in zip(self.rounds, weights, strict=True):
            left = {i: value - float(fitted[i]) for i, value in found.items()}
            everybody = sum(weight[i] * left[i] for i in left) / sum(weight.values())
            residuals.append({i: value - everybody for i, value in left.items()})
        tried = {i for found in self.rounds for i in found}
        return residuals, max(0, sum(len(found) - 1 for found in self.rounds) - (len(tried) - 1))


def hold(
    contenders: Sequence[Contender],
    attempt: Callable[[int], Seen],
    *,
    training_seconds: float,
    left: Callable[[], float],
) -> Outcome:
    """Try the contenders in rounds until more of them would cost more than they may save.

    Args:
        contenders: the predicted ones.
        attempt: tries one.
        training_seconds: of the run that the choice is for.
        left: seconds that may still be spent; no round is begun that would probably exceed it.
    """
    belief = Belief(contenders)
    costs = [item.trial_seconds for item in contenders]
    able = list(range(len(contenders)))
    rounds = disturbed = spoiled = 0
    while len(able) > 1 and rounds < MOST_ROUNDS and spoiled < DISTURBED_ROUNDS:
        who = _worth_trying(belief, able, costs, training_seconds, left())
        if not who:
            break
        found: dict[int, float] = {}
        for index in who if rounds % 2 == 0 else reversed(who):  # what drifts evenly strikes all of them alike
            seen = attempt(index)
            costs[index] = seen.took_seconds
            if seen.failed:
                able.remove(index)
            elif seen.disturbed:
                disturbed += 1
            else:
                found[index] = seen.step_seconds
        rounds += 1
        spoiled = 0 if len(found) > 1 else spoiled + 1
        belief.add(found)
    failed = tuple(index for index in range(len(contenders)) if index not in able)
    if not able:
        return Outcome(None, 0.0, rounds, disturbed, failed)
    winner, *others = belief.order(able)
    chance = min((belief.chance(winner, other) for other in others), default=1.0)
    return Outcome(winner, chance, rounds, disturbed, failed)


def _worth_trying(
    belief: Belief, able: Sequence[int], costs: Sequence[float], training_seconds: float, left: float
) -> list[int]:
    """The leader, and who may overtake it at a price that is worth it; nobody where there is no such, or no time for them."""
    leader, *others = belief.order(able)
    predicted = min(able, key=lambda index: belief.contenders[index].predicted_seconds)
    who = [leader]
    for other in others:
        price = costs[leader] + costs[other]
        unconfirmed = other == predicted and belief.together(leader, other) < CONFIRMED and price <= left
        if unconfirmed or any(
            belief.value(leader, other, more) * training_seconds > more * price
            for more in AHEAD
            if more * price <= left
        ):
            who.append(other)
    while len(who) > 1 and sum(costs[index] for index in who) > left:
        who.pop()
    return sorted(who) if len(who) > 1 else []


def _within(weights: Sequence[float]) -> Any:
    """Precision of the values of a round, of equal noise but for these weights, when nothing is known of their common part."""
    found = np.asarray(weights)
    return np.diag(found) - np.outer(found, found) / found.sum()


def _difference(covariance: Any, one: int, other: int) -> float:
    return max(0.0, float(covariance[one, one] + covariance[other, other] - 2.0 * covariance[one, other]))


def _expected_excess(mean: float, spread: float) -> float:
    """Expectation of the positive part of a normal value."""
    if spread <= 0.0:
        return max(0.0, mean)
    normal = NormalDist()
    return mean * normal.cdf(mean / spread) + spread * normal.pdf(mean / spread)
