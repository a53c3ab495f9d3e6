"""Stragglers and bottlenecks: what each rank did decides, and hiccups do not."""

from __future__ import annotations

import pytest

from shardwise.monitor.straggler import WINDOW, Detector, balanced_shares, slowest
from shardwise.spec.event import Event
from shardwise.spec.observations import PHASES, BottleneckEvent, RanksEvent, StragglerEvent

STEPS = 50


STEP = 0.010


def _event(number: int, slow: dict[str, float] | None = None, *, ranks: int = 3, core_wait: float = 0.0) -> RanksEvent:
    """50 steps of 10 ms; `{"backward_1": 0.002}` is 2 ms more a step in the backward pass of rank 1. All others then wait."""
    each = {"data": 0.0005, "forward": 0.002, "backward": 0.003, "optimizer": 0.0005, "other": 0.0005}
    table = {phase: [each.get(phase, 0.0) * STEPS] * ranks for phase in PHASES}
    cpu = [0.006 * STEPS] * ranks
    for name, seconds in (slow or {}).items():
        phase, _, rank = name.partition("_")
        table[phase][int(rank)] += seconds * STEPS
        cpu[int(rank)] += seconds * STEPS
    work = [sum(column) for column in zip(*table.values(), strict=True)]
    table["synchronisation"] = [max(work) - own + 0.001 * STEPS for own in work]
    return RanksEvent(
        first_step=number * STEPS,
        steps=STEPS,
        seconds=STEP * STEPS,
        timed_steps=STEPS,
        phase_seconds=table,
        late_seconds=[(own - min(work)) / STEPS for own in work],
        samples=[16 * STEPS] * ranks,
        sent_bytes=[0] * ranks,
        memory_bytes=[0] * ranks,
        peak_memory_bytes=[0] * ranks,
        cpu_seconds=cpu,
        core_wait_seconds=[core_wait * STEP * STEPS] * ranks,
    )


def _found(events: list[RanksEvent], detector: Detector | None = None) -> list[Event]:
    detector = detector or Detector()
    return [found for event in events for found in detector.update(event)]


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "optimizer"])
def test_the_slow_rank_is_named_with_its_phase_once(phase: str) -> None:
    found = _found([_event(number, {f"{phase}_1": 0.004}) for number in range(12)])
    assert [type(item) for item in found] == [StragglerEvent]
    only = found[0]
    assert isinstance(only, StragglerEvent)
    assert (only.rank, only.phase, only.cause) == (1, phase, "computing")
    assert only.lost_seconds == pytest.approx(0.004)
    assert only.step_seconds == pytest.approx(0.010)
    assert f"rank 1 is slow in {phase}" in only.message
    assert bool(only.shares) == (phase != "optimizer")


def test_a_hiccup_a_small_difference_and_a_single_rank_are_no_stragglers() -> None:
    calm = [_event(number) for number in range(10)]
    hiccup = [*calm[:6], _event(6, {"backward_1": 0.02}), *calm[7:]]
    assert _found(calm) == _found(hiccup) == []
    assert _found([_event(number, {"backward_1": 0.0012}) for number in range(10)]) == []
    alternating = [_event(number, {f"forward_{number % 2}": 0.01}) for number in range(10)]
    assert _found(alternating) == []
    assert _found([_event(number, {"backward_0": 0.02}, ranks=1) for number in range(10)]) == []


def test_what_went_away_is_said_again_when_it_comes_back() -> None:
    slow = [_event(number, {"forward_2": 0.01}) for number in range(8)]
    calm = [_event(number) for number in range(8)]
    assert [type(item) for item in _found([*slow, *calm, *slow])] == [StragglerEvent] * 2


def test_a_rank_that_sleeps_is_told_from_one_that_computes_and_one_without_a_core() -> None:
    def changed(number: int, **values: list[float]) -> RanksEvent:
        event = _event(number, {"backward_0": 0.01})
        return RanksEvent(**{**vars(event), **values})

    asleep = _found([changed(n, cpu_seconds=[0.006 * STEPS] * 3) for n in range(8)])
    no_core = _found([changed(n, cpu_seconds=[0.3] * 3, core_wait_seconds=[0.5, 0.0, 0.0]) for n in range(8)])
    assert [item.cause for item in asleep if isinstance(item, StragglerEvent)] == ["waiting"]
    assert [item.cause for item in no_core if isinstance(item, StragglerEvent)] == ["core"]


def test_a_starved_loader_is_everybodys_bottleneck_and_nobodys_fault() -> None:
    starved = {f"data_{rank}": 0.004 for rank in range(3)}
    found = _found([_event(number, starved) for number in range(10)])
    assert [(type(item), item.what) for item in found if isinstance(item, BottleneckEvent)] == [
        (BottleneckEvent, "data")
    ]
    assert len(found) == 1
    one = _found([_event(number, {"data_0": 0.004, "data_1": 0.004}) for number in range(10)])
    assert not any(isinstance(item, BottleneckEvent) for item in one)


def test_an_oversubscribed_machine_is_named_with_its_cores() -> None:
    events = [_event(number, core_wait=0.3) for number in range(8)]
    found = _found(events, Detector(threads=2, cores=2))
    assert [item.what for item in found if isinstance(item, BottleneckEvent)] == ["cores"]
    assert "3 ranks of 2 threads on 2 cores" in found[0].message  # type: ignore[attr-defined]
    assert "other processes" in _found(events, Detector(threads=1, cores=4))[0].message  # type: ignore[attr-defined]
    assert _found(events, Detector(device="cuda")) == []


def test_shares_follow_the_speed_of_a_sample() -> None:
    event = _event(1, {"backward_1": 0.0055})  # 11 ms a step instead of 5.5 ms
    assert balanced_shares([event]) == pytest.approx([0.4, 0.2, 0.4])
    half = RanksEvent(**{**vars(_event(1)), "samples": [400, 800, 800]})  # as long for half as many samples
    assert balanced_shares([half]) == pytest.approx([0.2, 0.4, 0.4])
    none = RanksEvent(**{**vars(_event(1)), "samples": [0, 800, 800]})
    assert balanced_shares([none]) == pytest.approx([1 / 3] * 3)
    slow = slowest([event] * WINDOW)
    assert slow is not None
    assert slow[:2] == (1, "backward")
    assert slow[2:] == pytest.approx((0.0055, 0.010))
