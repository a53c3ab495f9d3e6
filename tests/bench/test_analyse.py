"""From readings to cases: speed-ups round by round, the account of lost time, and which loss is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardwise.bench.analyse import Context, Measurement, judge, make_cases
from shardwise.bench.cases import Wanted
from shardwise.bench.command import _doubts
from shardwise.bench.compare import compare, comparison_lines
from shardwise.bench.execute import Attempt
from shardwise.bench.known import Known
from shardwise.bench.reading import RankReading, Reading, _parts, read_run
from shardwise.bench.result import PARTS, Bench, Case, Course, Spread
from shardwise.bench.text import heading, result_lines
from shardwise.bench.why import crowd_remark, find_losses
from shardwise.spec.plan import Plan, Prediction

CORES = 2


def rank_reading(*, slowest: float = 0.5, late: float = 0.0, queue: float = 0.0, **milliseconds: float) -> RankReading:
    seconds = {part: milliseconds.get(part, 0.0) / 1000 for part in PARTS}
    return RankReading(
        seconds=seconds, late_seconds=late, slowest=slowest, core_seconds=sum(seconds.values()), queue_seconds=queue
    )


def reading(*ranks: RankReading, metrics: dict[str, float] | None = None) -> Reading:
    step = max(sum(rank.seconds.values()) for rank in ranks)
    return Reading(
        step_seconds=step,
        step_low_seconds=0.9 * step,
        step_high_seconds=1.2 * step,
        steady_steps=50,
        first_step_at=102.0,
        ranks=list(ranks),
        peak_memory_bytes=[2**20] * len(ranks),
        traffic_bytes=4096.0 * (len(ranks) - 1),
        payload_bytes=4096 * (len(ranks) - 1),
        metrics=metrics or {},
        timeline=[],
        course=Course(losses=[2.0, 1.0], seconds=[0.1, 0.2], samples=[64, 128]),
    )


def measured(layout: str, *runs: Reading, threads: int = 1, seconds: float = 10.0, **changes: Any) -> Measurement:
    plan = Plan.from_dict({"layout": layout, "threads": threads})
    wanted = replace(Wanted(name=str(plan), plan=plan, batch_size=64), **changes)
    found = Measurement(wanted=wanted)
    for number, run in enumerate(runs):
        attempt = Attempt(outcome="done", reason="", details="", started=100.0, seconds=seconds)
        found.rounds[number] = (attempt, run)
    return found


NOTHING = Known(facts=None, machine=None)
ALONE = reading(rank_reading(forward=4, backward=5, optimizer=1))


def cases(*others: Measurement, price: float | None = None) -> list[Case]:
    found = [measured("serial", ALONE), *others]
    context = Context(device="cpu", cores=CORES, price=price, steps_per_epoch=100, known=NOTHING)
    return make_cases(found, found[0].wanted.name, context)


def kinds(case: Case, alone: Case) -> list[str]:
    return [finding.kind for finding in find_losses(case, alone, cores=CORES, device="cpu")]


def test_lost_time_adds_up_to_the_whole_loss() -> None:
    two = reading(
        rank_reading(forward=3, backward=3, communication=2, optimizer=1, other=1),
        rank_reading(forward=3.5, backward=3.5, waiting=0.5, communication=0.5, optimizer=1, other=1),
    )
    alone, both = cases(measured("data=2", two), price=3.6)
    assert both.speedup is not None and both.efficiency is not None
    assert both.speedup.median == pytest.approx(1.0)
    assert both.efficiency.median == pytest.approx(0.5)
    assert sum(both.lost_seconds.values()) == pytest.approx(0.010 - 0.010 / 2)
    assert both.lost_seconds["optimizer"] == pytest.approx(0.0005)
    assert sum(alone.lost_seconds.values()) == pytest.approx(0)
    assert both.cost_per_epoch == pytest.approx(3.6 * 2 * 0.010 * 100 / 3600)
    assert both.traffic_bytes == 4096


def test_speed_ups_are_of_the_same_round() -> None:
    """Where the machine becomes twice as slow in the second round, ratios stay what they are."""
    slow = reading(rank_reading(forward=8, backward=10, optimizer=2))
    half = reading(*[rank_reading(forward=2, backward=2.5, optimizer=0.5)] * 2)
    half_slow = reading(*[rank_reading(forward=4, backward=5, optimizer=1)] * 2)
    found = [measured("serial", ALONE, slow), measured("data=2", half, half_slow)]
    context = Context(device="cpu", cores=2, price=None, steps_per_epoch=None, known=NOTHING)
    _, both = make_cases(found, found[0].wanted.name, context)
    assert both.speedup is not None and both.step_seconds is not None
    assert both.speedup.low == pytest.approx(2) and both.speedup.high == pytest.approx(2)
    assert both.step_seconds.high == pytest.approx(2 * both.step_seconds.low)
    assert both.mfu is both.cost_per_epoch is both.flops_per_second is None


def test_the_fastest_one_worker_run_is_the_baseline() -> None:
    threaded = reading(rank_reading(forward=40, backward=50, optimizer=10))
    found = [
        measured("serial", threaded, threads=2),
        measured("serial", ALONE),
        measured("data=2", reading(*[rank_reading(forward=5)] * 2)),
    ]
    context = Context(device="cpu", cores=2, price=None, steps_per_epoch=None, known=NOTHING)
    first, second, _ = make_cases(found, found[1].wanted.name, context)
    assert first.speedup is not None and first.speedup.median == pytest.approx(0.1)
    assert second.speedup is not None and second.speedup.median == pytest.approx(1.0)


def test_weak_scaling_compares_samples() -> None:
    two = reading(*[rank_reading(forward=4, backward=5, optimizer=1, communication=2)] * 2)
    _, weak = cases(measured("data=2", two, scaling="weak", batch_size=128))
    assert weak.speedup is not None and weak.speedup.median == pytest.approx(2 * 10 / 12)
    assert weak.efficiency is not None and weak.efficiency.median == pytest.approx(10 / 12)
    assert sum(weak.lost_seconds.values()) == pytest.approx(0.002)
    assert weak.metrics == [] and weak.break_even_steps is None


def test_a_slow_rank_is_named_with_its_phase() -> None:
    slow = rank_reading(slowest=0.98, late=0.01, forward=2, backward=14, optimizer=1)
    fast = rank_reading(slowest=0.02, forward=2, backward=2.5, optimizer=1, waiting=11, communication=0.5)
    alone, both = cases(measured("data=2", reading(fast, slow)))
    finding = find_losses(both, alone, cores=CORES, device="cpu")[0]
    assert finding.kind == "slow rank"
    assert "rank 1 is slower" in finding.message and "backward pass" in finding.message
    assert "10.0 ms late" in finding.message


def test_what_a_slow_rank_loses_is_not_told_twice() -> None:
    """It sleeps in its forward pass: nothing is wrong with the size of its batch."""
    slow = rank_reading(slowest=1.0, late=0.008, forward=10, backward=2.5, optimizer=0.5)
    fast = rank_reading(slowest=0.0, forward=2, backward=2.5, optimizer=0.5, waiting=7, communication=1)
    alone, both = cases(measured("data=2", reading(fast, slow)))
    assert kinds(both, alone) == ["slow rank", "communication"]
    said = find_losses(both, alone, cores=CORES, device="cpu")[1].message
    assert "4.50 ms of compute for 500 us of communication" in said


def test_a_plan_that_died_after_a_round_is_told() -> None:
    died = measured("data=2", reading(*[rank_reading(forward=5)] * 2))
    died.failed = ("failed", "rank 1 was killed\nby signal 9", "")
    assert any(
        "data=2 threads=1 failed after 1 round" in said and "rank 1 was killed" in said
        for said in _doubts(cases(died), "cpu")
    )


def test_an_uneven_pipeline_is_told_as_one() -> None:
    long, short = rank_reading(slowest=0.9, backward=8, bubble=1), rank_reading(slowest=0.1, backward=5, bubble=4)
    alone, both = cases(measured("pipeline=2", reading(short, long)))
    found = {finding.kind: finding.message for finding in find_losses(both, alone, cores=CORES, device="cpu")}
    assert "stage of rank 1 has 3.00 ms more work" in found["slow rank"]
    assert "stage of rank 0 waits" in found["bubble"]


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ((0.004, 0.005), "times as fast as one worker"),
        ((0.009, 0.012), "no plan is faster than one worker in every round"),
        ((0.02, 0.03), "no plan beats one worker"),
    ],
)
def test_the_heading_promises_only_what_every_round_shows(rounds: tuple[float, float], said: str) -> None:
    runs = [reading(*[rank_reading(forward=1000 * step)] * 2) for step in rounds]
    found = [measured("serial", ALONE, ALONE), measured("data=2", *runs)]
    context = Context(device="cpu", cores=2, price=None, steps_per_epoch=None, known=NOTHING)
    assert said in heading(replace(bench(0.005), cases=make_cases(found, found[0].wanted.name, context)))


def test_a_rank_that_is_last_by_chance_is_not_named() -> None:
    ranks = [rank_reading(slowest=0.5, forward=2, backward=4, optimizer=1, waiting=2)] * 2
    alone, both = cases(measured("data=2", reading(*ranks)))
    assert "jitter" in kinds(both, alone) and "slow rank" not in kinds(both, alone)


@pytest.mark.parametrize(
    ("kind", "part", "words"),
    [
        ("data", "data", "loader_workers"),
        ("communication", "communication", "larger batch"),
        ("bubble", "bubble", "micro-batches"),
        ("optimizer", "optimizer", "shard"),
        ("other", "other", "larger batch"),
        ("compute", "forward", "larger batch"),
    ],
)
def test_the_largest_loss_comes_first_with_what_reduces_it(kind: str, part: str, words: str) -> None:
    milliseconds = {"forward": 2.0, "backward": 2.5, "optimizer": 0.5}
    milliseconds[part] = milliseconds.get(part, 0.0) + 8
    alone, both = cases(measured("data=2", reading(*[rank_reading(**milliseconds)] * 2)))
    first = find_losses(both, alone, cores=CORES, device="cpu")[0]
    assert first.kind == kind
    assert words in first.advice


def test_an_oversubscribed_machine_is_told_before_what_it_causes() -> None:
    ranks = [rank_reading(forward=8, backward=10, optimizer=2, communication=5, queue=0.012)] * 4
    alone, four = cases(measured("data=4", reading(*ranks)))
    first = find_losses(four, alone, cores=CORES, device="cpu")[0]
    assert first.kind == "cores"
    assert "oversubscribed" in first.message and "4 x 1 thread on 2 cores" in first.message
    busy = [rank_reading(forward=8, backward=10, queue=0.009)] * 2
    alone, two = cases(measured("data=2", reading(*busy)))
    assert "cores" not in kinds(two, alone)  # two threads on two cores: others are to blame, and not the plan
    assert "other programs used this machine" in crowd_remark([alone, two], CORES) and not crowd_remark(
        [alone, four], CORES
    )


def test_a_good_plan_has_nothing_to_tell() -> None:
    alone, both = cases(measured("data=2", reading(*[rank_reading(forward=2, backward=2.5, optimizer=0.5)] * 2)))
    assert kinds(both, alone) == []


def test_start_up_that_pays_only_after_some_steps() -> None:
    two = reading(*[rank_reading(forward=2, backward=2.5, optimizer=0.5)] * 2)
    later = replace(two, first_step_at=103.0)
    _, both = cases(measured("data=2", later))
    assert both.break_even_steps == 200  # a second, in steps that save 5 ms each


@pytest.mark.parametrize(
    ("value", "other", "verdict"),
    [(0.9, (0.91, 0.88), "same"), (0.7, (0.91, 0.88), "differs"), (0.9, (0.9,), "unknown")],
)
def test_metrics_are_held_against_the_noise_of_seeds(value: float, other: tuple[float, ...], verdict: str) -> None:
    serial = [replace(ALONE, metrics={"accuracy": one}) for one in other]
    two = reading(*[rank_reading(forward=2)] * 2, metrics={"accuracy": value})
    found = [measured("serial", *serial), measured("data=2", *[two] * len(other))]
    context = Context(device="cpu", cores=2, price=None, steps_per_epoch=None, known=NOTHING)
    _, both = make_cases(found, found[0].wanted.name, context)
    assert [metric.verdict for metric in both.metrics] == [verdict]


def test_judge() -> None:
    assert judge(0.0, 0.0) == "same"
    assert judge(0.1, 0.05) == "differs"
    assert judge(0.1, None) == "unknown"


def test_parts_of_a_step_add_up_to_it() -> None:
    row = {
        "began": 1.0,
        "ended": 1.010,
        "busy": {"data": 0.001, "forward": 0.002, "backward": 0.003, "synchronisation": 0.0005, "optimizer": 0.001},
        "waited": {"collective": 0.002, "message": 0.0},
    }
    cpu, gpu = _parts(row, 0.0015, "cpu"), _parts(row, 0.0015, "cuda")
    assert sum(cpu.values()) == pytest.approx(0.010) == sum(gpu.values())
    assert cpu["waiting"] == pytest.approx(0.0015) and cpu["communication"] == pytest.approx(0.0005)
    assert cpu["other"] == pytest.approx(0.001)
    assert gpu["communication"] == pytest.approx(0.001)


def bench(step: float, name: str = "rows") -> Bench:
    plan = Plan.from_dict({"layout": "data=2", "threads": 1})
    predicted = replace(plan, prediction=Prediction(step_seconds=0.004, memory_bytes=2**20))
    half = reading(*[rank_reading(forward=step * 500, backward=step * 500)] * 2)
    found = cases(measured("data=2", half, plan=predicted), measured("tensor=2", refused="not for this model"))
    return Bench(
        job=name,
        origin=name,
        settings={"batch_size": "64"},
        device="cpu",
        machine={"cores": "2", "processor": "any"},
        baseline=found[0].name,
        one_unit=found[0].name,
        steps=50,
        warm_up=10,
        rounds=2,
        target=None,
        price=None,
        steps_per_epoch=100,
        began=0.0,
        seconds=1.0,
        cases=found,
    )


def test_result_survives_json_and_says_everything() -> None:
    first = bench(0.005)
    again = Bench.from_dict(first.to_dict())
    assert again == first
    text = "\n".join(result_lines(again))
    for words in (
        "data=2 is 2.00 (2.00-2.00 over the rounds) times as fast",
        "refused: not for this model",
        "predicted 4.00 ms a step (-20%)",
        "4.00 KiB sent",
    ):
        assert words in text, words


def test_comparison_counts_what_lies_outside_of_the_spread() -> None:
    verdicts = {
        step: {pair.name: pair.verdict for pair in compare(bench(0.005), bench(step)).pairs}["data=2 threads=1"]
        for step in (0.004, 0.005, 0.006)
    }
    assert verdicts == {0.004: "faster", 0.005: "no difference", 0.006: "slower"}
    other = compare(bench(0.005), bench(0.005, name="columns"))
    assert any("different trainings" in sentence for sentence in other.differences)
    assert "A over B" in "\n".join(comparison_lines(other))


def test_spread() -> None:
    assert Spread.of([]) is None
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread == Spread(2.0, 1.0, 3.0, 3)
    assert math.isclose(spread.median, 2.0)


def test_a_run_of_few_steps_and_long_evaluations_is_read_right(tmp_path: Path) -> None:
    """The 10th percentile is no number below all steps, and a core is never busy for more than all of a step."""
    walls = [1.0, 1.0, 0.1, 1.0]
    steps, now = [], 0.0
    for wall in walls:
        row = {"began": now, "ended": now + wall, "busy": {"forward": wall}, "waited": {}, "arrived": None}
        steps.append({**row, "traffic_bytes": 0, "payload_bytes": 0})
        now += wall + 10.0  # an evaluation after each step
    machine = [[row["began"], index * 2.0, index * 2.0, 0.0] for index, row in enumerate(steps)]
    (tmp_path / "records").mkdir()
    (tmp_path / "run.json").write_text('{"version": 1, "name": "made"}')
    (tmp_path / "events.jsonl").touch()
    (tmp_path / "records" / "rank-00000.json").write_text(json.dumps({"steps": steps, "machine": machine}))
    found = read_run(tmp_path, ranks=1, warm_up=2, device="cpu")
    assert 0.1 <= found.step_low_seconds <= found.step_high_seconds <= 1.0
    assert found.ranks[0].core_seconds == pytest.approx(found.step_seconds)
