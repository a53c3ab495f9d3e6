"""Planted trouble in real trainings, started with the real command, is named by `watch`: in its text and in its JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shardwise.cli.main import _run

JOB = Path(__file__).with_name("planted.py")


@contextmanager
def training(out: Path, trouble: str, seconds: float, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    words = [
        "train",
        str(JOB),
        "--set",
        f"trouble={trouble}",
        "--set",
        f"seconds={seconds}",
        "--out",
        str(out),
        *options,
    ]
    with subprocess.Popen([sys.executable, "-m", "shardwise.cli.main", *words, "--quiet"]) as process:
        try:
            yield process
        finally:
            process.kill()  # its workers end with it


def watched(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert _run(["watch", str(out), "--json"]) == 0
    runs: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["runs"]
    return runs[0] if runs else {"notes": [], "stall": None}


def until(
    out: Path, capsys: pytest.CaptureFixture[str], found: Callable[[dict[str, Any]], Any], seconds: float = 120.0
) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run = watched(out, capsys) if out.is_dir() else {"notes": [], "stall": None}
        if found(run):
            return run
        time.sleep(0.2)
    raise AssertionError(f"not seen in {seconds:.0f} s: {run}")


def text(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert _run(["watch", str(out), "--text", "--once"]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def kinds(run: dict[str, Any]) -> set[str]:
    return {note["kind"] for note in run["notes"]}


def test_a_slow_backward_pass_is_named_with_rank_phase_and_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with training(tmp_path / "r", "sleep_backward", 0.08, "--plan", "data=2", "--steps", "2000"):
        run = until(tmp_path / "r", capsys, lambda run: run.get("straggler"))
        shown = text(tmp_path / "r", capsys)
    slow = run["straggler"]
    assert (slow["rank"], slow["phase"], slow["cause"]) == (1, "backward", "waiting")
    assert "rank 1 is slow in backward" in shown
    by_rank = {row["rank"]: row for row in run["rank_rows"]}
    assert by_rank[1]["late_ms"] > 40 > by_rank[0]["late_ms"]
    assert by_rank[0]["phase_ms"]["synchronisation"] > by_rank[1]["phase_ms"]["synchronisation"]


def test_a_starved_loader_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with training(tmp_path / "r", "starved", 0.01, "--plan", "data=2", "--steps", "2000"):
        run = until(tmp_path / "r", capsys, lambda run: "bottleneck" in kinds(run))
        assert "spent waiting for data" in text(tmp_path / "r", capsys)
    assert any("data" in note["text"] for note in run["notes"] if note["kind"] == "bottleneck")


def test_an_oversubscribed_machine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    core = min(os.sched_getaffinity(0))
    burn = f"import os\nos.sched_setaffinity(0, [{core}])\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE) as other:
        before = os.sched_getaffinity(0)
        try:
            assert other.stdout is not None
            other.stdout.readline()
            os.sched_setaffinity(0, {core})  # the training inherits it: both ranks and the burner on one core
            options = ("--plan", "data=2", "--steps", "100000")
            with training(tmp_path / "r", "busy_backward", 0.02, *options):
                os.sched_setaffinity(0, before)
                until(
                    tmp_path / "r", capsys, lambda run: any("oversubscribed" in note["text"] for note in run["notes"])
                )
                assert "oversubscribed" in text(tmp_path / "r", capsys)
        finally:
            os.sched_setaffinity(0, before)
            other.kill()


def test_a_skipped_collective_is_named_with_both_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with training(tmp_path / "r", "skip", 1, "--plan", "data=2", "--stall-after", "2s"):
        run = until(tmp_path / "r", capsys, lambda run: (run.get("stall") or {}).get("what") == "diverged")
        shown = text(tmp_path / "r", capsys)
    first, second = run["stall"]["positions"]
    assert run["status"] == "stalled"
    assert run["stall"]["missing"] == [1]
    assert first["inside"] == "torch.distributed's all_reduce"
    assert "planted.py" in first["line"] and first["module"] == "Net"
    assert second["inside"].startswith("all-reduce of the gradients of last.bias")
    assert any("planted.py" in line for line in first["stack"])
    assert "took different branches" in shown


def test_a_rank_that_hangs_in_its_own_code_is_named_with_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with training(tmp_path / "r", "hang", 1000, "--plan", "data=2", "--stall-after", "2s"):
        run = until(tmp_path / "r", capsys, lambda run: (run.get("stall") or {}).get("what") == "slow")
    assert run["stall"]["missing"] == [1]
    hung = run["stall"]["positions"][1]
    assert (hung["activity"], hung["inside"], hung["module"]) == ("forward", "", "Net")
    assert "planted.py" in hung["line"] and "in forward" in hung["line"]
    assert "rank 1 is in forward, module Net, at" in run["stall"]["message"]


def test_a_stopped_worker_is_named_and_the_run_goes_on_when_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with training(tmp_path / "r", "stop", 1, "--plan", "data=2", "--stall-after", "2s") as process:
        run = until(tmp_path / "r", capsys, lambda run: (run.get("stall") or {}).get("what") == "stopped")
        stopped = run["stall"]["positions"][1]
        assert (run["stall"]["missing"], stopped["process"], stopped["where"]) == ([1], "stopped", "stopped")
        assert f"kill -CONT {stopped['pid']}" in run["stall"]["message"]
        os.kill(stopped["pid"], signal.SIGCONT)
        assert process.wait(120) == 0
    run = watched(tmp_path / "r", capsys)
    assert (run["status"], run["step"], run["stall"]) == ("finished", 100, None)
    assert "recovery" in kinds(run)


def test_one_worker_alone_that_hangs_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with training(tmp_path / "r", "hang", 1000, "--plan", "serial", "--stall-after", "2s"):
        run = until(tmp_path / "r", capsys, lambda run: run.get("stall"))
    assert run["stall"]["what"] == "alone"
    assert "planted.py" in run["stall"]["message"]
