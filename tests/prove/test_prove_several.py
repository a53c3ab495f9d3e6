"""Trainings that step several optimizers in turn are proved, and refuted where one of their steps is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.prove.proof import prove
from shardwise.run.assemble import Assembly
from shardwise.spec.job import Job


def pushed(model: Any, batch: Any) -> Tensor:
    x, y = batch
    result: Tensor = (model["second"](model["first"](x)) - y).square().mean()
    return result


def pulled(model: Any, batch: Any) -> Tensor:
    x, y = batch
    result: Tensor = (model["second"](model["first"](x)) + y).abs().mean()
    return result


def in_turn() -> Job:
    x = torch.randn(22, 7, generator=torch.Generator().manual_seed(0))
    return Job(
        model=lambda: nn.ModuleDict({"first": nn.Sequential(nn.Linear(7, 15), nn.Tanh()), "second": nn.Linear(15, 1)}),
        data=(x, x.sum(1, keepdim=True)),
        objective={"first": pushed, "second": pulled},
        optimizer=lambda model: {name: torch.optim.AdamW(model[name].parameters(), 0.01, eps=1e-3) for name in model},
        clip_norm={"first": 0.5},
        batch_size=5,
        epochs=2,
    )


def forgets(a: Assembly) -> None:
    """The second optimizer does not step."""
    a.turns["second"] = replace(a.turns["second"], update=lambda: None)


def test_steps_in_turn_are_proved() -> None:
    verdict = prove(in_turn(), "data=2")
    assert verdict.proved, verdict
    assert verdict.compared["gradient"] == verdict.compared["parameter"] == 4
    assert verdict.compared["gradient norm"] == verdict.steps == 3


def test_a_step_that_is_left_out_is_refuted() -> None:
    verdict = prove(in_turn(), "data=2", fault=forgets)
    assert not verdict.proved
    assert any("second" in text for text in map(str, verdict.failed)), verdict
