"""Predictions and short trials on a simulated machine whose truth is planted: noisy, drifting, shared with others."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from statistics import mean

import pytest

from shardwise.advise.contest import Belief, Contender, Outcome, Seen, hold
from shardwise.advise.trial import Tried
from shardwise.probe import busy
from shardwise.probe.busy import cores_busy_seconds
from shardwise.run.choose import usable_cores
from shardwise.spec.plan import Plan


def contenders(*predicted: float, within: float = 0.3, threads: int = 1, trial_seconds: float = 0.5) -> list[Contender]:
    return [Contender(seconds, within, threads, trial_seconds) for seconds in predicted]


def run(
    field: list[Contender], attempt: Callable[[int], Seen], *, training: float = 1000.0, budget: float = 30.0
) -> tuple[Outcome, list[int]]:
    """The contest with a budget that trials use up, and who was tried in which order."""
    tried: list[int] = []
    spent = 0.0

    def counted(index: int) -> Seen:
        nonlocal spent
        seen = attempt(index)
        tried.append(index)
        spent += seen.took_seconds
        assert spent <= budget, "the budget was exceeded"
        return seen

    return hold(field, counted, training_seconds=training, left=lambda: budget - spent), tried


def noisy(truth: list[float], luck: random.Random, *, threads: list[int]) -> Callable[[int], Seen]:
    """A machine: a moment of its own for each plan, rounds that strike all, noise, and outliers that only slow down."""
    moments = [luck.gauss(0.0, 0.13 if count > 1 else 0.04) for count in threads]
    rounds = [luck.gauss(0.0, 0.1) for _ in range(100)]
    seen = [0] * len(truth)

    def attempt(index: int) -> Seen:
        noise = luck.gauss(0.0, 0.05) + (luck.expovariate(2.0) if luck.random() < 0.1 else 0.0)
        value = truth[index] * math.exp(moments[index] + rounds[seen[index]] + noise)
        seen[index] += 1
        return Seen(value, 0.5)

    return attempt


def test_on_a_noisy_machine_it_is_better_than_predictions_and_than_a_trial_of_each() -> None:
    regrets: dict[str, list[float]] = {"prediction": [], "one trial": [], "contest": []}
    right: dict[str, list[float]] = {"prediction": [], "one trial": [], "contest": []}
    luck = random.Random(1)
    for _ in range(250):
        threads, within = [1, 2, 1], [0.45, 0.10, 0.10]
        truth = [math.exp(luck.gauss(0.0, 0.2)) for _ in threads]
        for wrong, kept in ((1.0, regrets), (0.2, right)):
            errors = [wrong * luck.gauss(0.0, math.log1p(w) / 1.28) for w in within]
            field = [
                Contender(t * math.exp(e), w, n, 0.5) for t, e, w, n in zip(truth, errors, within, threads, strict=True)
            ]
            outcome, _ = run(field, noisy(truth, luck, threads=threads))
            once = noisy(truth, luck, threads=threads)
            trials = [once(index).step_seconds for index in range(len(truth))]
            predicted = [item.predicted_seconds for item in field]
            chosen = (predicted.index(min(predicted)), trials.index(min(trials)), outcome.winner)
            for name, index in zip(kept, chosen, strict=True):
                assert index is not None
                kept[name].append(truth[index] / min(truth) - 1)
    # Predictions as wrong as they are said to be: trials halve what they cost.
    assert mean(regrets["contest"]) < 0.5 * mean(regrets["prediction"])
    assert mean(regrets["contest"]) < 0.8 * mean(regrets["one trial"])
    # Predictions five times better than they are said to be: the trials cannot know that, and harm little.
    assert mean(right["contest"]) < mean(right["prediction"]) + 0.015
    assert mean(right["contest"]) < 0.5 * mean(right["one trial"])


def test_being_slower_once_costs_nobody_the_lead() -> None:
    calls = [0, 0]

    def attempt(index: int) -> Seen:
        calls[index] += 1
        slow = index == 0 and calls[0] == 1
        return Seen(1.4 if slow else (1.0, 1.1)[index], 0.5)

    outcome, tried = run(contenders(1.0, 1.1, within=0.1), attempt)
    assert outcome.winner == 0
    assert outcome.rounds >= 2
    assert tried[:4] == [0, 1, 1, 0], "the order turns from round to round, so that an even drift strikes both"


def test_evidence_beyond_the_noise_is_believed() -> None:
    outcome, _ = run(contenders(1.0, 1.2), lambda index: Seen((1.3, 0.9)[index], 0.5))
    assert outcome.winner == 1
    assert outcome.chance > 0.9
    # A plan whose prediction is known to be good needs more of it than one whose prediction is a guess.
    sure = Belief([Contender(1.0, 0.05, 1, 0.5), Contender(1.05, 0.05, 1, 0.5)])
    unsure = Belief([Contender(1.0, 0.5, 1, 0.5), Contender(1.05, 0.5, 1, 0.5)])
    for belief in (sure, unsure):
        belief.add({0: 1.1, 1: 1.0})
    assert sure.chance(1, 0) < unsure.chance(1, 0)
    # Several threads drift more: the same trial says less of them.
    threads = Belief([Contender(1.0, 0.5, 2, 0.5), Contender(1.05, 0.5, 1, 0.5)])
    threads.add({0: 1.1, 1: 1.0})
    assert 0.5 < threads.chance(1, 0) < unsure.chance(1, 0)


def test_one_outlier_among_rounds_is_left_behind() -> None:
    belief = Belief(contenders(1.0, 1.1, within=0.5))
    for _ in range(5):
        belief.add({0: 1.0, 1: 1.1})
    before, noise = belief.chance(0, 1), belief.noise
    belief.add({0: 3.0, 1: 1.1})
    assert belief.chance(0, 1) > 0.7 * before
    assert belief.noise < 3 * noise
    # What strikes everybody in a round says nothing.
    other = Belief(contenders(1.0, 1.1, within=0.5))
    for factor in (1.0, 2.0, 0.5, 1.0, 1.0):
        other.add({0: 1.0 * factor, 1: 1.1 * factor})
    assert other.chance(0, 1) == pytest.approx(before)


def test_trials_end_where_they_cost_more_than_they_may_save() -> None:
    same = contenders(1.0, 1.0, within=0.3)
    steady = lambda index: Seen(1.0, 0.5)  # noqa: E731
    assert run(same, steady, training=1.0)[1] == []
    long = len(run(same, steady, training=1e4)[1])
    assert 2 <= len(run(same, steady, training=300.0)[1]) <= long
    # Far behind: never worth a trial.
    outcome, tried = run(contenders(1.0, 1.1, 9.0), steady)
    assert 2 not in tried
    assert outcome.winner in (0, 1)


def test_the_budget_is_kept() -> None:
    for budget in (0.0, 0.9, 1.0, 2.5):
        outcome, tried = run(contenders(1.0, 1.05, 1.1), lambda index: Seen(1.0, 0.5), training=1e6, budget=budget)
        assert len(tried) <= budget / 0.5
        assert outcome.winner is not None
    assert run(contenders(1.0, 1.05), lambda index: Seen(1.0, 0.5), budget=0.0)[0].winner == 0


def test_what_other_programs_spoiled_counts_for_nothing() -> None:
    outcome, tried = run(contenders(1.0, 1.1), lambda index: Seen((5.0, 1.0)[index], 0.5, disturbed=True), training=1e6)
    assert outcome.winner == 0
    assert outcome.disturbed == len(tried) == 6, "three rounds, then no more"
    calls: list[int] = []

    def attempt(index: int) -> Seen:  # the first round is spoiled
        calls.append(index)
        early = len(calls) <= 2
        return Seen(5.0 if early and index == 0 else (1.0, 1.3)[index], 0.5, disturbed=early)

    assert run(contenders(1.0, 1.1), attempt)[0].winner == 0


def test_a_plan_that_fails_is_out() -> None:
    outcome, tried = run(contenders(1.0, 1.1, 1.2), lambda index: Seen(1.0 + index, 0.5, failed=index == 0))
    assert outcome.winner == 1
    assert outcome.failed == (0,)
    assert tried.count(0) == 1
    outcome, _ = run(contenders(1.0, 1.1), lambda index: Seen(took_seconds=0.5, failed=True))
    assert outcome.winner is None


# Whose the cores were


def test_others_are_what_the_cores_did_and_the_trial_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "cores_busy_seconds", lambda: 107.0)
    assert busy.others_cores(100.0, own_seconds=4.0, wall_seconds=2.0) == pytest.approx(1.5)
    assert busy.others_cores(100.0, own_seconds=9.0, wall_seconds=2.0) == 0.0
    assert busy.others_cores(None, own_seconds=1.0, wall_seconds=2.0) == 0.0
    monkeypatch.setattr(busy, "cores_busy_seconds", lambda: None)
    assert busy.others_cores(100.0, own_seconds=1.0, wall_seconds=2.0) == 0.0
    assert Tried(Plan(), others_cores=0.5 * usable_cores()).disturbed
    assert not Tried(Plan(), others_cores=0.05 * usable_cores()).disturbed


def test_busy_cores_are_counted() -> None:
    before = cores_busy_seconds()
    if before is None:
        pytest.skip("the system does not say what its cores do")
    began = time.process_time()
    while time.process_time() - began < 0.2:
        pass
    after = cores_busy_seconds()
    assert after is not None
    assert after - before > 0.1
