"""A sweep from start to end: reproducible on any number of workers, resumed after a kill, folds, ensembles, the command."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.cli.main import main
from shardwise.errors import FolderError, UserError
from shardwise.run.train import train
from shardwise.tasks.sweep.settle import SweepOptions
from shardwise.tasks.sweep.sweep import run_sweep

JOB = """
import os, time
from pathlib import Path
import torch
from torch import nn
import shardwise


def small(lr: float = 0.1, width: int = 2, fail: bool = False, pause: float = 0.0) -> shardwise.Job:
    if fail:
        raise ValueError("this one cannot be built")
    inputs = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    targets = (inputs.sum(1) > 0).long()

    def loss(output, target):
        time.sleep(pause)
        return nn.functional.cross_entropy(output, target)

    return shardwise.Job(
        model=lambda: nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 2)),
        data={"train": (inputs[:60], targets[:60]), "test": (inputs[60:], targets[60:])},
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        batch_size=20,
        epochs=4,
        metrics={"accuracy": shardwise.metrics.accuracy},
    )
"""


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    path = tmp_path / f"job_of_{request.function.__name__}.py"
    path.write_text(JOB)
    return str(path)


def comparable(summary: dict[str, Any]) -> list[Any]:
    return [
        {name: trial[name] for name in ("trial", "settings", "accuracy", "values", "trained", "state")}
        for trial in summary["trials"]
    ]


def test_the_same_trials_on_any_number_of_workers(job: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="TPE needs Optuna: pip install 'shardwise[sweep]'")
    found = []
    for workers in (1, 3):
        options = SweepOptions(
            job=job, over=("lr=0.01:1:log", "width=1:6"), search="tpe", trials=8, stop="asha:eta=2", lanes=3,
            workers=workers, out=tmp_path / str(workers), progress=False, plan="serial",
        )  # fmt: skip
        found.append(run_sweep(options))
    assert comparable(found[0].summary) == comparable(found[1].summary)
    states = [trial["state"] for trial in found[0].summary["trials"]]
    assert "paused" in states and "done" in states
    assert found[0].summary["trained"] < found[0].summary["of"]
    # A paused and resumed trial is the uninterrupted training, bit for bit.
    best = found[0].trials[0]
    from shardwise.tasks.sweep.trial import Training, build_job

    description = Training(
        job=job, folders=(), settings=best.setting, changes={}, seed_step=0, fold=None, plan="serial", threads=1,
        device="cpu", folder="",
    )  # fmt: skip
    whole = train(build_job(description), plan="serial", threads=1, out=tmp_path / "whole", progress=False)
    assert whole.metrics["accuracy"] == best.value
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "1" / "trials" / f"{best.number:04d}" / "model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_a_killed_sweep_goes_on_with_what_is_missing(job: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "shardwise.cli.main", "sweep", job, "--over", "lr=0.3,0.1,0.03,0.01,0.003"]
    command += ["--set", "pause=0.03", "--workers", "2", "--out", str(out), "--json", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 90
    while len(list(out.glob("trials/*/summary.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = {path: path.stat().st_mtime for path in out.glob("trials/*/summary.json")}
    assert 3 <= len(ended) < 5
    with contextlib.closing(sqlite3.connect(out / "trainings.sqlite")) as base:
        told = base.execute("SELECT COUNT(*) FROM tasks WHERE state = 'done'").fetchone()[0]
    assert told >= 1  # both workers may have been about to tell
    with pytest.raises(FolderError, match="over was"):
        run_sweep(
            SweepOptions(job=job, over=("lr=0.3,0.1",), settings=("pause=0.03",), out=out, resume=True, progress=False)
        )
    options = {"job": job, "over": ("lr=0.3,0.1,0.03,0.01,0.003",), "settings": ("pause=0.03",), "progress": False}
    resumed = run_sweep(SweepOptions(out=out, resume=True, workers=2, **options))  # type: ignore[arg-type]
    kept = [path for path, when in ended.items() if path.stat().st_mtime == when]
    assert len(kept) == told
    straight = run_sweep(SweepOptions(out=tmp_path / "straight", workers=2, **options))  # type: ignore[arg-type]
    assert comparable(resumed.summary) == comparable(straight.summary)


def test_a_job_that_was_changed_in_the_meantime(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = Path(job)
    options = {"job": job, "over": ("lr=0.1",), "workers": 1, "progress": False}
    run_sweep(SweepOptions(out=tmp_path / "sweep", **options))  # type: ignore[arg-type]
    again = SweepOptions(out=tmp_path / "sweep", resume=True, **options)  # type: ignore[arg-type]
    run_sweep(again)
    assert "has changed" not in capsys.readouterr().err
    text = mine.read_text()
    mine.write_text(text + "\n# changed\n")
    run_sweep(again)
    assert "has changed since the sweep was started" in capsys.readouterr().err
    mine.write_text(text.replace("pause: float = 0.0", "pause: float = 0.001"))
    with pytest.raises(FolderError, match=r"defaults was .*'pause': '0\.0'.* and is now .*'pause': '0\.001'"):
        run_sweep(again)


def test_folds_seeds_failures_winners_and_what_is_written(job: str, tmp_path: Path) -> None:
    out, winners = tmp_path / "sweep", tmp_path / "winners"
    options = SweepOptions(
        job=job, over=("lr=0.3,0.03", "fail=false,true"), folds=3, seeds=2, changes={"epochs": 1}, workers=2, out=out,
        best=2, export=winners, ensemble=2, progress=False,
    )  # fmt: skip
    done = run_sweep(options)
    summary = done.summary
    assert (summary["combinations"], summary["trainings"], summary["failed"]) == (4, 24, 2)
    best, other, *failed = summary["trials"]
    assert best["accuracy"] >= other["accuracy"] and len(best["values"]) == 6
    assert best["spread"] == pytest.approx(torch.tensor(best["values"]).std().item())
    assert best["accuracy"] == pytest.approx(sum(best["values"]) / 6)
    assert len(set(best["values"])) > 1
    assert all("this one cannot be built" in row["failure"] and row["accuracy"] is None for row in failed)
    assert summary["ensemble"]["trials"] == [best["trial"], other["trial"]]
    assert 0 <= summary["ensemble"]["metrics"]["accuracy"] <= 1
    for place, row in zip(("1", "2"), (best, other), strict=True):
        record = json.loads((winners / place / "settings.json").read_text())
        assert record["trial"] == row["trial"] and record["settings"] == row["settings"]
        assert (winners / place / "model.safetensors").stat().st_size > 100
    with (out / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and {row["lr"] for row in rows} == {"0.3", "0.03"}
    assert (out / "trials.parquet").exists()
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "accuracy against lr" in page and page.count("<tr>") == 5
    assert json.loads((out / "summary.json").read_text())["trials"] == json.loads(json.dumps(summary["trials"]))


def test_a_training_that_diverged_is_not_ranked(job: str, tmp_path: Path) -> None:
    Path(job).write_text(JOB.replace("return nn.functional", "return float('nan' if lr > 1 else 1) * nn.functional"))
    over = ("lr=9,0.00001",)
    done = run_sweep(SweepOptions(job=job, over=over, workers=1, out=tmp_path / "sweep", progress=False))
    assert [row["trial"] for row in done.summary["trials"]] == [1, 0] and done.summary["failed"] == 1
    assert "its training loss is no number" in done.summary["trials"][1]["failure"]


def test_an_ensemble_is_the_mean_of_its_members(job: str, tmp_path: Path) -> None:
    from shardwise.tasks.sweep.trial import Training, build_job, evaluate_together

    trainings = [
        Training(
            job=job, folders=(), settings=(("lr", lr),), changes={"epochs": 1}, seed_step=step, fold=None,
            plan="serial", threads=1, device="cpu", folder=str(tmp_path / lr),
        )
        for step, lr in enumerate(("0.1", "0.02"))
    ]  # fmt: skip
    runs = [
        train(build_job(one), plan="serial", threads=1, out=one.folder, progress=False, last_checkpoint=False)
        for one in trainings
    ]
    together = evaluate_together(trainings)
    data = build_job(trainings[0]).data["test"]
    with torch.no_grad():
        output = torch.stack([run.model(data[0]) for run in runs]).mean(0)
    assert together["accuracy"] == pytest.approx((output.argmax(1) == data[1]).float().mean().item())
    assert together["loss"] == pytest.approx(torch.nn.functional.cross_entropy(output, data[1]).item(), rel=1e-5)
    assert together["loss"] != pytest.approx(runs[0].metrics["loss"], rel=1e-3)


def test_wrong_input_ends_before_anything_starts(job: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"over": ("speed=1",)}, "no hyper-parameter"),
        ({"over": ("lr=1,2",), "settings": ("lr=3",)}, "give one of them"),
        ({"over": ("lr=1,2",), "folds": 1}, "at least 2 folds"),
        ({"over": ("lr=1,2",), "metric": "speed"}, "the job has accuracy, loss"),
        ({"over": ("lr=1,2",), "trials": 0}, "--trials 0"),
        ({"over": ("lr=1,2",), "stop": "asha:min=9"}, "min=9"),
        ({"over": ("lr=1,2",), "export": tmp_path / "full"}, "not empty"),
        ({"over": ("lr=1,2",), "resume": True}, "needs the sweep's folder"),
        ({"over": ("lr=1,2",), "ensemble": 1}, "2 for an ensemble"),
    ]
    for given, words in cases:
        with pytest.raises(UserError, match=words):
            run_sweep(
                SweepOptions(
                    job=job, progress=False, **{"out": None if "resume" in given else tmp_path / "no", **given}
                )
            )
    assert not (tmp_path / "no").exists()


def test_the_command(job: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", job, "--over", "width=1,3", "--epochs", "1", "--out", str(tmp_path / "sweep"), "--json"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert {trial["settings"]["width"] for trial in document["trials"]} == {"1", "3"}
    assert "2 combinations by grid search" in err and "(best so far)" in err and "side by side" in err
    with pytest.raises(SystemExit) as end:
        main(
            ["sweep", job, "--over", "lr=1e38", "--metric", "loss", "--out", str(tmp_path / "nan"), "--json", "--quiet"]
        )
    assert end.value.code == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["failed"] == 1 and "every trial failed" in err


def test_a_sweep_whose_input_is_wrong_in_every_trial_exits_with_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sweep",
        "mnist",
        "--set",
        f"data={tmp_path / 'nowhere'}",
        "--over",
        "lr=0.1,0.01",
        "--out",
        str(tmp_path / "out"),
    ]
    for plan in ("serial", "data=2"):
        with pytest.raises(SystemExit) as end:
            main([*words, "--plan", plan, "--quiet"])
        assert end.value.code == 2
        _, err = capfd.readouterr()
        assert "every trial failed" in err and "nowhere" in err
        words[-1] += "2"
