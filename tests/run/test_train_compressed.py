"""Training with inexact savers: said, learned from, and gone on with bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.run.checkpoint import latest, read_manifest
from shardwise.run.folder import RunFolder
from shardwise.spec.events import WarningEvent, read_events
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan


def _job() -> Job:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(101, 9, generator=generator)
    return Job(
        name="rows",
        model=lambda: nn.Sequential(nn.Linear(9, 15), nn.Tanh(), nn.Linear(15, 4)),
        data=Splits(Arrays((inputs, inputs[:, :4].argmax(1)))),
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9),
        batch_size=12,
        epochs=4,
        clip_norm=1.0,
    )


def _train(out: Path, plan: Plan | None, **options: Any) -> shardwise.Run:
    return shardwise.train(_job(), plan=plan, out=out, progress=False, **options)


PLANS = {
    "compression=bf16": Plan(layout=Layout(data=2), compression="bf16"),
    "compression=powersgd": Plan(layout=Layout(data=2), compression="powersgd", compression_rank=1),
    "local_steps=5": Plan(layout=Layout(data=2), local_steps=5),
}


@pytest.mark.parametrize("how", list(PLANS))
def test_said_learned_and_resumed(tmp_path: Path, how: str) -> None:
    plan = PLANS[how]
    exact = _train(tmp_path / "exact", plan.exact())
    assert not [event for event in read_events(tmp_path / "exact" / "events.jsonl") if isinstance(event, WarningEvent)]
    run = _train(tmp_path / "whole", plan, checkpoint_every="9")
    assert how in run.summary["plan"]
    said = [event for event in read_events(tmp_path / "whole" / "events.jsonl") if isinstance(event, WarningEvent)]
    word = how.partition("=")[2]
    assert [word in event.message and "not the serial run" in event.message for event in said] == [True]
    assert run.history != exact.history
    assert run.history[-1] < 0.5 * run.history[0]

    folder = tmp_path / "parts"
    _train(folder, plan, checkpoint_every="9", pause_after=2)
    manifest = read_manifest(latest(RunFolder(folder)))  # type: ignore[arg-type]
    assert ("compression" in manifest["progress"]) == ("powersgd" in how)
    again = _train(folder, None, resume=True, checkpoint_every="9")
    assert how in again.summary["plan"]
    weights = run.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
