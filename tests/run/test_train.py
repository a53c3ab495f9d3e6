"""`train` from start to end: the same run under every plan, resumed or not, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import shardwise
from shardwise.cli.main import main
from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.data.stream import Stream
from shardwise.errors import CheckpointError, DataError, FolderError, JobError, PlanError, RunFailed, Stopped, UserError
from shardwise.jobs.digits import digits
from shardwise.run import checkpoint
from shardwise.run.choose import AUTO
from shardwise.run.command import TrainCommand, train_command
from shardwise.run.folder import write_aside
from shardwise.run.record import Recording, record_path
from shardwise.run.train import train
from shardwise.spec.events import EvaluationEvent, RestartEvent, RunEvent, SummaryEvent, read_events
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).double().mean()


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 15, bias=False), nn.BatchNorm1d(15), nn.ReLU(), nn.Dropout(0.0), nn.Linear(15, 4))


def _rows(samples: int, seed: int) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 9, generator=generator)
    return Arrays((inputs, inputs[:, :4].argmax(1)))


def _job(**changes: Any) -> Job:
    settings: dict[str, Any] = {
        "name": "rows",
        "model": _net,
        "data": Splits(_rows(101, 1), _rows(37, 2)),
        "loss": nn.functional.cross_entropy,
        "optimizer": lambda params: torch.optim.AdamW(params, lr=0.02),
        "batch_size": 12,
        "epochs": 3,
        "metrics": {"accuracy": _accuracy},
        "clip_norm": 1.0,
        **changes,
    }
    return Job(**settings)


def _train(job: Job, out: Path, plan: str | None = "data=2", **options: Any) -> shardwise.Run:
    return shardwise.train(job, plan=plan, out=out, progress=False, **options)


def test_resumes_if_there_is_a_run(tmp_path: Path) -> None:
    whole = _train(_job(), tmp_path / "whole", "serial")
    first = _train(_job(epochs=1), tmp_path / "run", "serial", resume="auto")
    assert first.history == whole.history[:9]
    assert _train(_job(), tmp_path / "run", None, resume="auto").history == whole.history
    with pytest.raises(FolderError, match="resume needs the run folder"):
        shardwise.train(_job(), plan="serial", resume="auto")


@pytest.mark.parametrize("plan", ["data=2", "shard=2"])
def test_batch_norm_of_own_samples_keeps_the_running_statistics_of_all_workers(tmp_path: Path, plan: str) -> None:
    inputs = torch.randn(24, 9, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 10)
    rows = Arrays((inputs, inputs[:, :4].argmax(1)))
    job = _job(
        model=lambda: nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 4)),
        data=Splits(rows, rows),
        batch_size=24,
        shuffle=False,
        batch_norm="local",
    )
    run = _train(job, tmp_path / "whole", plan)
    norm = nn.BatchNorm1d(9)
    model = nn.Sequential(norm, nn.Linear(9, 4))
    load_model(model, tmp_path / "whole" / "model.safetensors")
    share = 1 - 0.9**3  # of three steps in the running averages, each over the same samples
    variance = torch.stack([half.var(0) for half in inputs.chunk(2)]).mean(0)
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    assert torch.allclose(norm.running_mean, share * inputs.mean(0), rtol=1e-4, atol=1e-5)
    assert torch.allclose(norm.running_var, 1 - share + share * variance, rtol=1e-4)
    assert int(norm.num_batches_tracked) == 3
    with torch.no_grad():
        found = _accuracy(model.eval()(inputs), inputs[:, :4].argmax(1))
    assert run.summary["metrics"]["accuracy"] == pytest.approx(float(found), abs=1e-9)


def test_data_of_another_length(tmp_path: Path) -> None:
    changed = Splits(_rows(100, 1), _rows(37, 2))
    _train(_job(epochs=None, steps=18), tmp_path / "middle", "serial", pause_after=7)
    _train(_job(epochs=2), tmp_path / "end", "serial", pause_after=1)
    with pytest.raises(
        CheckpointError, match=r"had 101 samples at .*step-00000007 and has 100 now: .*7 batches of epoch 1 are"
    ):
        _train(_job(epochs=None, steps=18, data=changed), tmp_path / "middle", "serial", resume=True)
    _train(_job(epochs=2, data=changed), tmp_path / "end", "serial", resume=True)
    assert "and has 100 now; the epochs from here on go over these" in (tmp_path / "end/events.jsonl").read_text()


def _train_in_a_given_group(folder: str) -> tuple[list[float], bool]:
    rank = str(torch.distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # nobody listens there
    run = _train(_job(), Path(folder))
    return run.history, torch.distributed.is_initialized()


def test_in_the_process_group_of_another_launcher(tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    """Ray Train and scripts that start torch's group themselves: it is used, and not ended."""
    expected = _train(_job(), tmp_path / "own").history
    for history, still_there in ranks(2, _train_in_a_given_group, str(tmp_path / "given")):
        assert (history, still_there) == (expected, True)


def test_same_run_under_every_plan(tmp_path: Path) -> None:
    serial = _train(_job(), tmp_path / "serial", "serial")
    assert len(serial.history) == 27 == serial.summary["steps"]
    assert serial.history[-1] < 0.8 * serial.history[0]
    for plan in ("data=2", "data=3", "shard=2", "data=2,shard=2"):
        run = _train(_job(), tmp_path / plan, plan)
        torch.testing.assert_close(run.history, serial.history, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run.model.state_dict(), serial.model.state_dict(), rtol=1e-3, atol=1e-4)
        assert run.metrics["accuracy"] == pytest.approx(serial.metrics["accuracy"], abs=1e-9)
        assert run.summary["workers"] == shardwise.Layout.parse(plan).workers


class _Flat(nn.Module):
    """Two layers side by side, of which none is a unit of its own under `shard`: the whole model holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 15), nn.Linear(15, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.second(self.first(inputs).relu())
        return scores


def test_evaluation_leaves_nothing_in_the_next_step(tmp_path: Path) -> None:
    job = _job(model=_Flat, epochs=2, clip_norm=None)
    serial = _train(job, tmp_path / "serial", "serial")
    sharded = _train(job, tmp_path / "shard", "shard=2")
    torch.testing.assert_close(sharded.history, serial.history, rtol=1e-4, atol=1e-5)


def test_measured_run_keeps_a_record_of_every_rank(tmp_path: Path) -> None:
    job = _job(epochs=None, steps=12)  # over the end of an epoch, which is no step
    for plan, calls in (("data=2", 1), ("shard=2", 2)):
        run = _train(job, tmp_path / plan, plan, recording=Recording(3, 4))
        for rank in range(2):
            record = json.loads(record_path(run.folder, rank).read_text())
            rows = record["steps"]
            assert record["rank"] == rank
            assert [row["step"] for row in rows] == list(range(12))
            filled = []
            for row in rows:
                assert {"data", "forward", "backward", "optimizer"} <= set(row["busy"])
                filled.append((sum(row["busy"].values()) + sum(row["waited"].values())) / (row["ended"] - row["began"]))
                assert row["calls"] >= calls and row["began"] < row["arrived"] < row["ended"]
                assert ("spans" in row) == ("flights" in row) == (row["step"] in (3, 4))
            # Not of every step: a rank may lose its core between two readings of the clock.
            assert 0.5 < median(filled) < 1.02
            assert sum(row["waited"]["collective"] for row in rows) > 0
            assert len(rows[3]["flights"]) == rows[3]["calls"]
    plain = _train(job, tmp_path / "plain", "data=2")
    assert not record_path(plain.folder, 0).exists()


def test_run_folder_holds_everything(tmp_path: Path) -> None:
    run = _train(_job(), tmp_path / "run")
    names = {path.name for path in run.folder.path.iterdir()}
    assert {"events.jsonl", "plan.json", "settings.json", "summary.json", "model.safetensors", "checkpoints"} <= names
    events = read_events(run.folder.events_path)
    assert isinstance(events[0], RunEvent) and events[0].ranks == 2
    assert isinstance(events[-1], SummaryEvent)
    assert [event.step for event in events if isinstance(event, EvaluationEvent)] == [9, 18, 27]
    for event in events:
        if isinstance(event, EvaluationEvent):
            assert event.samples == 37
    bare = _net()
    load_model(bare, run.folder.weights_path)
    torch.testing.assert_close(bare.state_dict(), run.model.state_dict(), rtol=0, atol=0)
    summary = json.loads((run.folder.path / "summary.json").read_text())
    for key in ("run", "plan", "layout", "workers", "steps", "loss", "metrics", "samples_per_second", "wall_seconds"):
        assert key in summary
    assert json.loads(run.folder.settings_path.read_text())["batch_size"] == {"value": 12, "source": "job"}


def test_evaluations_and_the_last_checkpoint_are_as_often_as_asked(tmp_path: Path) -> None:
    runs = {}
    for every, steps in ((1, [9, 18, 27]), (2, [18, 27]), (0, [27])):
        run = _train(_job(), tmp_path / str(every), plan="serial", evaluate_every=every, last_checkpoint=every == 1)
        events = read_events(run.folder.events_path)
        assert [event.step for event in events if isinstance(event, EvaluationEvent)] == steps
        assert (checkpoint.latest(run.folder) is not None) == (every == 1)
        runs[every] = run.metrics, [value.tolist() for value in run.model.state_dict().values()]
    assert runs[0] == runs[1] == runs[2]
    with pytest.raises(UserError, match=r"evaluate_every=-1"):
        _train(_job(), tmp_path / "wrong", plan="serial", evaluate_every=-1)
    assert not (tmp_path / "wrong").exists()


def test_predict_gives_outputs_in_order(tmp_path: Path) -> None:
    run = _train(_job(), tmp_path / "run", "serial")
    inputs = torch.randn(29, 9)
    outputs = shardwise.predict(run, inputs, batch_size=8)
    with torch.no_grad():
        torch.testing.assert_close(outputs, run.model(inputs))
    again = shardwise.Run.open(tmp_path / "run", _job())
    assert torch.equal(shardwise.predict(again, inputs, batch_size=8), outputs) and again.metrics == run.metrics
    assert repr(again) == repr(run) and "tensor" not in repr(run.job)
    from_source = shardwise.predict(run, _rows(37, 2))
    assert from_source.shape == (37, 4)
    with pytest.raises(JobError, match="no samples"):
        shardwise.predict(run, torch.zeros(0, 9))


class _Cache:
    """What a model of another library may return beside its numbers."""


class _Talks(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "extra": [x.mean(), None, _Cache()]}


def test_predict_leaves_out_what_has_no_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _train(_job(), tmp_path / "run", "serial")
    monkeypatch.setattr(type(run), "model", _Talks(9, 4))
    inputs = torch.randn(29, 9)
    outputs = shardwise.predict(run, inputs, batch_size=8)
    assert outputs["logits"].shape == (29, 4)
    assert outputs["extra"] == (None, None, None)
    said = capsys.readouterr().err
    assert "['extra'][0] (a single number)" in said
    assert "['extra'][2] (_Cache)" in said
    assert said.count("warning") == 1
    monkeypatch.setattr(type(run), "model", nn.Sequential(nn.Linear(9, 4), _OnlyCache()))
    with pytest.raises(JobError, match="the model returned no tensor with a row for each sample, but a _Cache"):
        shardwise.predict(run, inputs)


class _OnlyCache(nn.Module):
    def forward(self, x: Tensor) -> _Cache:
        return _Cache()


def test_a_run_is_opened_with_its_hyper_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "digits", "--set", "width=3", "--steps", "2", "--out", "run", "--plan", "serial", "--quiet"]
    with pytest.raises(SystemExit, match="0"):
        main(words)
    run = shardwise.Run.open("run", digits)
    assert shardwise.predict(run, torch.zeros(2, 1, 8, 8)).shape == (2, 10) and run.summary["steps"] == 2
    with pytest.raises(CheckpointError, match="build the model as it was trained"):
        _ = shardwise.Run.open("run", digits(width=4)).model
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(FolderError, match=r"has no summary\.json: the training is not finished"):
        shardwise.Run.open("run", digits)


def _in_child(action: Callable[[], Any]) -> int:
    """Run in a process group of its own, as a terminal would, and return its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            action()
            code = 0
        except Stopped:
            code = 3
        finally:
            os._exit(code)
    return pid


def _wait_for_checkpoint(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(path.name >= f"step-{step:08d}" for path in folder.glob("checkpoints/step-*")):
            return
        time.sleep(0.005)
    raise AssertionError("no checkpoint appeared in time")


def _slow_net() -> nn.Module:
    model = _net()
    model.register_forward_pre_hook(lambda module, inputs: time.sleep(0.002))
    return model


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("plan", ["serial", "data=2", "shard=2"])
def test_killed_run_resumes_bit_for_bit(how: signal.Signals, plan: str, tmp_path: Path) -> None:
    job = _job(model=_slow_net, epochs=None, steps=120, schedule=_decay)
    whole = _train(job, tmp_path / "whole", plan, threads=1)
    folder = tmp_path / "killed"
    pid = _in_child(lambda: _train(job, folder, plan, checkpoint_every="7", threads=1))
    _wait_for_checkpoint(folder, 28)
    os.kill(pid, how)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 3)
    again = _train(job, folder, plan, resume=True, threads=1)
    assert 28 <= again.summary["first_step"] < 120
    assert again.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def _decay(optimizer: torch.optim.Optimizer, total_steps: int | None) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps or 1)


def test_resumes_under_other_layouts(tmp_path: Path) -> None:
    whole = _train(_job(), tmp_path / "whole", "serial")
    folder = tmp_path / "moved"
    for plan, steps in (("data=3", 7), ("shard=2", 13), ("data=2,shard=2", 18)):
        _train(_job(epochs=None, steps=steps), folder, plan, resume=folder.exists())
    run = _train(_job(), folder, "data=2", resume=True)
    assert run.summary["first_step"] == 18
    torch.testing.assert_close(run.history, whole.history, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.model.state_dict(), whole.model.state_dict(), rtol=1e-3, atol=1e-4)


class _Fails(nn.Module):
    """Fails once, at a given step, on rank 1, in the way asked for."""

    def __init__(self, marker: Path, how: str) -> None:
        super().__init__()
        self.net = _net()
        self.marker, self.how, self.calls = marker, how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 15 and torch.distributed.get_rank() == 1 and not self.marker.exists():
            self.marker.touch()
            if self.how == "raise":
                raise ValueError("the planted failure")
            os.kill(os.getpid(), signal.SIGKILL)
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize(("how", "words"), [("raise", "the planted failure"), ("kill", "SIGKILL")])
def test_dead_worker_is_named(how: str, words: str, tmp_path: Path) -> None:
    job = _job(model=lambda: _Fails(tmp_path / "marker", how))
    with pytest.raises(RunFailed) as caught:
        _train(job, tmp_path / "run")
    assert caught.value.rank == 1
    assert words in f"{caught.value} {caught.value.details}"
    assert read_events(tmp_path / "run" / "events.jsonl")[-1].kind == "failure"


def test_restart_heals_the_run(tmp_path: Path) -> None:
    whole = _train(_job(model=lambda: _Fails(tmp_path, "raise")), tmp_path / "whole")
    job = _job(model=lambda: _Fails(tmp_path / "marker", "kill"))
    run = _train(job, tmp_path / "run", max_restarts=1, checkpoint_every="4")
    assert (tmp_path / "marker").exists()
    assert run.summary["restarts"] == 1
    assert [e.step for e in read_events(run.folder.events_path) if isinstance(e, RestartEvent)] == [12]
    assert run.history == whole.history


class _CountsSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # not in the look at it before the run starts
            self.seen += x.sum()
        out: Tensor = self.net(x)
        return out


class _Carries(nn.Linear):
    """Carries a state from batch to batch: of its own samples, or of its calls."""

    def __init__(self, *, of_samples: bool) -> None:
        super().__init__(9, 4)
        self.of_samples, self.state = of_samples, torch.zeros(())

    def get_extra_state(self) -> dict[str, Tensor]:
        return {"state": self.state}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.state = state["state"]

    def forward(self, x: Tensor) -> Tensor:
        self.state = 0.5 * self.state + (x.detach().sum() if self.of_samples else 1)
        return super().forward(x)


@pytest.mark.parametrize("of_samples", [True, False])
def test_extra_state_that_workers_have_each_their_own_is_told(tmp_path: Path, *, of_samples: bool) -> None:
    """A resumed run would go on with that of one worker on all, without a word."""
    job = _job(model=lambda: nn.Sequential(_Carries(of_samples=of_samples)), epochs=None, steps=3)
    _train(job, tmp_path / "run", checkpoint_every="1")
    told = (
        (tmp_path / "run" / "events.jsonl")
        .read_text()
        .count("the extra state (get_extra_state) of '0' is not the same on")
    )
    assert told == of_samples


def test_buffer_that_drifts_apart_is_an_error(tmp_path: Path) -> None:
    job = _job(model=_CountsSamples)
    with pytest.raises(RunFailed, match="after step 1 the workers' copies of seen are no longer equal"):
        _train(job, tmp_path / "run")
    assert _train(job, tmp_path / "serial", "serial").summary["steps"] == 27


def _uneven(rank: int, ranks: int) -> Any:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(30 if rank == 0 else 11):
        row = torch.randn(9, generator=generator)
        yield row, row[:4].argmax()


def test_streams_that_run_out_at_different_times(tmp_path: Path) -> None:
    streams = Splits(Stream(_uneven, sharded=True), Stream(_uneven, sharded=True))
    job = _job(
        data=streams, model=lambda: nn.Linear(9, 4), metrics={"first": lambda _, target: (target == 0).float().mean()}
    )
    run = _train(job, tmp_path / "run")
    targets = [int(target) for rank in range(2) for _, target in _uneven(rank, 2)]
    assert run.metrics["first"] == pytest.approx(targets.count(0) / 41)
    samples = sum(event.samples for event in read_events(run.folder.events_path) if event.kind == "steps")  # type: ignore[attr-defined]
    assert samples == 3 * 41
    assert all(loss > 0 for loss in run.history)


def test_a_stream_in_parts_goes_on_in_as_many(tmp_path: Path) -> None:
    job = _job(
        data=Splits(Stream(_uneven, sharded=True)), model=lambda: nn.Linear(9, 4), metrics={}, epochs=None, steps=6
    )
    whole = _train(job, tmp_path / "whole")
    _train(job, tmp_path / "run", pause_after=2)
    with pytest.raises(
        CheckpointError, match=r"read in 2 parts up to .* in the middle of epoch 1, and would be read in 1"
    ):
        _train(job, tmp_path / "run", "serial", resume=True)
    run = _train(job, tmp_path / "run", resume=True)
    assert run.history == whole.history
    assert "what the first 2 batches of epoch 1 took of it is passed over" in run.folder.events_path.read_text()


def test_stream_without_length_equals_serial(tmp_path: Path) -> None:
    arrays = _rows(41, 1)
    assert arrays.targets is not None
    rows = [(arrays.inputs[i], arrays.targets[i]) for i in range(41)]
    job = _job(data=Splits(Stream(lambda: iter(rows)), _rows(20, 2)))
    serial = _train(job, tmp_path / "serial", "serial")
    run = _train(job, tmp_path / "run", "data=2")
    assert run.summary["steps"] == 3 * 4 and run.summary["total_steps"] is None
    torch.testing.assert_close(run.history, serial.history, rtol=1e-4, atol=1e-5)


def _of_its_own(*_: int) -> Any:
    """As from a queue: no two readers are given the same samples."""
    rows = torch.randn(30, 9, generator=torch.Generator().manual_seed(os.getpid()))
    return iter([(row, row[:4].argmax()) for row in rows])


@pytest.mark.parametrize(
    ("part", "stream", "plan"),
    [
        ("train", Stream(_of_its_own), "data=2"),
        ("train", Stream(_of_its_own, sharded=True), "tensor=2"),
        ("test", Stream(_of_its_own), "data=2"),
    ],
    ids=["divided", "split", "evaluated"],
)
def test_ranks_that_are_given_other_samples_by_one_stream_are_told(
    part: str, stream: Stream, plan: str, tmp_path: Path
) -> None:
    splits = Splits(stream) if part == "train" else Splits(_rows(20, 2), stream)
    job = _job(data=splits, model=lambda: nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)), metrics={})
    with pytest.raises(DataError, match="rank 1 read other samples than rank 0 in batch 1"):
        _train(job, tmp_path / "run", plan)


def test_a_stream_that_ends_earlier_for_one_rank_is_told(tmp_path: Path) -> None:
    def growing() -> Any:
        path = tmp_path / "read before"
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return iter(_pairs[:12])
        return iter(_pairs[:24])

    _pairs = [(row, row[:4].argmax()) for row in torch.randn(24, 9, generator=torch.Generator().manual_seed(0))]
    job = _job(data=Splits(Stream(growing)), model=lambda: nn.Linear(9, 4), metrics={}, batch_size=12)
    with pytest.raises(
        DataError, match=r"the stream of rank [01] ended after 1 batches, and that of rank [01] went on"
    ):
        _train(job, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "options", "kind", "words"),
    [
        ({}, {"plan": "data=13"}, PlanError, "1 of 13 workers would have no sample"),
        ({}, {"plan": shardwise.Plan(cuts=("2",))}, PlanError, "cuts and stage_layers belong to a pipeline"),
        ({"micro_batch": 2}, {}, PlanError, "BatchNorm layer '1' needs statistics of the whole global batch"),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, {}, JobError, "LBFGS"),
        (
            {"optimizer": lambda p: torch.optim.SGD(p, lr=-1.0)},
            {},
            JobError,
            r"(?s)Job\.optimizer failed.*Invalid learning rate",
        ),
        ({"schedule": lambda o, steps: steps}, {}, JobError, "must return a torch LRScheduler"),
        ({"schedule": lambda o, steps: ReduceLROnPlateau(o)}, {}, JobError, "ReduceLROnPlateau needs a metric"),
        ({"optimizer": lambda p: "sgd"}, {"plan": "serial"}, JobError, "must return a torch.optim.Optimizer"),
        ({"model": lambda: "net"}, {}, JobError, "must return a torch.nn.Module"),
        ({"model": lambda: nn.LazyLinear(4)}, {}, PlanError, "has no shape yet"),
        ({"loss": lambda o, t: o}, {"plan": "serial"}, JobError, "must be a scalar tensor"),
        ({}, {"checkpoint_every": "0"}, UserError, "at least 1 step"),
        ({}, {"checkpoint_every": "often"}, UserError, "not a duration"),
        ({}, {"keep_last": 0}, UserError, "at least 1 checkpoint"),
        ({}, {"workers": 3}, PlanError, "plan data=2 is for 2 workers, but 3 were given"),
        ({}, {"resume": True}, FolderError, "does not exist"),
        ({}, {"plans": "data=2"}, UserError, "no option 'plans'"),
    ],
)
def test_refusals(
    changes: dict[str, Any], options: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        shardwise.train(_job(**changes), **{"plan": "data=2", "out": tmp_path / "run", "progress": False, **options})


def test_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    _train(_job(epochs=1), tmp_path / "run", "serial")
    with pytest.raises(FolderError, match="already holds a run"):
        _train(_job(), tmp_path / "run", "serial")
    with pytest.raises(FolderError, match="batch_size was 12 and is now 6"):
        _train(_job(batch_size=6), tmp_path / "run", "serial", resume=True)


class _Tied(nn.Module):
    """Refused at its first step, when workers run."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.Embedding(5, 9, sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.bag.weight)


def test_a_start_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    refused, out = _job(model=_Tied, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), tmp_path / "run"
    with pytest.raises(UserError, match="sparse=True but has a dense gradient"):
        _train(refused, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match="sparse=True but has a dense gradient"):
        _train(refused, out)
    assert not list(out.iterdir())
    with pytest.raises(JobError, match="stop here"), shardwise.start(_job(), out=out):
        raise JobError("stop here")
    assert not list(out.iterdir())
    _train(_job(epochs=1), out)


def test_a_folder_that_cannot_be_had_is_refused_before_a_plan_is_chosen(tmp_path: Path) -> None:
    """Choosing may count, price and try plans for seconds."""

    def chooser(*_: Any, **__: Any) -> Plan:
        pytest.fail("a plan was chosen")

    for held in ("run.json", "notes.txt"):
        (tmp_path / held).mkdir()
        (tmp_path / held / held).write_text("{}")
        (tmp_path / held / "summary.json").write_text("{}")
    for out, resume, words in (
        (tmp_path / "run.json", False, "already holds a run"),
        (tmp_path / "notes.txt", False, "is not empty"),
        (tmp_path / "notes.txt" / "notes.txt", False, "cannot make the run folder"),
        (tmp_path / "nowhere", True, "does not exist"),
        (None, True, "resume needs the run folder"),
    ):
        options: dict[str, Any] = {"plan": AUTO, "out": out, "resume": resume, "progress": False}
        with pytest.raises(FolderError, match=words):
            train(_job(), chooser=chooser, **options)
        command = TrainCommand(job="digits", settings=(), changes={}, options=options, given=frozenset())
        with pytest.raises(FolderError, match=words):
            train_command(command, chooser=chooser)


def test_a_start_that_failed_before_its_first_step_may_be_made_again(tmp_path: Path) -> None:
    launcher = os.getpid()

    def fails_in_workers(output: Tensor, target: Tensor) -> Tensor:
        assert os.getpid() == launcher, "never in a worker"
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(RunFailed, match="never in a worker"):
        _train(_job(loss=fails_in_workers), tmp_path / "run")
    assert read_events(tmp_path / "run" / "events.jsonl")[-1].kind == "failure"
    _train(_job(batch_size=24, epochs=1), tmp_path / "run")
    assert {event.kind for event in read_events(tmp_path / "run" / "events.jsonl")} >= {"steps", "summary"}
    with pytest.raises(FolderError, match="already holds a run"):
        _train(_job(), tmp_path / "run")


def test_finished_run_resumed_keeps_its_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = _train(_job(), tmp_path / "run")
    again = shardwise.train(_job(), plan="data=2", out=tmp_path / "run", resume=True)
    assert "nothing left to train: 27 of 27 steps are done" in capfd.readouterr().err
    assert again.summary["loss"] == pytest.approx(first.summary["loss"], abs=0)
    assert again.metrics == first.metrics and again.history == first.history


def test_damage_is_told_with_the_way_out(tmp_path: Path) -> None:
    _train(_job(), tmp_path / "run", checkpoint_every="20")
    newest = tmp_path / "run" / "checkpoints" / "step-00000027"
    file = sorted(newest.glob("*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged.*to continue from step-00000020, move .*step-00000027 out"):
        _train(_job(epochs=4), tmp_path / "run", resume=True)
    assert read_events(tmp_path / "run" / "events.jsonl")[-1].kind == "summary", "a refused resume is no failed run"
    (tmp_path / "run" / "identity.json").write_text("{", encoding="utf-8")
    with pytest.raises(FolderError, match=r"identity.json cannot be read"):
        _train(_job(epochs=4), tmp_path / "run", resume=True)


def test_remarks_say_what_differs(tmp_path: Path) -> None:
    job = _job(model=lambda: nn.Sequential(nn.Linear(9, 4), nn.Dropout(0.1)), epochs=1)
    run = _train(job, tmp_path / "run")
    warnings = [event.message for event in read_events(run.folder.events_path) if event.kind == "warning"]  # type: ignore[attr-defined]
    assert warnings == ["dropout (1) draws other masks than a serial run: equal in distribution, not in value"]


def test_own_loop_equals_train(tmp_path: Path) -> None:
    run = _train(_job(), tmp_path / "run", "serial")
    with shardwise.start(_job()) as live:
        losses = [live.step(batch) for batch in live.batches()]
        metrics = live.evaluate()
    torch.testing.assert_close(losses, run.history, rtol=1e-6, atol=1e-7)
    assert metrics["accuracy"] == run.metrics["accuracy"]


def test_start_takes_the_fields_of_a_job() -> None:
    fields = {item.name: getattr(_job(), item.name) for item in dataclasses.fields(Job)}
    model = _net()
    values = {name: fields[name] for name in ("optimizer", "loss", "data", "batch_size")}
    before = next(model.parameters()).detach().clone()
    with shardwise.start(model=model, **values) as live:
        steps = [live.step(batch) for batch in live.batches()]
    assert len(steps) == 9
    assert live.model is model and not torch.equal(next(model.parameters()), before)
    with pytest.raises(JobError, match="no argument 'batchsize'"):
        shardwise.start(batchsize=3)


@pytest.mark.parametrize("plan", ["serial", "data=2"])
def test_disk_that_is_full_fails_the_run_and_leaves_nothing_half(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that cannot be written is a failed training, not wrong input; the last complete one counts."""
    write = write_aside

    def full(path: Path, data: bytes) -> None:
        if "step-00000020" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_aside", full)
    with pytest.raises(RunFailed, match=r"cannot be written.*No space left.*ended after step 20"):
        _train(_job(), tmp_path / "run", plan, checkpoint_every="10")
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]
    assert read_events(tmp_path / "run" / "events.jsonl")[-1].kind == "failure"
    monkeypatch.undo()
    assert _train(_job(), tmp_path / "run", plan, resume=True).summary["first_step"] == 10
