"""The plan of a training that names none: short runs take the rule, long ones are planned and tried, nothing changes."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as package
from shardwise.advise import advice, auto, longer
from shardwise.advise.contest import Contender
from shardwise.advise.kept import DOUBTFUL, code_of, plans_path, recall, remember, signature
from shardwise.advise.trial import Tried, try_plan
from shardwise.cli.main import shardwise
from shardwise.data.source import Splits, as_splits
from shardwise.errors import Stopped
from shardwise.probe.place import measuring
from shardwise.run.choose import choose_plan
from shardwise.run.jobfile import load_job
from shardwise.run.options import TrainOptions, resolve_plan
from shardwise.run.train import train
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan


def job_of(model: Any = lambda: nn.Linear(6, 3), **changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": model,
        "data": (torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3),
        "loss": F.cross_entropy,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "batch_size": 32,
        "steps": 3,
    }
    return Job(**{**values, **changes})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(auto, "is_busy", lambda: False)


def choose(job: Job, **changes: Any) -> Plan:
    return auto.automatic(job, **{"workers": 2, "threads": None, "device": "cpu", **changes})


def pretend_long(monkeypatch: pytest.MonkeyPatch, machine: Machine, seconds: float = 300.0) -> None:
    """A run whose first step says that all of it will take `seconds` on two workers."""
    monkeypatch.setattr(auto, "first_step_apart", lambda job, splits: 2 * seconds / (job.steps or 1))
    monkeypatch.setattr(longer, "cached_machine", lambda: machine)


def test_a_short_run_takes_the_rule_and_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of()
    plan = choose(job)
    rule = choose_plan(job, workers=2, threads=None, device="cpu")
    assert (plan.layout, plan.threads) == (rule.layout, rule.threads)
    assert any("short run" in reason for reason in plan.reasons)
    monkeypatch.setattr(auto, "first_step_apart", lambda job, splits: pytest.fail("measured again"))
    assert choose(job).layout == rule.layout
    # Another batch, another model and another number of workers are other questions.
    for other in (job_of(batch_size=20), job_of(lambda: nn.Linear(6, 3, bias=False))):
        with pytest.raises(pytest.fail.Exception):
            choose(other)
    with pytest.raises(pytest.fail.Exception):
        choose(job, workers=3)


def test_a_run_that_more_workers_cannot_pay_for_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "first_step_apart", lambda job, splits: 1e-3)
    monkeypatch.setattr(auto, "usable_cores", lambda: 2)
    monkeypatch.setattr("shardwise.run.choose.usable_cores", lambda: 2)
    plan = choose(job_of(steps=300), workers=None)
    assert (plan.layout, plan.threads) == (Layout(), 1)
    assert plan.reasons == (
        "300 ms of work for one worker: more would take longer to start and to meet than they save",
    )
    # A batch for one worker only: that one keeps all cores.
    alone = choose(job_of(steps=300, batch_size=20), workers=None)
    assert (alone.layout, alone.threads) == (Layout(), 2)
    # Two workers that were asked for, a run that they shorten by more than they cost, and one by its evaluations.
    assert choose(job_of(steps=300), workers=2).layout.workers == 2
    tests = (torch.randn(32 * 30, 6), torch.zeros(32 * 30).long())
    job = job_of(steps=301, data={"train": job_of().data, "test": tests})
    assert choose(job, workers=None).layout.workers == 2
    monkeypatch.setattr(auto, "first_step_apart", lambda job, splits: 1e-2)
    assert choose(job_of(steps=302), workers=None).layout.workers == 2


def test_a_long_run_is_planned_and_says_what_it_expects(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    pretend_long(monkeypatch, machine)
    plan = choose(job_of(), trial=False)
    assert plan.prediction is not None
    assert plan.prediction.step_seconds > 0
    assert plan.layout.workers == 2
    assert "predicted" in plan.reasons[0]
    again = choose(job_of(), trial=False)
    assert again.layout == plan.layout
    assert "decided before" in again.reasons[-1]


def test_a_long_run_tries_its_best_plans(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    pretend_long(monkeypatch, machine, seconds=1e6)
    monkeypatch.setattr(longer, "BUDGET_SECONDS", 1e4)  # however long counting takes on a busy machine
    tried: list[Plan] = []
    others = 0.0

    def attempt(job: Job, splits: Splits, plan: Plan, seconds: float, limit: float) -> Tried:
        tried.append(plan)
        step = 0.5 if plan.layout.workers == 1 else 50.0
        return Tried(plan, step, step, 1e8, 5, 0.1, others_cores=others)

    monkeypatch.setattr(longer, "_try", attempt)
    monkeypatch.setattr(longer, "contender", lambda item: Contender(1.0 / item.plan.layout.workers, 0.5, 1, 0.5))
    plan = choose(job_of(), workers=None)
    assert len({str(one) for one in tried}) > 1
    assert plan.layout == Layout()
    assert plan.prediction is not None
    assert plan.prediction.step_seconds == pytest.approx(0.5, rel=0.01)
    assert plan.reasons[0].startswith(f"tried {len({str(one) for one in tried})} plans")
    assert "; fastest with a chance of " in plan.reasons[0]
    # What other programs spoiled is no reason to leave the prediction.
    plans_path().unlink()
    others = 10.0
    spoiled = choose(job_of(), workers=None)
    assert spoiled.layout != Layout()
    assert "other programs spoiled the trials" in spoiled.reasons[0]


def test_plans_that_cannot_run_are_not_chosen(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    pretend_long(monkeypatch, machine)
    # Sequences there are none of: the context axis is refused by the run's own check.
    plan = choose(job_of(), trial=False)
    assert plan.layout.context == 1


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"nodes": 2}, {"workers": 1}])
def test_where_nothing_can_be_measured_the_rule_decides(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "first_step_apart", lambda job, splits: pytest.fail("measured"))
    assert choose(job_of(), **changes).prediction is None


def test_a_busy_machine_takes_the_rule_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    pretend_long(monkeypatch, machine)
    monkeypatch.setattr(auto, "is_busy", lambda: True)
    assert any("other programs" in reason for reason in choose(job_of()).reasons)
    assert not plans_path().exists()


def test_two_commands_do_not_measure_each_other(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    pretend_long(monkeypatch, machine)
    with measuring():
        assert any("other programs" in reason for reason in choose(job_of(), trial=False).reasons)
    assert not plans_path().exists()
    assert choose(job_of(), trial=False).prediction is not None


def test_a_plan_from_doubtful_figures_says_so_and_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    assert machine.measured is not None
    pretend_long(monkeypatch, replace(machine, measured=replace(machine.measured, others_cores=9.0)))
    monkeypatch.setattr(advice, "is_busy", lambda: True)
    assert DOUBTFUL in choose(job_of(), trial=False).reasons
    assert not plans_path().exists()
    # In quiet a long run measures again.
    monkeypatch.setattr(advice, "is_busy", lambda: False)
    monkeypatch.setattr(longer, "probe", lambda quick: machine)
    pretend = choose(job_of(), trial=False, workers=None)
    assert pretend.prediction is None or DOUBTFUL in pretend.reasons  # too short for that
    monkeypatch.setattr(auto, "first_step_apart", lambda job, splits: 1e6)
    assert DOUBTFUL not in choose(job_of(), trial=False).reasons
    assert plans_path().exists()


def test_a_job_that_fails_fails_in_the_training_and_not_in_the_planning() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of paint")

    assert choose(job_of(Broken)).layout == Layout(data=2)


# What is kept


def test_damaged_kept_plans_are_forgotten() -> None:
    key = signature(job_of(), workers=2, threads=None, place={})
    assert key is not None
    remember(key, Plan(layout=Layout(data=2), threads=1))
    kept = recall(key)
    assert kept is not None
    assert kept.layout == Layout(data=2)
    for text in ("not json", "[]", json.dumps({key: {"layout": "diagonal=2"}}), json.dumps({key: 3})):
        plans_path().write_text(text)
        assert recall(key) is None
    assert recall(None) is None


FILE = """
import torch
from torch import nn
from shardwise import Job

class Model(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.layer, self.times = nn.Linear(6, 6), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x)
        return x

def work(times: int = 1, edge: int = 6):
    loss = nn.functional.cross_entropy
    data = (torch.randn(8, edge), torch.arange(8) % 3)
    return Job(model=lambda: Model(times), data=data, loss=loss, optimizer=torch.optim.SGD, batch_size=4, steps=3)
"""


def test_what_was_decided_holds_for_the_code_and_the_data_it_was_decided_for(tmp_path: Path) -> None:
    def of(text: str, **settings: str) -> str | None:
        path = tmp_path / f"jobfile{len(list(tmp_path.glob('jobfile*')))}.py"
        path.write_text(text)
        job = load_job(f"{path}", settings).job
        return signature(replace(job, name="work"), workers=2, threads=None, place={})

    first = of(FILE)
    assert first is not None
    assert of(FILE) == first
    others = [
        of(FILE.replace("x = self.layer(x)", "x = self.layer(x) + torch.fft.fft2(x).real")),
        of(FILE.replace("return x", "return x.sin()")),
        of(FILE, times="3"),
        of(FILE, edge="600"),
    ]
    assert None not in others
    assert len({first, *others}) == 5


def test_code_of_a_notebook_counts_by_itself() -> None:
    def made(text: str) -> set[str]:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(text, "<cell 3>", "exec"), space)  # as a notebook does
        return code_of([space["loss"]])

    assert made("def loss(a, b): return a - b") == made("def loss(a, b): return a - b  # the same")
    assert made("def loss(a, b): return a - b") != made("def loss(a, b): return a * b")
    assert made("def loss(a, b): return a - 1") != made("def loss(a, b): return a - 2")
    assert code_of([functools.partial(max, 3)]) != code_of([functools.partial(max, 4)])
    assert code_of([F.cross_entropy, torch.optim.SGD]) == set()


# Trials


def test_a_trial_takes_real_steps_and_leaves_no_trace() -> None:
    job = job_of()
    splits = as_splits(job.data)
    state = torch.get_rng_state()
    for plan in (Plan(threads=1), Plan(layout=Layout(data=2), threads=1)):
        seen = try_plan(job, splits, plan, step_budget_seconds=0.05)
        assert seen.failure is None
        assert seen.steps >= 3
        assert 0 < seen.fastest_seconds <= seen.step_seconds
        assert seen.memory_bytes > 10e6
    assert torch.equal(state, torch.get_rng_state())


class Bomb(nn.Module):
    """Ends its process as the system does when memory is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("plan", [Plan(threads=1), Plan(layout=Layout(data=2), threads=1)], ids=str)
def test_a_trial_that_is_killed_is_an_answer(plan: Plan) -> None:
    job = job_of(Bomb)
    seen = try_plan(job, as_splits(job.data), plan)
    assert seen.failure is not None
    assert "SIGKILL" in seen.failure


class Hung(nn.Module):
    """Waits for what never comes, and lets no Python run meanwhile: no thread of this process could end it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        ctypes.PyDLL(None).pause()
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("plan", [Plan(threads=1), Plan(layout=Layout(data=2), threads=1)], ids=str)
def test_a_trial_that_hangs_is_an_answer(plan: Plan) -> None:
    job = job_of(Hung)
    seen = try_plan(job, as_splits(job.data), plan, limit_seconds=1.0)
    assert seen.failure == "it was ended after 1 s"


class Interrupted(nn.Module):
    """As if the user, or a scheduler, ended the command during a trial."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
        out: Tensor = self.layer(x)
        return out


def test_a_signal_during_a_trial_stops_the_command_and_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    job = job_of(Interrupted)
    with pytest.raises(Stopped, match="while plans were tried"):
        try_plan(job, as_splits(job.data), Plan(layout=Layout(data=2), threads=1))

    def stopped(*given: Any) -> Tried:
        raise Stopped("stopped")

    pretend_long(monkeypatch, machine, seconds=1e6)
    monkeypatch.setattr(longer, "BUDGET_SECONDS", 1e4)  # however long counting takes on a busy machine
    monkeypatch.setattr(longer, "contender", lambda item: Contender(1.0 / item.plan.layout.workers, 0.5, 1, 0.5))
    monkeypatch.setattr(longer, "_try", stopped)
    with pytest.raises(Stopped):
        choose(job_of(), workers=None)
    assert not plans_path().exists()


class Victim(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"adjusted by {Path('/proc/self/oom_score_adj').read_text()}")


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux")
@pytest.mark.parametrize("plan", [Plan(threads=1), Plan(layout=Layout(data=2), threads=1)], ids=str)
def test_where_memory_is_gone_the_trial_goes_first(plan: Plan) -> None:
    before = Path("/proc/self/oom_score_adj").read_text()
    job = job_of(Victim)
    seen = try_plan(job, as_splits(job.data), plan)
    assert seen.failure is not None
    assert "adjusted by 1000" in seen.failure
    assert Path("/proc/self/oom_score_adj").read_text() == before


# The seam in `run`


def test_auto_asks_the_chooser_and_a_named_plan_does_not() -> None:
    asked: list[str] = []

    def chooser(job: Job, *, workers: int | None, threads: int | None, device: str, nodes: int) -> Plan:
        asked.append(device)
        return Plan(layout=Layout(data=2), threads=1)

    def resolve(plan: str | None, world: int | None = None) -> Plan:
        return resolve_plan(job_of(), TrainOptions(plan=plan), device="cpu", world=world, chooser=chooser)

    assert resolve("auto").layout == Layout(data=2)
    assert resolve("serial").layout == Layout()
    resolve(None)
    # Ranks that run already must agree without asking each other.
    assert resolve("auto", world=3).layout == Layout(data=3)
    assert asked == ["cpu"]


def test_a_resumed_run_keeps_its_plan(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(job_of(steps=2), plan="data=2", threads=1, out=folder, progress=False)

    def never(job: Job, **options: Any) -> Plan:
        raise AssertionError("the chooser was asked")

    options = TrainOptions(plan="auto", out=folder, resume=True)
    assert resolve_plan(job_of(steps=4), options, device="cpu", world=None, chooser=never).layout == Layout(data=2)
    asked = TrainOptions(plan=None, out=folder, resume=True, workers=1)
    assert resolve_plan(job_of(steps=4), asked, device="cpu", world=None).layout == Layout()


def test_the_command_expects_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(auto, "first_step_apart", lambda job, splits: 1e3)
    monkeypatch.setattr(longer, "cached_machine", lambda: machine)
    answer = CliRunner().invoke(
        shardwise,
        ["train", "digits", "--workers", "2", "--no-trial", "--steps", "4", "--out", str(tmp_path / "run"), "--json"],
    )
    assert answer.exit_code == 0, answer.output
    assert "expected: " in answer.stderr
    assert "predicted   " in answer.stderr
    assert "measured" in answer.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["prediction"]["step_seconds"] > 0
    document = json.loads(answer.stdout)
    assert document["steps"] == 4
    assert document["predicted"]["step_seconds"] == plan["prediction"]["step_seconds"]
    assert document["predicted"]["measured_step_seconds"] == pytest.approx(document["train_seconds"] / 4)
    assert document["predicted"]["measured_memory_bytes"] > 0


def test_the_package_plans_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def chooser(job: Job, **options: Any) -> Plan:
        asked.append(str(options["device"]))
        return Plan(threads=1)

    monkeypatch.setattr(auto, "automatic", chooser)
    package.train(job_of(), out=tmp_path / "one", progress=False, workers=1)
    assert asked == []
    run = package.train(job_of(), plan="auto", out=tmp_path / "other", progress=False)
    assert asked == ["cpu"]
    assert run.summary["layout"] == "serial"
