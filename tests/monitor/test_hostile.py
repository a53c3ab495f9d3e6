"""Watching goes on whatever stands in event files and folders, and what is shown is still right."""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shardwise.cli.main import _run
from shardwise.monitor import runs as runs_module
from shardwise.monitor.history import Curve
from shardwise.monitor.prometheus import exposition
from shardwise.monitor.runs import Watcher
from shardwise.monitor.server import Hub, _json
from shardwise.monitor.sinks import rows
from shardwise.monitor.state import RunState
from shardwise.monitor.text import render
from shardwise.spec.event import Event
from shardwise.spec.events import CheckpointEvent, EpochEvent, EvaluationEvent, FailureEvent, RestartEvent, SummaryEvent
from shardwise.spec.observations import ExpertsEvent, StallEvent, StragglerEvent, SweepEvent

from .made import finished, ranks_event, run_event, steps_event, write

EVENTS: list[Event] = [
    run_event(),
    steps_event(0),
    ranks_event(0),
    EvaluationEvent(t=1002.0, step=10, split="test", metrics={"accuracy": 0.5}, samples=10, seconds=0.1),
    EpochEvent(t=1002.0, epoch=0, step=10, seconds=1.0, loss_mean=2.0),
    CheckpointEvent(t=1002.0, step=10, path="checkpoints/step-00000010", seconds=0.1),
    RestartEvent(t=1002.0, attempt=1, step=10, reason="killed"),
    ExpertsEvent(t=1002.0, step=10, tokens={"moe": [1, 2]}, dropped={"moe": 0}),
    SweepEvent(t=1002.0, metric="loss", goal="min", trials=4, ended=1, failed=0, running=1, best=0, best_value=0.5, number=0),
    StragglerEvent(t=1002.0, step=10, rank=1, phase="data", cause="core", lost_seconds=0.1, step_seconds=0.2, message="slow"),
    StallEvent(
        t=1002.0, step=10, waited_seconds=9.0, bound_seconds=5.0, what="slow", missing=[1], message="stalled",
        positions=[{"rank": 1, "where": "here", "stack": ["a.py:1"]}],
    ),
    FailureEvent(t=1003.0, message="rank 1 was killed", rank=1),
    SummaryEvent(t=1003.0, summary={"stopped": False}),
]  # fmt: skip
WRONG: list[Any] = [
    None,
    True,
    "x",
    -1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    [],
    [None],
    [[]],
    {},
    {"a": None},
    {"a": ["x"]},
]


def _shown(watcher: Watcher) -> str:
    """All that is made of the runs; nothing of it may raise."""
    states = [run.state for run in watcher.newest_first()]
    console = Console(file=io.StringIO(), width=200)
    for state in states:  # each of them in full
        console.print(render([state, *states], 2000.0))
    exposition(states, 2000.0).encode("utf-8", "backslashreplace")
    _json(Hub(watcher).view()).encode()
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_any_field_may_hold_anything(event: Event, tmp_path: Path) -> None:
    sound = json.loads(event.to_line())
    files = {
        name: [json.dumps({**sound, name: wrong}) for wrong in WRONG]
        for name in ("kind", *(item.name for item in fields(event)))
    }
    files["lines"] = ["[" * 100_000, "", "\x00", json.dumps({**sound, "t": 1e300}), event.to_line()[:-5], '"run"']
    for name, lines in files.items():
        folder = tmp_path / f"field-{name}"
        folder.mkdir()
        (folder / "events.jsonl").write_text(
            "\n".join([run_event().to_line(), *lines, steps_event(10).to_line()]) + "\n"
        )
    found: list[Event] = []
    watcher = Watcher(tmp_path, lambda _, event: found.append(event))
    watcher.poll()
    assert len(watcher.runs) == len(files)
    assert all(run.state.step == 20 for run in watcher.runs.values())
    _shown(watcher)
    for one in found:
        list(rows(one))


def test_names_with_markup_or_strange_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (b"caf\xe9", b"run[bold]", b"<script>alert(1)<"):
        write(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))), finished())  # noqa: PTH118
    write(tmp_path / "a[" / "b]", finished())
    watcher = Watcher(tmp_path)
    watcher.poll()
    names = {"caf\\udce9", "run[bold]", "<script>alert(1)<", "a[/b]"}
    assert set(watcher.runs) == names
    text = _shown(watcher)
    assert all(name in text for name in names)
    assert _run(["watch", str(tmp_path), "--text", "--once"]) == 0
    assert _run(["watch", str(tmp_path), "--json"]) == 0
    assert "run[bold]" in capsys.readouterr().out


def test_of_too_many_runs_the_latest_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "_MOST_RUNS", 3)
    for number in range(6):
        write(tmp_path / f"run-{number}", [run_event()])
        os.utime(tmp_path / f"run-{number}" / "events.jsonl", (number, number))
    watcher = Watcher(tmp_path)
    watcher.poll()
    assert set(watcher.runs) == {"run-3", "run-4", "run-5"}


def test_two_runs_at_once_do_not_change_places(tmp_path: Path) -> None:
    """The page shows the first one in full, so it would jump from one to the other."""
    now = time.time()
    write(tmp_path / "a", [run_event(t=now - 9), steps_event(0, t=now - 5)])
    write(tmp_path / "b", [run_event(t=now - 8), steps_event(0, t=now - 4)])
    write(tmp_path / "c", [run_event(t=now - 3), *finished()[1:]])
    watcher = Watcher(tmp_path)
    watcher.poll()
    assert [run.name for run in watcher.newest_first()] == ["b", "a", "c"]
    with (tmp_path / "a" / "events.jsonl").open("a") as file:
        file.write(steps_event(10, t=now - 1).to_line() + "\n")
    assert watcher.poll()
    assert [run.name for run in watcher.newest_first()] == ["b", "a", "c"]


def test_a_removed_run_is_shown_no_more(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [run_event()])
    write(tmp_path / "b", finished())
    watcher = Watcher(tmp_path)
    watcher.poll()
    for path in (folder / "events.jsonl", folder / "run.json"):
        path.unlink()
        watcher.poll()
        _shown(watcher)
    folder.rmdir()
    assert watcher.poll()
    assert set(watcher.runs) == {"b"}


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b", finished())
    (tmp_path / "a").mkdir()
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    watcher = Watcher(tmp_path)
    watcher.poll()
    assert set(watcher.runs) == {"b"}


def test_what_a_restart_took_back_is_forgotten() -> None:
    state = RunState(path="r")
    for event in (
        run_event(),
        *(steps_event(first) for first in range(0, 30, 10)),
        EpochEvent(epoch=0, step=10, seconds=1.0),
        EvaluationEvent(step=10, split="test", metrics={"accuracy": 0.5}, samples=1, seconds=1.0),
        EpochEvent(epoch=1, step=20, seconds=1.0),
        EvaluationEvent(step=20, split="test", metrics={"accuracy": 0.75}, samples=1, seconds=1.0),
        run_event(first_step=15),
    ):
        state.apply(event)
    assert (state.epoch, state.metrics) == (1, {"accuracy": 0.5})
    assert state.metric_curves["accuracy"].points() == [(9, 0.5, 0.5, 0.5)]
    state.apply(run_event())
    assert (state.epoch, state.metrics) == (0, {})


def test_a_curve_ends_where_the_run_stands() -> None:
    curve = Curve(most=16)
    for step in range(1001):
        curve.add(step, float(step))
    assert curve.points()[-1][0] == 1000


def test_a_run_of_a_newer_version_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "a", [run_event()], end='\n{"v":99,"t":1,"kind":"run"}\n')
    watcher = Watcher(folder)
    watcher.poll()
    assert watcher.runs["a"].state.status() == "unreadable"
    assert "is in event format 99" in Hub(watcher).view()["run"]["error"]
    assert _run(["watch", str(folder), "--text", "--once"]) == 0
    text = capsys.readouterr().out
    assert "unreadable" in text and "event format" in text
