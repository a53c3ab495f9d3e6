"""Events: what is written is read back, by any reader, whatever was torn, and the training never notices."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import FolderError
from shardwise.run.eventlog import EventLog
from shardwise.spec.events import (
    KINDS,
    CheckpointEvent,
    EpochEvent,
    EvaluationEvent,
    Event,
    EventReader,
    FailureEvent,
    RestartEvent,
    RunEvent,
    StepsEvent,
    SummaryEvent,
    WarningEvent,
    parse_line,
    read_events,
)
from shardwise.spec.observations import (
    BalanceEvent,
    BottleneckEvent,
    ExpertsEvent,
    RanksEvent,
    RecoveryEvent,
    StallEvent,
    StragglerEvent,
    SweepEvent,
    TraceEvent,
)

EVENTS: list[Event] = [
    RunEvent(
        t=1.0,
        name="digits",
        settings={"lr": {"value": 0.1, "source": "job"}},
        plan={"layout": "data=2"},
        versions={"torch": "2.13.0"},
        host="here",
        ranks=2,
        total_steps=10,
    ),
    StepsEvent(t=2.0, first_step=3, losses=[2.5, 0.125], seconds=[0.5, 1.0], samples=200, phase_seconds={"data": 0.25}),
    EpochEvent(t=3.0, epoch=0, step=5, seconds=1.5, loss_mean=None),
    EvaluationEvent(t=4.0, step=5, split="test", metrics={"accuracy": 0.5}, samples=10, seconds=0.5),
    CheckpointEvent(t=5.0, step=5, path="checkpoints/step-00000005", seconds=0.5, bytes=1234),
    RestartEvent(t=6.0, attempt=1, step=5, reason="rank 1 was killed"),
    WarningEvent(t=7.0, message="ünïcode\nand a line end"),
    SummaryEvent(t=8.0, summary={"run": "runs/x", "loss": 0.5, "nested": [1, {"a": None}]}),
    FailureEvent(t=9.0, message="rank 1 failed", rank=1, details="Traceback"),
    RanksEvent(
        t=10.0,
        first_step=3,
        steps=2,
        seconds=0.5,
        timed_steps=2,
        phase_seconds={"data": [0.125, 0.25]},
        late_seconds=[0.0, 0.25],
        samples=[100, 100],
        sent_bytes=[8, 8],
        memory_bytes=[1 << 20, 1 << 21],
        peak_memory_bytes=[1 << 20, 1 << 21],
        cpu_seconds=[0.5, 0.25],
        core_wait_seconds=[0.0, 0.125],
    ),
    ExpertsEvent(t=11.0, step=5, tokens={"moe": [3, 4]}, dropped={"moe": 1}),
    StragglerEvent(
        t=12.0, step=5, rank=1, phase="data", cause="core", lost_seconds=0.25, step_seconds=0.5, shares=[0.75, 0.25]
    ),
    BottleneckEvent(t=13.0, step=5, what="data", share=0.5, message="slow"),
    StallEvent(
        t=14.0,
        step=5,
        waited_seconds=20.0,
        bound_seconds=5.0,
        what="stopped",
        missing=[1],
        message="rank 1 is stopped",
        positions=[{"rank": 0, "stack": ["a.py:1 in f"]}],
    ),
    RecoveryEvent(t=15.0, step=6, waited_seconds=21.5),
    BalanceEvent(t=16.0, step=6, shares=[0.75, 0.25], samples=[9, 3]),
    TraceEvent(t=17.0, first_step=2, steps=3, path="traces/steps-2-4.json"),
    SweepEvent(
        t=18.0,
        metric="accuracy",
        goal="max",
        trials=4,
        ended=1,
        failed=0,
        running=2,
        best=3,
        best_value=0.5,
        best_setting={"lr": "0.1"},
        left_seconds=12.5,
        number=3,
        setting={"lr": "0.1"},
        value=0.5,
        trained=2,
        state="paused",
    ),
]


def test_every_kind_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for event in EVENTS:
            log.write(event)
    assert log.dropped == 0
    assert read_events(path) == EVENTS
    assert {event.kind for event in EVENTS} == set(KINDS)
    assert len(path.read_text().splitlines()) == len(EVENTS)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert record["v"] == 1
        assert {"t", "kind"} <= set(record)


def test_numbers_are_short_and_losses_keep_what_float32_resolves(tmp_path: Path) -> None:
    line = StepsEvent(first_step=0, losses=[2.3025850929940455], seconds=[0.01234567], samples=1).to_line()
    record = json.loads(line)
    assert record["losses"] == [2.302585]
    assert record["seconds"] == [0.01235]
    record = json.loads(StepsEvent(first_step=0, losses=[1.2345678e-12], seconds=[100.0], samples=1).to_line())
    assert record["losses"] == [1.234568e-12]


def test_numbers_json_lacks() -> None:
    event = StepsEvent(first_step=0, losses=[math.nan, math.inf, -math.inf], seconds=[1.0] * 3, samples=3)
    line = event.to_line()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = parse_line(line)
    assert isinstance(back, StepsEvent)
    assert math.isnan(back.losses[0])
    assert back.losses[1:] == [math.inf, -math.inf]


def test_ten_thousand_steps_take_less_than_a_megabyte(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    phases = dict.fromkeys(("data", "forward", "backward", "synchronisation", "optimizer"), 0.0123456789)
    with EventLog(path) as log:
        for first in range(0, 10_000, 10):
            losses = [1 / (1 + step) for step in range(first, first + 10)]
            seconds = [0.0123456789 + step / 1e6 for step in range(10)]
            log.write(StepsEvent(first_step=first, losses=losses, seconds=seconds, samples=1000, phase_seconds=phases))
    assert path.stat().st_size < 1_000_000
    events = read_events(path)
    assert sum(len(event.losses) for event in events if isinstance(event, StepsEvent)) == 10_000


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert reader.poll() == []  # no file yet
    lines = [event.to_line().encode() + b"\n" for event in EVENTS]
    path.write_bytes(lines[0] + lines[1][:-20])
    assert reader.poll() == EVENTS[:1]
    assert reader.poll() == []
    with path.open("ab") as file:
        file.write(lines[1][-20:] + lines[2])
    assert reader.poll() == EVENTS[1:3]
    assert reader.skipped == 0


def test_a_resumed_run_appends_and_a_line_torn_before_is_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write(EVENTS[0])
    with path.open("ab") as file:
        file.write(EVENTS[1].to_line().encode()[:30])
    with EventLog(path) as log:
        log.write(EVENTS[5])
        log.write(EVENTS[6])
    reader = EventReader(path)
    assert reader.poll() == [EVENTS[0], EVENTS[5], EVENTS[6]]
    assert reader.skipped == 1


def test_unknown_kinds_and_fields_are_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    known = json.loads(EVENTS[1].to_line())
    lines = [{"v": 1, "t": 1, "kind": "of the future", "x": 1}, {**known, "new_field": [1]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_events(path) == [EVENTS[1]]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(EVENTS[0].to_line() + '\n{"v":2,"t":1,"kind":"run"}\n')
    with pytest.raises(
        FolderError, match=r"events\.jsonl line 2 is in event format 2, and this shardwise reads up to 1"
    ):
        read_events(path)


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '"x"', "{}", '{"v":"1","t":1}', '{"v":1,"kind":"steps","t":1}', "\x00"]
)
def test_lines_that_are_no_events_are_counted(line: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line + "\n" + EVENTS[0].to_line() + "\n")
    reader = EventReader(path)
    assert reader.poll() == EVENTS[:1]
    assert reader.skipped == 1


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="does not exist"):
        read_events(tmp_path / "events.jsonl")


def test_a_place_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "shardwise"):
        log = EventLog(tmp_path / "nowhere" / "events.jsonl")
        for event in EVENTS:
            log.write(event)
        log.close()
    assert log.dropped == len(EVENTS)
    assert len(caplog.records) == 1
    assert "events are being lost" in caplog.text


def test_a_full_disk_drops_events_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The limit of the process on file sizes stands for the disk: it cuts a write short, then refuses the next."""
    path = tmp_path / "events.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = EventLog(path)
    try:
        with caplog.at_level(logging.WARNING, "shardwise"):
            log.write(EVENTS[1])
            size = path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
            log.write(EVENTS[1])  # takes 50 bytes
            log.write(EVENTS[1])  # takes none
            assert path.stat().st_size == size + 50
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            log.write(EVENTS[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
        log.close()
    assert log.dropped == 2
    assert len(caplog.records) == 1
    reader = EventReader(path)
    assert reader.poll() == [EVENTS[1], EVENTS[2]]
    assert reader.skipped == 1


def test_what_json_lacks_never_reaches_the_training(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    odd: dict[Any, Any] = {"path": Path("x"), 3: {1, 2}, "surrogate": "\ud800"}
    with EventLog(path) as log:
        log.write(SummaryEvent(summary=odd))
        log.write(EVENTS[0])
    assert read_events(path)[-1] == EVENTS[0]


def test_two_writers_never_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            try:
                with EventLog(path) as log:
                    for attempt in range(200):
                        log.write(RestartEvent(attempt=attempt, step=number, reason="x" * (1 + 37 * number)))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    events = read_events(path)
    assert len(events) == 400
    for number in range(2):
        mine = [event.attempt for event in events if isinstance(event, RestartEvent) and event.step == number]
        assert mine == list(range(200))


def test_every_field_is_documented() -> None:
    for cls in KINDS.values():
        assert cls.__doc__
        for item in fields(cls):
            assert item.name == "t" or item.name in cls.__doc__ or cls is WarningEvent, f"{cls.__name__}.{item.name}"
