"""A loop of the user's own: folder, checkpoints, going on, stopping, and what is kept of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from shardwise import errors, metrics
from shardwise.data import Stream
from shardwise.dist.collectives import Group
from shardwise.run import ledger
from shardwise.run import start as starting
from shardwise.run.clock import BETWEEN_STEPS
from shardwise.run.live import LiveRun
from shardwise.run.options import TrainOptions
from shardwise.run.start import start
from shardwise.run.train import train
from shardwise.spec.events import (
    CheckpointEvent,
    EpochEvent,
    EvaluationEvent,
    FailureEvent,
    RestartEvent,
    StepsEvent,
    read_events,
)
from shardwise.spec.job import Job
from shardwise.spec.observations import StallEvent

SAMPLES, BATCH, EPOCHS = 22, 4, 3  # the last batch of an epoch is short
PER_EPOCH = 6


def make_job(**changes: Any) -> Job:
    inputs = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
    targets = (inputs.sum(1) > 0).long()
    values: dict[str, Any] = {
        "model": lambda: nn.Linear(5, 2),
        "data": {"train": (inputs, targets), "test": (inputs[:7], targets[:7])},
        "loss": nn.functional.cross_entropy,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        "schedule": lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "metrics": {"accuracy": metrics.accuracy},
    }
    return Job(**{**values, **changes})


def weights(run: LiveRun) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.model.parameters()]


def uninterrupted() -> tuple[list[float], list[torch.Tensor]]:
    with start(make_job(), device="cpu") as run:
        losses = [run.step(batch) for batch in run.batches()]
        return losses, weights(run)


@pytest.mark.parametrize("broken_off", [1, PER_EPOCH, 9, EPOCHS * PER_EPOCH])
def test_a_loop_goes_on_where_its_last_checkpoint_stands_bit_for_bit(tmp_path: Path, broken_off: int) -> None:
    expected, final = uninterrupted()
    out = tmp_path / "run"
    first: list[float] = []
    with pytest.raises(ZeroDivisionError), start(make_job(), device="cpu", out=out) as run:
        for batch in run.batches():
            first.append(run.step(batch))
            run.state["note"] = f"after {run.steps_taken}"
            if run.steps_taken == broken_off:
                run.save()
            if run.steps_taken == min(broken_off + 2, len(expected)):
                raise ZeroDivisionError
    with start(make_job(), device="cpu", out=out, resume=True) as run:
        assert run.steps_taken == broken_off
        assert run.state == {"note": f"after {broken_off}"}
        rest = [run.step(batch) for batch in run.batches()]
        assert run.epoch == EPOCHS
        assert all(torch.equal(one, other) for one, other in zip(weights(run), final, strict=True))
    assert first[:broken_off] + rest == expected


@pytest.mark.parametrize("stopped", [False, True])
def test_a_checkpoint_holds_what_the_loop_noted_of_its_step(
    tmp_path: Path, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "SETTLE_SECONDS", 0.0)  # a signal is seen at once
    out, every = tmp_path / "run", "never" if stopped else "3"
    ending = errors.Stopped if stopped else ZeroDivisionError
    with pytest.raises(ending), start(make_job(), device="cpu", out=out, checkpoint_every=every) as run:
        for batch in run.batches():
            run.step(batch)
            run.state["seen"] = run.state.get("seen", 0) + 1
            if run.steps_taken == 3 and stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            if run.steps_taken == 5:
                raise ZeroDivisionError
    with start(make_job(), device="cpu", out=out, resume=True) as run:
        assert run.steps_taken >= 3
        assert run.state == {"seen": run.steps_taken}


def test_the_last_checkpoint_holds_what_was_written_after_the_one_before(tmp_path: Path) -> None:
    with start(make_job(), device="cpu", out=tmp_path) as run:
        for batch in run.batches():
            run.step(batch)
        run.state["mean"] = torch.zeros(5000)
        run.save()
        run.state["mean"][2500] = 1.0  # in the middle, which torch does not print
        with torch.no_grad():
            weight = next(run.model.parameters()).mul_(2.0).clone()
    with start(make_job(), device="cpu", out=tmp_path, resume=True) as run:
        assert run.state["mean"].sum() == 1.0
        assert torch.equal(next(run.model.parameters()), weight)


def test_what_cannot_be_saved_is_told_at_the_end(tmp_path: Path) -> None:
    with (
        pytest.raises(errors.RunFailed, match=r"state/f is a builtins\.function"),
        start(make_job(), out=tmp_path / "r") as run,
    ):
        for batch in run.batches(epochs=1):
            run.step(batch)
        run.state["f"] = lambda: 1


def test_a_failed_evaluation_leaves_the_model_in_training() -> None:
    with start(make_job(metrics={"text": lambda *_: "none"}), device="cpu") as run:
        with pytest.raises(errors.JobError, match="text"):
            run.evaluate()
        assert run.model.training


def test_steps_on_one_batch_are_in_a_checkpoint_together(tmp_path: Path) -> None:
    with start(make_job(), device="cpu") as run:
        expected = [run.step(batch) for batch in run.batches() for _ in range(2)]
    first: list[float] = []
    with pytest.raises(ZeroDivisionError), start(make_job(), device="cpu", out=tmp_path, checkpoint_every="1") as run:
        for batch in run.batches():
            first += [run.step(batch)]
            if len(first) == 9:
                raise ZeroDivisionError
            first += [run.step(batch)]
            run.state["steps"] = len(first)
    with start(make_job(), device="cpu", out=tmp_path, resume=True) as run:
        assert run.steps_taken == run.state["steps"] == 8
        assert first[:8] + [run.step(batch) for batch in run.batches() for _ in range(2)] == expected


def test_an_epoch_loop_takes_up_the_epoch_that_was_under_way(tmp_path: Path) -> None:
    expected, _ = uninterrupted()
    losses: list[float] = []
    for _ in range(3):
        with start(make_job(), device="cpu", out=tmp_path / "run", resume="auto", checkpoint_every="never") as run:
            for _ in range(run.epoch, EPOCHS):
                for batch in run.batches(epochs=1):
                    losses.append(run.step(batch))
                    if len(losses) in (4, 11):
                        break
                if len(losses) in (4, 11):
                    break
    assert losses == expected


def test_a_break_goes_on_with_the_next_batch_without_a_folder_too() -> None:
    expected, _ = uninterrupted()
    losses: list[float] = []
    with start(make_job(), device="cpu") as run:
        while run.epoch < EPOCHS:
            for batch in run.batches(epochs=1):
                losses.append(run.step(batch))
                if len(losses) % 4 == 0:
                    break
    assert losses == expected


def test_a_function_that_makes_a_job_is_no_job() -> None:
    """A newcomer's slip: `train(my_job)` for `train(my_job())`."""
    for call in (start, train):
        name = call.__name__
        with pytest.raises(
            errors.JobError, match=rf"{name} was given the function make_job: call it, {name}\(make_job\(\)"
        ):
            call(cast("Any", make_job))
        with pytest.raises(errors.JobError, match=r"was given a Linear: give it a shardwise\.Job"):
            call(cast("Any", nn.Linear(2, 2)))


def test_batches_have_a_length_where_it_is_known() -> None:
    with start(make_job()) as run:
        batches = run.batches()
        assert len(batches) == EPOCHS * PER_EPOCH
        for _, batch in zip(range(PER_EPOCH + 2), batches, strict=False):
            run.step(batch)
        assert len(batches) == EPOCHS * PER_EPOCH
        for epochs in (1, 2):
            rest = run.batches(epochs=epochs)
            assert len(rest) == epochs * PER_EPOCH - run._position.batch
        assert len(rest) == len([run.step(batch) for batch in rest])
    with start(make_job(epochs=None, steps=9)) as run:
        run.step(next(run.batches()))
        assert len(run.batches()) == len([run.step(batch) for batch in run.batches()]) == 8
    with (
        start(make_job(data=Stream(lambda: iter([(torch.zeros(5), 0)])), schedule=None)) as run,
        pytest.raises(TypeError, match="stream"),
    ):
        len(run.batches())


def test_the_jobs_steps_are_counted_over_resumes(tmp_path: Path) -> None:
    job = make_job(epochs=None, steps=8)
    with start(job, device="cpu", out=tmp_path / "run") as run:
        for batch in run.batches():
            run.step(batch)
            if run.steps_taken == 7:
                break
    for left in (1, 0):
        with start(job, device="cpu", out=tmp_path / "run", resume=True) as run:
            assert len([run.step(batch) for batch in run.batches()]) == left


def test_what_the_folder_keeps(tmp_path: Path) -> None:
    out = tmp_path / "run"
    losses = []
    with start(make_job(), device="cpu", out=out, checkpoint_every="5", keep_last=2) as run:
        for _ in range(EPOCHS):
            losses += [run.step(batch) for batch in run.batches(epochs=1)]
            found = run.evaluate()
        assert run.folder is not None
        assert run.folder.path == out
        final = weights(run)
    events = list(read_events(out / "events.jsonl"))
    noted = {
        step: loss
        for event in events
        if isinstance(event, StepsEvent)
        for step, loss in enumerate(event.losses, event.first_step)
    }
    assert list(noted) == list(range(EPOCHS * PER_EPOCH))
    assert list(noted.values()) == pytest.approx(losses)
    ends = [event for event in events if isinstance(event, EpochEvent)]
    assert [event.step for event in ends] == [6, 12, 18]
    sizes = torch.tensor([4.0, 4, 4, 4, 4, 2])
    assert ends[1].loss_mean == pytest.approx(float((torch.tensor(losses[6:12]) * sizes).sum() / SAMPLES))
    assert [event.step for event in events if isinstance(event, CheckpointEvent)] == [5, 10, 15, 18]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000015", "step-00000018"]
    assert [event.metrics for event in events if isinstance(event, EvaluationEvent)][-1] == pytest.approx(found)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"], summary["metrics"]) == (18, 3, found)
    from safetensors.torch import load_model

    bare = nn.Linear(5, 2)
    load_model(bare, out / "model.safetensors")
    assert all(torch.equal(one, other) for one, other in zip(bare.parameters(), final, strict=True))


def test_a_signal_saves_and_ends_the_loop(tmp_path: Path) -> None:
    expected, _ = uninterrupted()
    out = tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    first: list[float] = []
    with pytest.raises(errors.Stopped, match=r"resume=True"), start(make_job(), device="cpu", out=out) as run:
        for batch in run.batches():
            first.append(run.step(batch))
            if len(first) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert json.loads((out / "summary.json").read_text())["stopped"] is True
    with start(make_job(), device="cpu", out=out, resume=True) as run:
        assert run.steps_taken in (len(first), len(first) + 1)  # the step that noticed gives no loss back
        rest = [run.step(batch) for batch in run.batches()]
    assert rest == expected[len(expected) - len(rest) :]
    assert len(first) + len(rest) in (len(expected), len(expected) - 1)


def test_an_error_in_the_loop_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), start(make_job(), device="cpu", out=tmp_path / "run") as run:
        run.step(next(run.batches()))
        _ = 1 // 0
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert isinstance(events[-1], FailureEvent)
    assert "1 // 0" in (events[-1].details or "")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_time_between_steps_is_the_users(tmp_path: Path) -> None:
    with start(make_job(), device="cpu", out=tmp_path / "run") as run:
        for batch in run.batches(epochs=1):
            assert run.assembly.clock.current != BETWEEN_STEPS
            run.step(batch)
            assert run.assembly.clock.current == BETWEEN_STEPS
        run.close()
        run.close()  # no harm


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: start(make_job(), device="cpu", resume=True), "resume needs the run folder"),
        (lambda out: start(make_job(), device="cpu", out=out, resume=True), "does not exist"),
        (lambda out: start(make_job(), device="cpu", out=out, checkpoint_every="0"), "at least 1 step"),
        (lambda out: start(make_job(), device="cpu", out=out, keep_last=0), "at least 1 checkpoint"),
        (lambda out: start(make_job(), device="cpu").save(), r"give start\(\.\.\., out=DIR\)"),
        (
            lambda out: start(make_job(), device="cpu").step(cast(Any, (1, 2))),
            r"step\(\) was given a tuple: give it what batches\(\) gives",
        ),
    ],
)
def test_refusals(tmp_path: Path, call: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        call(tmp_path / "run")


def test_a_folder_keeps_one_run_and_only_the_same(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with start(make_job(), device="cpu", out=out) as run:
        run.step(next(run.batches()))
        with pytest.raises(errors.FolderError, match="in use by process"):
            start(make_job(), device="cpu", out=out, resume=True)
    with pytest.raises(errors.FolderError, match="already holds a run"):
        start(make_job(), device="cpu", out=out)
    with pytest.raises(errors.FolderError, match="batch_size was 4 and is now 5"):
        start(make_job(batch_size=5), device="cpu", out=out, resume=True)


SCRIPT = """
import os, sys
import shardwise
sys.path.insert(0, {here!r})
from test_live import make_job

with shardwise.start(make_job(), device="cpu", out={out!r}, checkpoint_every="4") as run:
    for batch in run.batches():
        run.step(batch)
        if run.rank == 1 and run.steps_taken == 10 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(7)
"""


def test_workers_that_torchrun_starts_again_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    expected, final = uninterrupted()
    out = tmp_path / "run"
    (tmp_path / "loop.py").write_text(SCRIPT.format(here=str(Path(__file__).parent), out=str(out)))
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, "--max-restarts", "1", "loop.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = list(read_events(out / "events.jsonl"))
    (restart,) = [event for event in events if isinstance(event, RestartEvent)]
    assert restart.step == 8
    noted = {
        step: loss
        for event in events
        if isinstance(event, StepsEvent)
        for step, loss in enumerate(event.losses, event.first_step)
    }
    assert [noted[step] for step in range(len(expected))] == pytest.approx(expected, abs=1e-5)
    from safetensors.torch import load_file

    stored = load_file(out / "model.safetensors")
    assert torch.allclose(stored["weight"], final[0], atol=1e-5)


def test_the_loop_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    code = text.split("`my_kept_loop.py`:\n\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [f"epoch {n}" for n in range(5)]
    exec(code, {})
    assert capsys.readouterr().out == ""
    assert (tmp_path / "runs" / "kept" / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["between", "inside"])
def test_only_a_step_can_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(starting, "TrainOptions", partial(TrainOptions, stall_seconds=0.2))
    slow = threading.Event()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if slow.is_set():
            time.sleep(4.0)  # half a second to notice, one and a half to ask the ranks
        return nn.functional.cross_entropy(output, target)

    with start(make_job(loss=loss), device="cpu", out=tmp_path / "run") as run:
        for number, batch in enumerate(run.batches(epochs=1)):
            if number == 3 and place == "inside":
                slow.set()
            run.step(batch)
            slow.clear()
            if number == 3 and place == "between":
                time.sleep(4.0)  # half a second to notice, one and a half to ask the ranks
    told = [event for event in read_events(tmp_path / "run" / "events.jsonl") if isinstance(event, StallEvent)]
    assert bool(told) is (place == "inside")


def _under_torchrun(script: Path) -> subprocess.CompletedProcess[str]:
    """The script on two workers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


OWN_STEPS = """
import sys
import shardwise
sys.path.insert(0, {here!r})
from test_live import make_job

with shardwise.start(make_job(), device="cpu") as run:
    for batch in run.batches():
        run.model(batch.inputs).sum().backward()
        run.optimizer.step()
"""


ONE_EVALUATES = """
import torch
from torch import nn
import shardwise

inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
with shardwise.start(
    model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
    data=(inputs, (inputs[:, 0] > 0).long()),
    loss=nn.functional.cross_entropy,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    batch_size=8,
) as run:
    for batch in run.batches():
        run.step(batch)
        if run.rank == 0:
            run.model.eval()
            run.model(inputs[:2])
            if run.steps_taken == 1:
                run.model.train()
"""


OTHER_RATE = """
import sys
import shardwise
sys.path.insert(0, {here!r})
from test_live import make_job

with shardwise.start(make_job(), device="cpu") as run:
    for batch in run.batches():
        run.step(batch)
        if run.rank == 0:
            run.optimizer.param_groups[0]["lr"] *= 0.5
"""


def test_copies_that_are_not_equal_are_told_without_a_folder_too(tmp_path: Path) -> None:
    script = tmp_path / "other_rate.py"
    script.write_text(OTHER_RATE.format(here=str(Path(__file__).parent)))
    done = _under_torchrun(script)
    assert done.returncode == 1
    assert re.search(r"RunFailed: after step \d+ the workers' copies of .* are no longer equal", done.stderr)


def test_a_worker_that_trains_in_evaluation_mode_alone(tmp_path: Path) -> None:
    """It would train without dropout, and nobody would be told."""
    script = tmp_path / "one_evaluates.py"
    script.write_text(ONE_EVALUATES)
    done = _under_torchrun(script)
    assert done.returncode == 1
    assert "JobError: step 3: the model is in training mode (model.train()) on some workers and" in done.stderr
    exec(ONE_EVALUATES, {})  # one worker may


ONE_SAVES = """
import sys
import shardwise
sys.path.insert(0, {here!r})
from test_live import make_job

with shardwise.start(make_job(), device="cpu", out={out!r}) as run:
    for number, batch in enumerate(run.batches()):
        run.step(batch)
        if number == 2 and run.rank == 0:
            run.save()
"""


def test_a_worker_that_saves_alone(tmp_path: Path) -> None:
    """A checkpoint is of all workers: it would wait for the others for as long as they might take."""
    script = tmp_path / "one_saves.py"
    script.write_text(ONE_SAVES.format(here=str(Path(__file__).parent), out=str(tmp_path / "run")))
    done = _under_torchrun(script)
    assert done.returncode == 1
    assert "RunFailed: the workers did not come to the same message" in done.stderr
    assert "number 0 came to save()" in done.stderr


def test_what_a_run_is_shown_as(tmp_path: Path) -> None:
    with start(make_job(), device="cpu", out=tmp_path / "run") as run:
        run.step(next(run.batches()))
        assert repr(run) == f"LiveRun({tmp_path / 'run'}: {run.job.name}, serial, 1 worker, 1 steps, 0 epochs)"


def test_a_loop_that_steps_the_optimizer_itself_on_several_workers(tmp_path: Path) -> None:
    """Each worker would train a model of its own, and nobody would be told."""
    script = tmp_path / "own_steps.py"
    script.write_text(OWN_STEPS.format(here=str(Path(__file__).parent)))
    done = _under_torchrun(script)
    assert done.returncode == 1
    assert "JobError: the weights changed, but the batch was not given to run.step()" in done.stderr
    with start(make_job(), device="cpu") as run:  # one worker may
        for batch in run.batches():
            run.model(cast(Any, batch.inputs)).sum().backward()
            run.optimizer.step()


SEVERAL = """
import sys
sys.path.insert(0, {here!r})
import shardwise
from shardwise.dist.collectives import Group
from test_live import make_job

for number in range(5):
    with shardwise.start(make_job(), device="cpu") as run:
        assert Group.world().gather_objects(number) == [number, number]
        assert run.step(next(iter(run.batches()))) > 0
    print(f"run {{number}};", end="", flush=True)  # one piece, or that of the other worker may stand in it
"""


def test_one_script_has_several_runs_one_after_another(tmp_path: Path) -> None:
    """torchrun keeps one store, where ranks would find the addresses of a group that is gone."""
    script = tmp_path / "several.py"
    script.write_text(SEVERAL.format(here=str(Path(__file__).parent)))
    done = _under_torchrun(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run 4;") == 2


def _losses_of_a_short_batch() -> list[float]:
    world = Group.world()
    own = {"RANK": world.rank, "LOCAL_RANK": world.rank, "WORLD_SIZE": world.size, "MASTER_ADDR": "-", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in own.items()}
    inputs = torch.arange(45.0, dtype=torch.float64).view(9, 5) / 45
    job = make_job(model=lambda: nn.Linear(5, 2).double(), data=(inputs, torch.arange(9) % 2), batch_size=8, epochs=1)
    with start(job, device="cpu") as run:
        return [run.step(batch) for batch in run.batches()]


def test_a_rank_without_samples_in_a_model_of_float64(ranks: Callable[..., list[Any]]) -> None:
    """What it adds to the loss is of the same type as what the others do."""
    (alone,) = ranks(1, _losses_of_a_short_batch)
    for losses in ranks(2, _losses_of_a_short_batch):
        assert losses == pytest.approx(alone, rel=1e-12)


NOTED = """
import sys
sys.path.insert(0, {here!r})
import shardwise
from test_live import make_job

with shardwise.start(make_job(), device="cpu", out={out!r}) as run:
    for batch in run.batches():
        run.step(batch)
    run.save()
    if run.rank == 0:
        run.state["note"] = "of one rank"
"""


def test_one_rank_may_note_something_at_the_end(tmp_path: Path) -> None:
    """It alone would write the last checkpoint, and wait for the others."""
    script, out = tmp_path / "noted.py", tmp_path / "run"
    script.write_text(NOTED.format(here=str(Path(__file__).parent), out=str(out)))
    done = _under_torchrun(script)
    assert done.returncode == 0, done.stderr
    with start(make_job(), device="cpu", out=out, resume=True) as run:
        assert run.state == {"note": "of one rank"}
