"""The parts of a sweep by themselves: axes, searches, successive halving, folds."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from shardwise.data.batch import Batch
from shardwise.data.folds import fold
from shardwise.data.loader import batches, eval_batches
from shardwise.data.source import Samples, Splits, Stream
from shardwise.errors import DataError, JobError, UserError
from shardwise.run.hyperparameters import hyper_parameters
from shardwise.tasks.sweep.halving import Course, Unit, parse_stop, rungs_of
from shardwise.tasks.sweep.search import Listed, Search, make_search
from shardwise.tasks.sweep.space import Axis, Setting, all_combinations, parse_over


def _job(lr: float = 0.1, width: int = 2, name: str = "x", deep: bool = False) -> None: ...


PARAMETERS = hyper_parameters(_job)


def over(*texts: str) -> tuple[Axis, ...]:
    return parse_over(texts, PARAMETERS, "job")


def test_axes_are_read_as_they_are_written() -> None:
    assert over("lr=0.1,0.03,0.1")[0].grid() == ("0.1", "0.03")
    assert over("width=1:4")[0].grid() == ("1", "2", "3", "4")
    assert over("lr=0:1:3")[0].grid() == ("0.0", "0.5", "1.0")
    assert over("lr=1e-4:1e-1:log:4")[0].grid() == ("0.0001", "0.001", "0.01", "0.1")
    assert over("width=1:100:log:3")[0].grid() == ("1", "10", "100")
    assert over("deep=true,false")[0].grid() == ("true", "false")
    combinations = all_combinations(over("lr=0.1,0.2", "width=1:2"))
    assert combinations[1] == (("lr", "0.1"), ("width", "2")) and len(combinations) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr", "write NAME="),
        ("lr=", "write NAME="),
        ("speed=1", "no hyper-parameter 'speed'"),
        ("lr=fast", "lr is a number"),
        ("width=1.5,2", "whole number"),
        ("lr=0.3:0.1", "low end comes first"),
        ("lr=0:1:log", "starts above 0"),
        ("lr=a:b", "ends of a range are numbers"),
        ("lr=0.1:1:2:3", "write NAME="),
        ("lr=0.1:1:0", "write NAME="),
    ],
)
def test_wrong_axes_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        over(text)


def test_a_grid_over_real_numbers_needs_points_and_a_name_stands_once() -> None:
    with pytest.raises(UserError, match="number of points"):
        all_combinations(over("lr=0.1:1"))
    with pytest.raises(UserError, match="given twice"):
        over("lr=1", "lr=2")


def test_random_draws_depend_on_seed_trial_and_axis_alone() -> None:
    axes = over("lr=1e-4:1:log", "width=1:8")
    few = make_search("random", axes, trials=3, seed=1, maximize=True)
    many = make_search("random", (axes[1], axes[0]), trials=9, seed=1, maximize=True)
    first = [dict(setting) for setting in iter(few.propose, None) if setting is not None]
    assert first == [dict(setting) for setting in iter(many.propose, None) if setting is not None][:3]
    assert len({text for setting in first for text in setting.values()}) > 3
    other = make_search("random", axes, trials=3, seed=2, maximize=True)
    assert dict(other.propose() or ()) != first[0]
    values = [float(axes[0].draw(random.Random(number).random())) for number in range(500)]
    assert all(1e-4 <= value <= 1 for value in values)
    assert 0.4 < sum(value < 1e-2 for value in values) / 500 < 0.6  # even over the logarithm
    assert {axes[1].draw(number / 100) for number in range(100)} == {str(width) for width in range(1, 9)}


def _run(course: Course, value_of: dict[int, list[float | None]], order: random.Random) -> list[Unit]:
    """Let the units of a course end in any order that real workers may have; all that were run."""
    ended: dict[Unit, float | None] = {}
    running = course.advance(ended)
    ran = list(running)
    while running:
        unit = running.pop(order.randrange(len(running)))
        ended[unit] = value_of[unit.trial][unit.rung]
        new = course.advance(ended)
        running += new
        ran += new
    assert not course.busy
    return sorted(ran, key=lambda unit: (unit.trial, unit.rung))


def _numbers(count: int) -> Listed:
    return Listed([(("lr", str(number)),) for number in range(count)])


def test_halving_takes_the_same_decisions_in_any_order_of_ends() -> None:
    chance = random.Random(3)
    values: dict[int, list[float | None]] = {
        number: [chance.random() for _ in range(3)] if number != 5 else [None] * 3 for number in range(27)
    }
    seen = []
    for order in range(5):
        course = Course(_numbers(27), (1, 3, 9), eta=3, lanes=4, maximize=True)
        seen.append((_run(course, values, random.Random(order)), [trial.number for trial in course.best_first()]))
    assert all(one == seen[0] for one in seen)
    ran = seen[0][0]
    by_rung = [{unit.trial for unit in ran if unit.rung == rung} for rung in range(3)]
    assert len(by_rung[0]) == 27
    assert 9 <= len(by_rung[1]) <= 14 and 3 <= len(by_rung[2]) <= 6
    assert 5 not in by_rung[1]  # what failed is not promoted
    # The best third of the first rung is all there; early promotions of others are the price of not waiting.
    ranked = sorted((number for number in range(27) if number != 5), key=lambda number: -(values[number][0] or 0))
    assert set(ranked[:9]) <= by_rung[1]


def test_halving_minimizes_and_always_finishes_one() -> None:
    course = Course(_numbers(2), (1, 4), eta=3, lanes=8, maximize=False)
    ran = _run(course, {0: [0.5, 0.4], 1: [0.3, 0.2]}, random.Random(0))
    assert ran == [Unit(0, 0), Unit(1, 0), Unit(1, 1)]
    assert [trial.number for trial in course.best_first()] == [1, 0]


def test_without_rungs_every_trial_runs_once() -> None:
    course = Course(_numbers(5), (7,), eta=2, lanes=5, maximize=True)
    assert _run(course, {number: [float("nan") if number == 2 else 1.0] for number in range(5)}, random.Random(0)) == [
        Unit(number, 0) for number in range(5)
    ]
    assert [trial.number for trial in course.best_first()] == [0, 1, 3, 4]


def test_rungs_and_their_words() -> None:
    assert rungs_of(15, eta=3, least=1) == (1, 3, 9, 15)
    assert rungs_of(9, eta=3, least=3) == (3, 9)
    assert parse_stop("asha") == (3, 1) and parse_stop("asha:eta=4,min=2") == (4, 2) and parse_stop(None) is None
    for text in ("median", "asha:speed=2", "asha:eta=x"):
        with pytest.raises(UserError, match="asha"):
            parse_stop(text)
    with pytest.raises(UserError, match="min=5"):
        rungs_of(5, eta=3, least=5)
    with pytest.raises(UserError, match="eta=1"):
        rungs_of(5, eta=1, least=1)


def test_tpe_proposes_the_same_whatever_the_order_of_ends() -> None:
    pytest.importorskip("optuna", reason="TPE needs Optuna: pip install 'shardwise[sweep]'")
    axes = over("lr=1e-4:1:log", "width=1:8", "name=a,b")

    def propose(order: int) -> list[Setting]:
        search: Search = make_search("tpe", axes, trials=16, seed=4, maximize=False)
        course = Course(search, (1,), eta=2, lanes=4, maximize=False)
        ended: dict[Unit, float | None] = {}
        running, chance = course.advance(ended), random.Random(order)
        while running:
            unit = running.pop(chance.randrange(len(running)))
            setting = dict(course.trials[unit.trial].setting)
            ended[unit] = abs(float(setting["lr"]) - 0.1) if setting["name"] == "a" else None
            running += course.advance(ended)
        return [trial.setting for trial in course.trials]

    first = propose(0)
    assert len(first) == 16 and len(set(first)) > 10
    assert all(propose(order) == first for order in (1, 2))


def numbers_in(read: Iterable[Batch]) -> list[float]:
    found: list[float] = []
    for batch in read:
        assert isinstance(batch.inputs, torch.Tensor)
        found += batch.inputs.flatten().tolist()
    return found


def test_folds_are_parts_of_the_training_split() -> None:
    inputs = torch.arange(103).float()[:, None]
    seen = []
    for number in range(4):
        splits = fold({"train": (inputs, inputs), "test": (inputs[:3] + 1000, inputs[:3])}, number, 4, seed=1)
        assert splits.test is not None
        left_out = numbers_in(eval_batches(splits.test, batch_size=9))
        trained = numbers_in(batches(splits.train, batch_size=9, seed=0, epoch=0))
        assert sorted(left_out + trained) == list(range(103))
        assert len(left_out) in (25, 26)
        seen += left_out
    assert sorted(seen) == list(range(103))
    again = fold((inputs, inputs), 0, 4, seed=2).test
    assert again is not None
    other = numbers_in(eval_batches(again, batch_size=200))
    assert other != seen[: len(other)]


def test_folds_of_data_sets_and_of_folds() -> None:
    numbers = np.arange(20, dtype=np.float32)[:, None]
    dataset = TensorDataset(torch.from_numpy(numbers), torch.from_numpy(numbers), torch.from_numpy(numbers))
    outer = fold(Splits(Samples(dataset)), 1, 5)
    assert outer.train.length == 16 and outer.test is not None and outer.test.length == 4
    inner = fold(fold((numbers, numbers), 1, 5), 0, 4)
    assert inner.train.length == 12


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match="3 folds of 2 samples"):
        fold((torch.ones(2, 1), torch.ones(2, 1)), 0, 3)
    with pytest.raises(JobError, match="no numbered samples"):
        fold(Splits(Stream(lambda: iter([torch.ones(1)]))), 0, 3)
    with pytest.raises(JobError, match="fold 3 of 3"):
        fold((torch.ones(9, 1), torch.ones(9, 1)), 3, 3)
