"""What the numbers of a run say: which time, processor time and memory is a step's, and which is not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardwise
from shardwise.dist.meter import Meter
from shardwise.run.clock import PhaseClock
from shardwise.run.folder import RunFolder
from shardwise.run.record import Recorder, Recording
from shardwise.spec.events import read_events
from shardwise.spec.observations import RanksEvent

DATA = (torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(12, dtype=torch.long))


class Clock:
    """A clock that stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)


def _sums(out: Path) -> tuple[list[RanksEvent], dict[str, float]]:
    events = [event for event in read_events(out / "events.jsonl") if isinstance(event, RanksEvent)]
    return events, {phase: sum(event.phase_seconds[phase][0] for event in events) for phase in events[0].phase_seconds}


def test_what_a_loop_of_ones_own_does_is_no_waiting_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("shardwise.run.clock.perf_counter", clock)
    with shardwise.start(
        model=lambda: nn.Linear(3, 2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=nn.functional.cross_entropy,
        data=DATA,
        batch_size=4,
        epochs=2,
        out=tmp_path / "r",
    ) as run:
        for batch in run.batches():
            clock.now += 1.0  # it prepares something
            run.step(batch)
            clock.now += 2.0  # it writes something down
    events, sums = _sums(tmp_path / "r")
    assert sum(event.timed_steps for event in events) == 6
    assert sums["data"] == sums["forward"] == 0.0
    assert sums["other"] >= 5 * 3.0


def test_each_of_several_steps_on_a_batch_is_a_step(tmp_path: Path) -> None:
    def of(name: str) -> object:
        return lambda model, batch: nn.functional.cross_entropy(getattr(model, name)(batch[0]), batch[1])

    with shardwise.start(
        model=Two,
        optimizer=lambda model: {
            name: torch.optim.SGD(getattr(model, name).parameters(), lr=0.1) for name in ("first", "second")
        },
        objective={"first": of("first"), "second": of("second")},
        data=DATA,
        batch_size=4,
        epochs=2,
        out=tmp_path / "r",
    ) as run:
        for batch in run.batches():
            run.step(batch, "first")
            run.step(batch, "second")
    events, _ = _sums(tmp_path / "r")
    assert sum(event.steps for event in events) == 12
    assert [event.timed_steps for event in events] == [event.steps for event in events]


class Slow(nn.Linear):
    """Takes a second of the processor for each evaluation pass, and none in training."""

    def __init__(self, used: Clock) -> None:
        super().__init__(3, 2)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        self.used.now += 0.0 if self.training else 1.0
        return super().forward(x)


def test_processor_time_of_evaluations_is_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = Clock()
    monkeypatch.setattr(time, "process_time", used)
    with shardwise.start(
        model=lambda: Slow(used),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=nn.functional.cross_entropy,
        data={"train": DATA, "test": DATA},
        batch_size=4,
        epochs=3,
        out=tmp_path / "r",
    ) as run:
        for batch in run.batches():
            run.step(batch)
            before = used.now
            run.evaluate()
            assert used.now > before
    events, _ = _sums(tmp_path / "r")
    assert [event.cpu_seconds for event in events] == [[0.0]] * len(events)


def test_the_parts_of_a_recorded_step_are_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes between two steps is in neither, and no evaluation is in what the machine is asked for."""
    clock, used = Clock(), Clock()
    for module in ("clock", "record"):
        monkeypatch.setattr(f"shardwise.run.{module}.perf_counter", clock)
    monkeypatch.setattr("shardwise.run.record.process_time", used)
    monkeypatch.setattr(time, "process_time", used)
    recorder = Recorder(Recording(0, 0), 0, Meter())
    phases = PhaseClock(torch.device("cpu"), recorder.meter, recorder=recorder)
    for step in range(2):
        phases.begin_step(step)
        for phase in ("data", "forward", "other"):
            clock.now += 1.0
            used.now += 0.5
            phases.mark(phase)
        phases.end_step()
        with phases.away("evaluation"):
            clock.now += 40.0
            used.now += 40.0
        clock.now += 5.0
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(json.dumps({"version": 1, "name": "made", "made": 0.0}))
    recorder.write(RunFolder.open(tmp_path / "r"), peak_memory_bytes=1)
    record = json.loads((tmp_path / "r" / "records" / "rank-00000.json").read_text())
    for row in record["steps"]:
        assert sum(row["busy"].values()) == row["ended"] - row["began"] == 3.0
    first, last = record["machine"][0], record["machine"][-1]
    assert (last[1] - first[1], last[2] - first[2]) == (2 * 3.0 + 2 * 5.0, 2 * 1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the starter's memory")
def test_peak_memory_is_not_that_of_the_process_that_started_it() -> None:
    ballast = b"1" * (800 << 20)
    code = (
        "import torch; from shardwise.run.gauge import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(answer.stdout) < len(ballast) - (100 << 20)
