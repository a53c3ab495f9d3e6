"""Watching: what is shown is what the events say, whatever state their file is in."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shardwise.cli.main import _run
from shardwise.errors import FolderError
from shardwise.monitor.history import Curve
from shardwise.monitor.prometheus import exposition
from shardwise.monitor.runs import Watcher, find_runs
from shardwise.monitor.sinks import rows
from shardwise.monitor.state import RunState, differing_settings
from shardwise.monitor.text import headline, render, sparkline
from shardwise.spec.events import FailureEvent, RestartEvent, StepsEvent
from shardwise.spec.observations import StallEvent, StragglerEvent

from .made import finished, ranks_event, run_event, steps_event, write


def _state(*events: object) -> RunState:
    state = RunState(path="r")
    for event in events:
        state.apply(event)  # type: ignore[arg-type]
    return state


def test_a_finished_run_is_summed_up() -> None:
    state = _state(*finished())
    record = state.snapshot()
    assert (record["status"], record["step"], record["total_steps"]) == ("finished", 100, 100)
    assert record["loss"] == pytest.approx(0.02)
    assert record["metrics"] == {"loss": 0.25, "accuracy": 0.9375}
    assert record["samples_per_second"] == pytest.approx(3200)
    assert record["step_seconds"] == pytest.approx(0.01)
    assert record["predicted"] == {"step_seconds": 0.008, "memory_bytes": 1 << 27}
    assert [row["memory_bytes"] for row in record["rank_rows"]] == [1 << 27, 1 << 26]
    assert record["rank_rows"][1]["core_wait"] == pytest.approx(0.1)
    assert record["rank_rows"][0]["step_ms"] == pytest.approx(6.0)
    assert len(record["curves"]["loss"]) == 100
    json.dumps(record, allow_nan=False)


def test_status_of_runs_that_did_not_end() -> None:
    running = _state(run_event(), steps_event(0, t=1001.0))
    assert running.status(1010.0) == "running"
    assert running.status(1100.0) == "silent"
    assert running.left_seconds == pytest.approx(0.9)
    stall = StallEvent(
        t=1010.0, step=10, waited_seconds=9.0, bound_seconds=5.0, what="stopped", missing=[1], message="x", positions=[]
    )
    running.apply(stall)
    assert running.status(1011.0) == "stalled"
    running.apply(steps_event(10, t=1012.0))
    assert running.status(1012.0) == "running"
    running.apply(FailureEvent(t=1013.0, message="rank 1 was killed", rank=1))
    assert (running.status(9999.0), running.message) == ("failed", "rank 1 was killed")
    assert _state().status(0.0) == "empty"


def test_steps_that_were_taken_back_are_forgotten() -> None:
    state = _state(
        run_event(),
        *(steps_event(first, loss=5.0) for first in range(0, 50, 10)),
        RestartEvent(attempt=1, step=20, reason="rank 1 was killed"),
        run_event(first_step=20),
        steps_event(20, loss=1.0),
    )
    assert state.step == 30
    assert [point[1] for point in state.losses.points()] == [5.0] * 20 + [1.0] * 10


def test_losses_of_several_objectives_are_shown_by_name() -> None:
    first = replace(steps_event(0, 3), objectives={"D": [1.0, None, 2.0], "G": [0.5, 0.25, None]})
    state = _state(run_event(), first, replace(steps_event(3, 2), objectives={"G": [None, 4.0]}))
    assert state.objectives == {"D": 2.0, "G": 4.0}
    curves = state.snapshot(0.0, curves=True)["curves"]
    assert [point[:2] for point in curves["loss D"]] == [(0, 1.0), (2, 2.0)]
    assert [point[:2] for point in curves["loss G"]] == [(0, 0.5), (1, 0.25), (4, 4.0)]
    assert any("loss D 2.0000  loss G 4.0000" in line for line in headline(state, 1001.0))
    assert {(row.name, row.step, row.value) for row in rows(first) if row.name.startswith("loss/")} == {
        ("loss/D", 0, 1.0), ("loss/D", 2, 2.0), ("loss/G", 0, 0.5), ("loss/G", 1, 0.25)
    }  # fmt: skip
    assert "shardwise_objective{" in exposition([state], 1001.0)
    state.apply(run_event(first_step=2))
    assert [point[0] for point in state.snapshot(0.0, curves=True)["curves"]["loss D"]] == [0]
    state.apply(replace(steps_event(3, 2), objectives={"G": ["x"]}))  # type: ignore[list-item]
    assert state.malformed == 1 and state.step == 2


def test_a_straggler_that_recovered_is_shown_no_more() -> None:
    straggler = StragglerEvent(step=10, rank=1, phase="backward", cause="waiting", lost_seconds=0.01, step_seconds=0.02)
    slow = [ranks_event(first, slow=0.01) for first in range(0, 80, 10)]
    calm = [ranks_event(first) for first in range(80, 160, 10)]
    assert _state(run_event(), straggler, *slow).straggler is straggler
    assert _state(run_event(), straggler, *slow, *calm).straggler is None


def test_malformed_values_are_counted_and_change_nothing() -> None:
    state = _state(*finished())
    before = state.snapshot(0.0)
    state.apply(StepsEvent(first_step=100, losses=["x"], seconds=[0.01], samples=1))  # type: ignore[list-item]
    state.apply(StepsEvent(first_step=None, losses=3, seconds=[], samples=1))  # type: ignore[arg-type]
    wrong = ranks_event(0)
    state.apply(type(wrong)(**{**vars(wrong), "late_seconds": [0.0]}))
    assert state.malformed == 3
    assert {**state.snapshot(0.0), "malformed": 0} == before


def test_a_growing_torn_replaced_and_vanished_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", [run_event(), steps_event(0)], end='\n{"v":1,"t":1,"kind":"st')
    watcher = Watcher(folder)
    assert watcher.poll()
    state = watcher.runs["r"].state
    assert state.step == 10
    assert not watcher.poll()
    with (folder / "events.jsonl").open("a") as file:
        file.write("\n" + steps_event(10).to_line() + '\n[1]\nnot json\n{"v":1,"t":2,"kind":"unheard of"}\n')
    assert watcher.poll()
    assert (watcher.runs["r"].state.step, watcher.runs["r"].skipped) == (20, 3)
    write(folder, [run_event()])  # shorter: another run took the place
    watcher.poll()
    assert watcher.runs["r"].state.step == 0
    (folder / "events.jsonl").unlink()
    assert not watcher.poll()
    with pytest.raises(FolderError, match="does not exist"):
        Watcher(tmp_path / "nowhere")


def test_runs_of_a_folder_side_by_side(tmp_path: Path) -> None:
    other = run_event(settings={"set.lr": {"value": 0.5, "source": "job"}, "seed": {"value": 0, "source": "default"}})
    write(tmp_path / "a", finished())
    write(tmp_path / "deep" / "b", [other, steps_event(0, t=2000.0)])
    (tmp_path / "a" / "checkpoints" / "x").mkdir(parents=True)
    assert [folder.name for folder in find_runs(tmp_path)] == ["a", "b"]
    watcher = Watcher(tmp_path)
    watcher.poll()
    newest = watcher.newest_first()
    assert [run.name for run in newest] == ["deep/b", "a"]
    assert differing_settings([run.state for run in newest]) == {"set.lr": [0.5, 0.1]}
    console = Console(file=io.StringIO(), width=140)
    console.print(render([run.state for run in newest], 2001.0))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "set.lr=0.5" in text and "set.lr=0.1" in text
    write(tmp_path / "c", [run_event()])
    assert watcher.poll()
    assert set(watcher.runs) == {"a", "deep/b", "c"}


def test_the_command_in_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "r", finished())
    assert _run(["watch", str(folder), "--text"]) == 0
    text = capsys.readouterr().out
    for part in ("finished", "100/100", "accuracy 0.9375", "measured is 1.25 of it", "gradient norm 0.5", "128 MiB"):
        assert part in text, part
    assert _run(["watch", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in record["runs"]] == ["finished"]
    assert _run(["watch", str(tmp_path / "nowhere"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "FolderError"
    assert _run(["watch", str(folder), "--once"]) == 2
    assert _run(["watch", str(folder), "--text", "--port", "8000"]) == 2


def test_a_pipe_is_told_when_a_run_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run writes no event, so nothing would be said of it."""
    folder = write(tmp_path / "r", [run_event(), steps_event(0)])
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            with (folder / "events.jsonl").open("a") as file:
                file.write(finished()[-1].to_line() + "\n")

    monkeypatch.setattr("shardwise.cli.watch.time.sleep", sleep)
    assert _run(["watch", str(folder), "--text"]) == 0
    text = capsys.readouterr().out
    assert text.count("r: silent, no news for") == 1
    assert "s left" not in text  # it stands still


def test_curves_stay_small_and_keep_their_extremes() -> None:
    curve = Curve(most=16)
    for step in range(1000):
        curve.add(step, float(step))
    curve.add(1001, float("nan"))
    points = curve.points()
    assert len(points) <= 16
    assert min(point[2] for point in points) == 0.0
    assert max(point[3] for point in points) == 999.0
    assert points[0][1] == pytest.approx((points[0][2] + points[0][3]) / 2)
    assert sparkline([1.0] * 3) == "▁▁▁"
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([]) == ""


def test_numbers_are_not_broken_over_lines(tmp_path: Path) -> None:
    """In a pipe a line has 80 columns; names give way."""
    write(tmp_path / "a-run-with-a-rather-long-name" / "trials" / "0001", finished())
    write(tmp_path / "b", [run_event(total_steps=123_000, batch_size=1), *finished()[1:]])
    watcher = Watcher(tmp_path)
    watcher.poll()
    console = Console(file=io.StringIO(), width=80)
    console.print(render([run.state for run in watcher.newest_first()], 2001.0))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("100/123,000", "0.0200", "3,200", "data=2", "finished", "accuracy", "0.9375", "10.0"):
        assert words in text, words


def test_a_run_that_has_ended_holds_nobody_up() -> None:
    straggler = StragglerEvent(step=100, rank=1, phase="backward", cause="core", lost_seconds=0.01, step_seconds=0.02)
    *begun, summary = finished()
    state = _state(*begun, straggler)
    assert state.straggler is straggler
    state.apply(summary)
    assert state.straggler is None


def test_much_to_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "r", finished())
    assert _run(["watch", str(folder), "--json"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("shardwise.cli.watch.LARGE_BYTES", 100)
    assert _run(["watch", str(folder), "--json"]) == 0
    answer = capsys.readouterr()
    assert "KiB of events are read first" in answer.err and json.loads(answer.out)
