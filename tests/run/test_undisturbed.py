"""Whatever happens to events and their readers, the training is the same, bit for bit; and it ends where it must end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwise.spec.events import FailureEvent, StepsEvent, read_events

JOB = Path(__file__).with_name("planted.py")
SHARDWISE = [sys.executable, "-m", "shardwise.cli.main"]


def command(out: Path, trouble: str, seconds: float, *options: str) -> list[str]:
    job = [str(JOB), "--set", f"trouble={trouble}", "--set", f"seconds={seconds}"]
    return [*SHARDWISE, "train", *job, "--out", str(out), "--plan", "data=2", *options]


def trained(out: Path, trouble: str, seconds: float = 0.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, trouble, seconds), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def calm_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """The weights of the run to which nothing happens."""
    out = tmp_path_factory.mktemp("calm") / "run"
    done = trained(out, "calm")
    assert done.returncode == 0, done.stderr
    yield (out / "model.safetensors").read_bytes()


def test_a_full_disk_costs_events_and_nothing_else(tmp_path: Path, calm_weights: bytes) -> None:
    done = trained(tmp_path / "run", "full")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("events are being lost") == 1, done.stderr
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == calm_weights
    steps = [event for event in read_events(tmp_path / "run" / "events.jsonl") if isinstance(event, StepsEvent)]
    kept = {event.first_step + place for event in steps for place in range(len(event.losses))}
    assert 0 in kept and 99 in kept  # before, and after there was room again
    assert len(kept) < 100  # some were lost indeed


def test_readers_that_are_killed_or_stopped_do_not_matter(tmp_path: Path, calm_weights: bytes) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(command(out, "busy_backward", 0.02, "--quiet")) as training:
        while not (out / "events.jsonl").exists() and training.poll() is None:
            time.sleep(0.05)
        # Nobody reads what they print, and one of them does not go on.
        watchers = [subprocess.Popen([*SHARDWISE, "watch", str(out), "--text"], stdout=subprocess.PIPE) for _ in "ab"]
        try:
            for watcher in watchers:
                assert watcher.stdout is not None and watcher.stdout.read(1)  # it has begun to show the run
            assert training.poll() is None  # which still goes on
            watchers[0].send_signal(signal.SIGKILL)
            watchers[1].send_signal(signal.SIGSTOP)
            assert training.wait(120) == 0
        finally:
            for watcher in watchers:
                watcher.kill()
                watcher.communicate()
    assert (out / "model.safetensors").read_bytes() == calm_weights


def test_when_a_rank_dies_the_run_folder_says_where_the_others_were(tmp_path: Path) -> None:
    done = trained(tmp_path / "run", "die")
    assert done.returncode == 1 and "rank 1 was killed by signal 9" in done.stderr
    failure = read_events(tmp_path / "run" / "events.jsonl")[-1]
    assert isinstance(failure, FailureEvent) and failure.rank == 1
    assert "Meanwhile rank 0 was here" in failure.details and "step.py" in failure.details, failure.details


def test_a_stop_request_in_a_stalled_step_does_not_wait_for_the_whole_grace(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = command(out, "hang", 1000.0, "--stall-after", "1s")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as training:
        positions = out / "positions"
        while training.poll() is None and not (positions.is_dir() and len(list(positions.glob("*.json"))) == 2):
            time.sleep(0.05)
        training.send_signal(signal.SIGTERM)
        _, told = training.communicate(timeout=50)  # the launcher's grace is 60 s
    assert training.returncode == 1, told
    assert "could not save and stop, because its step had stalled" in told
    answer = json.loads((positions / "rank-00001.json").read_text())
    assert any("planted.py" in line for line in answer["stack"])
