"""Prices of trainings that share the machine: what they are made of, what is kept, and when none are made."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.advise import trials
from shardwise.data.source import as_splits
from shardwise.planner.jobstep import estimate_job
from shardwise.probe import length
from shardwise.probe.facts import facts_apart
from shardwise.probe.place import cached_path, this_place
from shardwise.spec.job import Job
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan


def made_job(**given: Any) -> Job:
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    return Job(
        model=lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)),
        data={"train": (inputs, torch.zeros(512, dtype=torch.long))},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        **{"loss": nn.functional.cross_entropy, "batch_size": 128, "epochs": 3, **given},
    )


@pytest.fixture
def figures(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's figures in a folder of their own; nobody else is busy; no sweep is short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cached_path(this_place())
    path.parent.mkdir(parents=True)
    machine.write(path)
    monkeypatch.setattr(trials, "is_busy", lambda: False)
    monkeypatch.setattr(trials, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr(trials, "BUDGET_SHARE", 1e9)


def test_each_width_has_a_price_that_is_kept(figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trials.price_trials(made_job(), widths=[1, 2], cores=2, trainings=3)
    assert not isinstance(found, str)
    assert [str(item.plan.layout) for item in found] == ["serial", "data=2"]
    for item in found:
        assert 1e-5 < item.step_seconds < 1.0
        assert 1 << 20 < item.memory_bytes < 1 << 30  # without the process itself, which is a few hundred MiB
    assert "times that (4 of 5)" in found[0].confidence

    def forbidden(*given: Any, **named: Any) -> None:
        raise AssertionError("what is kept is not counted again")

    monkeypatch.setattr(trials, "facts_apart", forbidden)
    monkeypatch.setattr(trials, "first_step_apart", forbidden)
    again = trials.price_trials(made_job(), widths=[1, 2], cores=2, trainings=3)
    assert not isinstance(again, str)
    assert [(item.step_seconds, item.memory_bytes) for item in again] == [
        (item.step_seconds, item.memory_bytes) for item in found
    ]
    with pytest.raises(AssertionError, match="not counted again"):  # another batch is another price
        trials.price_trials(made_job(batch_size=64), widths=[1, 2], cores=2, trainings=3)


def test_a_slow_first_step_is_said(
    figures: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else has been said by then, so the command would seem to hang."""
    said = threading.Event()

    def slow(*given: Any) -> float:
        assert said.wait(20)
        return 1e-9

    def tell(text: str) -> None:
        assert "timing the first step of the job" in text
        said.set()

    monkeypatch.setattr(trials, "SHORT_SECONDS", 20.0)
    monkeypatch.setattr(length, "tell", tell)
    monkeypatch.setattr(trials, "first_step_apart", slow)
    monkeypatch.setattr(trials, "told_if_slow", functools.partial(length.told_if_slow, seconds=0.01))
    assert "pricing pays" in str(trials.price_trials(made_job(batch_size=48), widths=[1], cores=1, trainings=1))
    said.clear()
    with length.told_if_slow(False, seconds=0.0), length.told_if_slow(True, seconds=60.0):
        assert not said.is_set()


def test_trainings_beside_each_other_are_no_faster_than_one_alone(machine: Machine) -> None:
    job = made_job()
    facts = facts_apart(job, as_splits(job.data), thorough=False)
    assert machine.measured is not None
    cores = machine.measured.cores
    alone, full, crowded = (estimate_job(facts, machine, Plan(threads=1), copies=n) for n in (1, cores, 4 * cores))
    assert crowded.step_seconds > 2 * full.step_seconds
    assert alone.step_seconds <= 1.05 * full.step_seconds
    assert full.room_bytes == alone.room_bytes / cores


@pytest.mark.usefixtures("figures")
def test_the_reason_for_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(output: Any, target: Any) -> Any:
        raise ValueError("no such loss")

    told = trials.price_trials(made_job(loss=broken), widths=[1], cores=2, trainings=3)
    assert isinstance(told, str) and "no such loss" in told
    monkeypatch.setattr(trials, "is_busy", lambda: True)
    busy = trials.price_trials(made_job(epochs=5), widths=[1], cores=2, trainings=3)
    assert isinstance(busy, str) and "other programs" in busy
    monkeypatch.setattr(trials, "SHORT_SECONDS", 1e9)
    short = trials.price_trials(made_job(epochs=6), widths=[1], cores=2, trainings=3)
    assert isinstance(short, str) and "pays from" in short
