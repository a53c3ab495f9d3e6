"""Whatever is given and whatever goes wrong: the right exit code, and with --json exactly one document on stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shardwise.cli.main import main
from shardwise.run.signals import StopRequest
from shardwise.spec.events import FailureEvent, read_events

JOBS = """
import os
import signal

import torch
from torch import nn

import shardwise


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


class FailsLate(Net):
    def forward(self, x):
        if self.calls == 3:
            raise ValueError("the planted failure")
        return super().forward(x)


def job(**changes):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    values = dict(
        model=Net,
        data={"train": (x, y), "test": (x, y)},
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=16,
        epochs=1,
    )
    return shardwise.Job(**{**values, **changes})


def prints():
    print("from the job function")

    class Prints(Net):
        def forward(self, x):
            print("from the model")
            return super().forward(x)

    return job(model=Prints)


def fails_late():
    return job(model=FailsLate)


def on_meta():
    return job(model=lambda: nn.Linear(8, 3, device="meta"))


def metric_text():
    return job(metrics={"good": lambda output, target: "yes"})


def foreign_parameters():
    other = nn.Linear(2, 2)
    return job(optimizer=lambda parameters: torch.optim.SGD(other.parameters(), lr=0.1))


def no_schedule():
    return job(schedule=lambda optimizer, steps: None)


def plateau():
    return job(schedule=lambda optimizer, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


class BreaksStage(nn.Sequential):
    # Breaks in its third pass: in the first forward or backward pass of the second step.

    def __init__(self, how):
        super().__init__(nn.Linear(8, 8), nn.Tanh())
        self.how, self.calls = how, 0

    def forward(self, x):
        if type(x) is torch.Tensor:  # nothing breaks while the pipeline is traced
            self.calls += 1
        if self.calls == 3 and self.how == "forward":
            raise ValueError("the planted failure")
        if self.calls == 3 and self.how == "memory":
            torch.empty(1 << 50)
        if self.calls == 3 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        y = super().forward(x)
        if self.calls == 3 and self.how == "backward":
            y.register_hook(breaks)
        return y


def breaks(gradient):
    raise ValueError("the planted failure")


def breaks_stage(how: str = "forward"):
    def layers():
        plain = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        return nn.Sequential(next(plain), BreaksStage(how), next(plain), nn.Linear(8, 3))

    return job(model=layers, micro_batch=8)


def ends_python():
    raise RuntimeError("the job function fails")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with job files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"jobs_{tmp_path.name}.py").write_text(JOBS, encoding="utf-8")
    return tmp_path


def _run(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    out, err = capfd.readouterr()
    document: dict[str, Any] = json.loads(out)
    assert isinstance(ended.value.code, int)
    return ended.value.code, document, err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layout = data=2", "is not TOML"),
        ("layuot = 'data=2'", "unknown setting 'layuot'"),
        ("layout = 5", "plan layout=5"),
        ("compile = 'yes'", "it must be true or false"),
        ("cuts = 'conv1'", "it must be a list of texts"),
        ("reasons = 3", "it must be a list of texts"),
        ("threads = 'two'", "it must be a whole number"),
        ("[prediction]\nstep_seconds = 1", "leave it out of a plan of your own"),
        ("prediction = 3", "leave it out of a plan of your own"),
        ("[prediction]\nstep_seconds = 'a'\nmemory_bytes = 1", "step_seconds='a': it must be a number above 0"),
        ("[prediction]\nstep_seconds = 0.0\nmemory_bytes = 1", "step_seconds=0.0: it must be a number above 0"),
        ("[prediction]\nstep_seconds = nan\nmemory_bytes = 1", "step_seconds=nan: it must be a number above 0"),
        ("[prediction]\nstep_seconds = 1\nmemory_bytes = true", "memory_bytes=True: it must be a number above 0"),
        ("prediction = {step_seconds=1, memory_bytes=1, bytes_by_part={a='b'}}", "it must be a table of numbers"),
        ("prediction = {step_seconds=1, memory_bytes=1, seconds_by_part=3}", "it must be a table of numbers"),
        ("prediction = {step_seconds=1, memory_bytes=1, made_for=3}", "made_for=3: it must be a text"),
    ],
)
def test_bad_plan_files(text: str, words: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "plan.toml").write_text(text, encoding="utf-8")
    code, document, err = _run(["train", "digits", "--plan", "plan.toml"], capfd)
    assert (code, document["kind"]) == (2, "PlanError")
    assert words in document["error"] and words in err
    assert not (folder / "runs").exists()


def test_plan_file_that_is_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "plan.toml").mkdir()
    code, document, _ = _run(["train", "digits", "--plan", "plan.toml"], capfd)
    assert code == 2 and "cannot be read: Is a directory" in document["error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-restarts", "-1"], "max_restarts=-1"),
        (["--timeout", "0"], "give more than 0"),
        (["--seed", "99999999999999999999"], "Job.seed is 99999999999999999999"),
        (["--resume"], "give the one to continue with --out"),
        (["--auto-resume"], "give the one to continue with --out"),
        (["--epochs", "x"], "not a valid integer"),
        (["--set", "lr=fast"], "lr is a number"),
    ],
)
def test_bad_options(options: list[str], words: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, document, err = _run(["train", "digits", *options], capfd)
    assert code == 2 and words in document["error"]
    assert "Traceback" not in err and "shardwise/spec" not in err
    assert not (folder / "runs").exists(), "a folder was made for a run that was refused"


@pytest.mark.parametrize("plan", ["serial", "data=2"])
@pytest.mark.parametrize(
    ("job", "code", "words"),
    [
        ("fails_late", 1, "the planted failure"),
        ("on_meta", 2, "weight of the model is on the meta device"),
        ("metric_text", 2, "metric 'good' returned a str"),
        ("foreign_parameters", 2, "of shape (2, 2) that is none of the model's"),
        ("no_schedule", 2, "Job.schedule returned a NoneType"),
        ("plateau", 2, "ReduceLROnPlateau needs a metric"),
        ("ends_python", 2, "the job function fails"),
    ],
)
def test_bad_jobs(job: str, code: int, words: str, plan: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = next(folder.glob("jobs_*.py"))
    found, document, err = _run(["train", f"{file.name}:{job}", "--plan", plan, "--out", "run"], capfd)
    assert found == code, err
    assert words in document["error"]
    assert err.count("Traceback") == (job in ("fails_late", "ends_python"))
    if job != "fails_late":
        assert not (folder / "run" / "events.jsonl").exists()  # refused before there is a run
    else:
        last = read_events(folder / "run" / "events.jsonl")[-1]
        assert isinstance(last, FailureEvent) and words in f"{last.message} {last.details}"


@pytest.mark.parametrize(
    ("how", "words", "tracebacks"),
    [
        ("forward", "rank 1 failed with ValueError: the planted failure", 1),
        ("backward", "rank 1 failed with ValueError: the planted failure", 1),
        ("memory", "allocate memory", 1),
        ("killed", "rank 1 was killed by signal 9", 0),
    ],
)
def test_a_broken_stage_ends_the_others(
    how: str, words: str, tracebacks: int, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first error is shown, once; if the other stages waited, it would be about the time they waited."""
    file = next(folder.glob("jobs_*.py"))
    plan = folder / "plan.toml"
    plan.write_text('layout = "pipeline=3"\ncuts = ["1", "2"]\n')
    command = ["train", f"{file.name}:breaks_stage", "--set", f"how={how}", "--plan", plan.name, "--timeout", "60s"]
    code, document, err = _run([*command, "--out", "run"], capfd)
    assert code == 1 and words in document["error"]
    assert document["error"].startswith("rank 1 ")
    assert err.count("Traceback") == tracebacks
    assert "did not get from stage" not in err
    last = read_events(folder / "run" / "events.jsonl")[-1]
    assert isinstance(last, FailureEvent) and last.rank == 1


@pytest.mark.parametrize("plan", ["serial", "data=2"])
def test_stdout_is_for_json_alone(plan: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = next(folder.glob("jobs_*.py"))
    code, document, err = _run(["train", f"{file.name}:prints", "--plan", plan], capfd)
    assert code == 0 and document["steps"] == 4
    assert "from the job function" in err and "from the model" in err


@pytest.mark.parametrize("plan", ["serial", "data=2"])
def test_training_outlives_the_reader_of_its_progress(plan: str, folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "shardwise.cli.main", "train", "digits", "--plan", plan, "--steps", "3", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, timeout=120, check=False)
    os.close(writer)
    assert done.returncode == 0
    assert json.loads(done.stdout)["steps"] == 3


def test_closed_streams_and_full_disks(folder: Path) -> None:
    command = f"exec {sys.executable} -m shardwise.cli.main train digits --steps 3 --plan serial --json"
    closed = subprocess.run(["bash", "-c", f"{command} 2>&-"], capture_output=True, timeout=120, check=False)
    assert json.loads(closed.stdout)["steps"] == 3
    if Path("/dev/full").exists():
        words = ["bash", "-c", f"{command} >/dev/full"]
        full = subprocess.run(words, stderr=subprocess.PIPE, timeout=120, check=False)
        assert full.returncode == 1 and b"No space left" in full.stderr, "a document that was lost is no success"


@pytest.mark.parametrize("form", ["--text", "--json"])
def test_a_terminal_without_unicode(form: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["train", "digits", "--plan", "serial", "--steps", "3", "--out", "rün"], capfd)[0] == 0
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    words = [
        sys.executable,
        "-m",
        "shardwise.cli.main",
        "watch",
        "rün",
        form,
        *(["--once"] if form == "--text" else []),
    ]
    done = subprocess.run(words, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"finished" in done.stdout
    if form == "--json":
        assert json.loads(done.stdout)["place"] == "rün"


def test_torchrun_that_restarts_needs_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**torchrun, "TORCHELASTIC_MAX_RESTARTS": "2"}.items():
        monkeypatch.setenv(name, value)
    code, document, _ = _run(["train", "digits"], capfd)
    assert code == 2 and "find the run again by its folder" in document["error"]


def test_second_interrupt_ends_a_step_that_hangs() -> None:
    def interrupt() -> None:
        for _ in range(2):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    with StopRequest() as stop:
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20)
        assert stop.requested
    sender.join()
