"""`shardwise bench` from start to end, on small jobs: what it writes, and what it makes of plans that fail."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import shardwise.bench
from shardwise.bench.cases import parse_plans
from shardwise.bench.execute import Target
from shardwise.bench.result import Bench
from shardwise.cli.main import main
from shardwise.errors import PlanError, UserError

JOB = """
import os
import time

import torch
import torch.distributed as c10d
from torch import nn

import shardwise


def rank() -> int:
    return c10d.get_rank() if c10d.is_initialized() else 0


class Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.02)
        return gradient


class Net(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.first, self.second, self.fault, self.calls = nn.Linear(20, 30), nn.Linear(30, 2), fault, 0

    def forward(self, x):
        self.calls += 1
        hidden = self.first(x).relu()
        if self.fault == "late" and rank() == 1:
            hidden = Late.apply(hidden)
        if self.fault == "die" and rank() == 1 and self.calls == 4:
            os._exit(7)
        return self.second(hidden)


def job(fault: str = "", epochs: int = 30) -> shardwise.Job:
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    y = (x[:, :3].sum(1) > 0).long()
    return shardwise.Job(
        model=lambda: Net(fault),
        data={"train": (x[:160], y[:160]), "test": (x[160:], y[160:])},
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        batch_size=40,
        epochs=epochs,
        metrics={"accuracy": shardwise.metrics.accuracy},
    )
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("bench", "job.py", ...)`: exit code, stdout, stderr."""
    (tmp_path / "job.py").write_text(JOB, encoding="utf-8")
    (tmp_path / "one.toml").write_text('layout = "serial"\nthreads = 1\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["bench", *words])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


class Outline(HTMLParser):
    """What a page loads, and what it has for those who cannot see the charts."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.labels: list[str] = []
        self.tags: dict[str, int] = {}
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and value and not value.startswith("#"):
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)
            if tag == "svg" and name == "aria-label" and value:
                self.labels.append(value)


def test_plans_are_measured_refused_and_reported(run: Run, tmp_path: Path) -> None:
    words = (
        "--plans",
        "one.toml,data=2,expert=2",
        "--plans",
        "data=2+shard=2",
        "--rounds",
        "2",
        "--steps",
        "12",
        "--weak",
    )
    began = time.perf_counter()
    code, out, err = run("job.py", *words, "--price", "3", "--out", "result", "--json")
    stopwatch = time.perf_counter() - began
    assert code == 0, err
    result = Bench.from_dict(json.loads(out))
    assert result == Bench.read(tmp_path / "result")
    by_name = {case.name: case for case in result.cases}
    assert list(by_name)[:3] == ["serial threads=1", "data=2 threads=1", "data=2 threads=1 (weak)"]
    assert by_name["expert=2 threads=1"].outcome == "refused" and "expert" in by_name["expert=2 threads=1"].reason
    both, weak = by_name["data=2 threads=1"], by_name["data=2 threads=1 (weak)"]
    assert both.batch_size == 40 and weak.batch_size == 80
    # The clocks inside and the one outside agree: what the runs took lies within what the command took.
    measured = [case for case in result.cases if case.total_seconds is not None]
    assert len(measured) >= 3
    inside = sum(2 * case.total_seconds.low for case in measured if case.total_seconds is not None)
    assert inside < stopwatch
    for case in measured:
        assert case.step_seconds is not None and case.total_seconds is not None and case.start_seconds is not None
        assert case.step_seconds.rounds == 2
        assert case.start_seconds.median + 12 * 0.5 * case.step_seconds.low < case.total_seconds.median
        for rank in case.ranks:
            assert sum(rank.seconds.values()) == pytest.approx(case.step_seconds.median, rel=0.9)
            assert rank.peak_memory_bytes > 2**20
    # One sum of all gradients and a flag for each of the four parameters.
    assert both.payload_bytes is not None and both.payload_bytes >= 4 * (20 * 30 + 30 + 30 * 2 + 2 + 4)
    assert {metric.name: metric.verdict for metric in both.metrics} == {"loss": "same", "accuracy": "same"}
    assert both.cost_per_epoch is not None and both.cost_per_epoch > 0
    assert both.timeline and {bar.rank for bar in both.timeline} == {0, 1}
    assert not list((tmp_path / "result").rglob("*.safetensors"))
    _check_page((tmp_path / "result" / "report.html").read_text(encoding="utf-8"), by_name)


def _check_page(page: str, names: dict[str, Any]) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.loads == [] and "script" not in outline.tags
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.tags["svg"] == len(outline.labels) >= 8
    assert all(len(label) > 20 for label in outline.labels)
    assert outline.tags["table"] >= 5 and outline.tags["caption"] == outline.tags["table"]
    assert 'name="viewport"' in page and 'lang="en"' in page
    for name in names:
        assert name in page


def test_a_dying_plan_and_a_slow_rank_are_told(run: Run) -> None:
    code, out, err = run(
        "job.py", "--set", "fault=die", "--plans", "one.toml,data=2", "--rounds", "2", "--steps", "8", "--out", "a"
    )
    assert code == 0, err
    assert "data=2 threads=1: failed: rank 1" in out and "exit code 7" in out
    assert err.count("failed") == 1  # not tried again in the second round
    code, out, _ = run(
        "job.py", "--set", "fault=late", "--plans", "one.toml,data=2", "--rounds", "1", "--steps", "12", "--out", "b"
    )
    assert code == 0
    assert re.search(
        r"rank 1 is slower than the others in \d+% of the steps, by .*most of it in its backward pass", out
    ), out
    code, out, _ = run("--compare", "a", "b", "--json")
    pairs = {pair["name"]: pair["verdict"] for pair in json.loads(out)["pairs"]}
    assert code == 0 and pairs["data=2 threads=1"] == "only in B"


def test_time_to_a_target(run: Run) -> None:
    code, out, err = run(
        "job.py",
        "--plans",
        "one.toml,data=2",
        "--rounds",
        "1",
        "--to",
        "accuracy=0.8",
        "--set",
        "epochs=2000",
        "--out",
        "c",
    )
    assert code == 0, err
    assert re.search(
        r"time until accuracy >= 0.8\n  serial threads=1: [\d.]+ m?s.*\n  data=2 threads=1: [\d.]+ m?s", out
    ), out
    case = Bench.read(Path("c")).cases[1]
    assert case.target_seconds is not None and case.total_seconds is not None
    assert case.target_seconds.median <= case.total_seconds.median
    assert case.course is not None and len(case.course.losses) < 2000 * 4  # stopped, not trained to the end


def test_interrupted_bench_keeps_what_was_measured(run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardwise.cli.main", "bench", "job.py", "--plans", "one.toml,data=2"]
    process = subprocess.Popen(
        [*command, "--rounds", "50", "--steps", "8", "--out", "d"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round 1/50  data=2"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "the bench was interrupted" in out
    result = Bench.read(tmp_path / "d")
    assert result.interrupted and all(case.step_seconds is not None for case in result.cases)


def test_without_the_extra_the_result_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("page", "charts"):
        monkeypatch.delitem(sys.modules, f"shardwise.bench.{name}", raising=False)
        monkeypatch.delattr(shardwise.bench, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("job.py", "--plans", "one.toml", "--rounds", "1", "--steps", "6", "--out", "e")
    assert code == 0, err
    assert "matplotlib is not installed; pip install 'shardwise[report]'" in out
    assert Path("e", "bench.json").is_file() and not Path("e", "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give a JOB"),
        (("job.py", "--plans", "data=2,,serial"), "missing between two commas"),
        (("job.py", "--plans", "dat=2"), "axis=degree"),
        (("job.py", "--steps", "5", "--to", "loss=1"), "give one of them"),
        (("job.py", "--all", "--plans", "data=2"), "give one of them"),
        (("job.py", "--to", "precision=0.5"), "no metric 'precision'"),
        (("job.py", "--to", "accuracy"), "METRIC=NUMBER"),
        (("job.py", "--to", "accuracy=0.9", "--weak"), "another training"),
        (("job.py", "--steps", "2"), "at least 4"),
        (("job.py", "--rounds", "0"), "at least 1"),
        (("job.py", "--price", "-1"), "0 or more"),
        (("job.py", "--workers", "0"), "at least 1"),
        (("job.py", "--epochs", "2"), "goes with --to"),
        (("job.py", "--set", "fault"), "NAME=VALUE"),
        (("job.py", "--out", "."), "not empty"),
        (("--compare", "nowhere", "nowhere"), "cannot be read"),
        (("--compare", "one.toml", "one.toml"), "no result"),
        (("job.py", "--compare", "a", "b"), "both given"),
    ],
)
def test_wrong_input(run: Run, words: tuple[str, ...], said: str) -> None:
    code, out, err = run(*words)
    assert code == 2 and out == ""
    assert said in err, err


def test_json_of_wrong_input(run: Run) -> None:
    code, out, _ = run("job.py", "--steps", "1", "--json")
    assert code == 2 and set(json.loads(out)) == {"error", "kind"}


def test_parse_plans() -> None:
    assert [str(plan.layout) for plan in parse_plans(["serial, data=2", "data=2+shard=2"])] == [
        "serial",
        "data=2",
        "data=2,shard=2",
    ]
    with pytest.raises(PlanError):
        parse_plans(["data=2+data=2"])


def test_targets() -> None:
    assert Target.parse("accuracy=0.9").reached({"accuracy": 0.9})
    assert not Target.parse("accuracy=0.9").reached({"accuracy": 0.89})
    assert Target.parse("loss=0.1").reached({"loss": 0.05})
    assert Target.parse("mean_error <= 2").reached({"mean_error": 2.0})
    assert not Target.parse("loss=0.1").reached({"accuracy": 1.0})
    assert not Target.parse("loss=0.1").reached({"loss": float("nan")})
    for text in ("accuracy", "accuracy=high", "=3", "accuracy=nan"):
        with pytest.raises(UserError):
            Target.parse(text)
