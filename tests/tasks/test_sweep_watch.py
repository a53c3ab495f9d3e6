"""A sweep's folder is a run folder: `shardwise watch` shows the sweep, and beside it its trainings."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shardwise.cli.main import shardwise
from shardwise.monitor.runs import find_runs
from shardwise.spec.events import read_events
from shardwise.spec.observations import SweepEvent
from shardwise.tasks.sweep.log import SweepLog
from shardwise.tasks.sweep.settle import SweepOptions
from shardwise.tasks.sweep.sweep import run_sweep

JOB = """
import time
import torch
from torch import nn
import shardwise


def small(lr: float = 0.1, fail: bool = False, pause: float = 0.0) -> shardwise.Job:
    if fail:
        raise ValueError("this one cannot be built")
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))

    def loss(output, target):
        time.sleep(pause)
        return nn.functional.cross_entropy(output, target)

    targets = (inputs.sum(1) > 0).long()
    return shardwise.Job(
        model=lambda: nn.Linear(5, 2),
        data={"train": (inputs, targets), "test": (inputs, targets)},
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        batch_size=20,
        epochs=3,
        metrics={"accuracy": shardwise.metrics.accuracy},
    )
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "job_of_watched_sweep.py"
    path.write_text(JOB)
    return str(path)


def watched(place: Path) -> dict[str, Any]:
    answer = CliRunner().invoke(shardwise, ["watch", str(place), "--json"])
    assert answer.exit_code == 0, answer.output
    document: dict[str, Any] = json.loads(answer.stdout)
    return document


def test_watch_shows_the_sweep_and_its_trainings(job: str, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "sweep"
    done = run_sweep(
        SweepOptions(
            job=job, over=("lr=0.5,0.01", "fail=false,true"), workers=2, out=out, progress=False, plan="serial"
        )
    )
    document = watched(out)
    sweep, *trainings = document["runs"]
    assert (sweep["path"], sweep["name"], sweep["status"]) == ("sweep", "sweep small", "finished")
    best = done.summary["trials"][0]
    seen = sweep["sweep"]
    assert (seen["trials"], seen["ended"], seen["failed"], seen["metric"]) == (4, 4, 2, "accuracy")
    assert (seen["best"], seen["best_setting"]) == (best["trial"], best["settings"])
    assert seen["best_value"] == pytest.approx(best["accuracy"], rel=1e-6)
    told = [note["text"] for note in sweep["notes"] if note["kind"] == "sweep"]
    assert len(told) == 4 and sum("this one cannot be built" in text for text in told) == 2
    assert sorted(run["path"] for run in trainings) == ["trials/0000", "trials/0002"]
    assert {run["status"] for run in trainings} == {"finished"} and all(run["sweep"] is None for run in trainings)
    # The sweep makes no difference between runs; its trainings do.
    assert {name: set(values) for name, values in document["differing_settings"].items()} == {
        "set.lr": {None, 0.5, 0.01}
    }
    assert find_runs(tmp_path / "runs") == [out, out / "trials" / "0000", out / "trials" / "0002"]
    text = CliRunner().invoke(shardwise, ["watch", str(out), "--text"])  # ends by itself, for the sweep has ended
    assert text.exit_code == 0
    assert "4 of 4 trials, 2 failed" in text.stdout and f"best so far: trial {best['trial']}" in text.stdout


def test_a_killed_sweep_is_not_finished_and_a_resumed_one_is(job: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "shardwise.cli.main", "sweep", job, "--over", "lr=0.3,0.1,0.03", "--quiet"]
    command += ["--set", "pause=0.1", "--workers", "1", "--plan", "serial", "--out", str(out)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("trials/*/summary.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert watched(out)["runs"][0]["status"] == "running"  # `silent` once there is no news for half a minute
    # in a process of its own: this one may have loaded another job file of the same name
    subprocess.run([*command, "--resume"], check=True, timeout=100)
    sweep = watched(out)["runs"][0]
    assert sweep["status"] == "finished" and (sweep["sweep"]["trials"], sweep["sweep"]["ended"]) == (3, 3)


def test_the_log_tells_the_best_so_far_what_is_left_and_how_it_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        SweepLog(tmp_path, metric="loss", maximize=False, trials=4) as log,
    ):
        log.begin("sweep x", settings={}, plan="serial", threads=1, device="cpu", cores=2)
        log.came(0, {"lr": "1"}, value=0.5, trained=1, state="paused")
        log.came(1, {"lr": "2"}, value=0.3, trained=1, state="done")
        log.came(1, {"lr": "2"}, value=0.7, trained=3, state="done")  # worse with more training: 0 leads again
        log.came(2, {"lr": "3"}, value=None, trained=1, state="failed", failure="no")
        log.beat(2)  # too soon after the last event
        raise KeyboardInterrupt
    first, *events, last = read_events(tmp_path / "events.jsonl")
    sweeps = [event for event in events if isinstance(event, SweepEvent)]
    assert (first.kind, last.kind, len(sweeps)) == ("run", "failure", 5)
    assert [event.best for event in sweeps] == [None, 0, 1, 0, 0]
    assert [(event.ended, event.failed) for event in sweeps] == [(0, 0), (0, 0), (1, 0), (2, 0), (3, 1)]
    assert sweeps[1].left_seconds is None
    assert sweeps[4].left_seconds is not None
    assert sweeps[4].left_seconds == pytest.approx((sweeps[4].t - first.t) / 3, abs=0.05)
