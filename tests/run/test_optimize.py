"""The short way to step an optimizer is the same step, and loads no compiler."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.run.optimize import OptimizerStep, building_optimizers

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def _step(model: nn.Module, step: Any) -> None:
    model.zero_grad()
    model(torch.linspace(-1, 1, 14).view(2, 7)).square().sum().backward()
    step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_short_way_is_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 3))
    other = copy.deepcopy(model)
    with building_optimizers():
        short = OPTIMIZERS[name](model.parameters())
    usual = OPTIMIZERS[name](other.parameters())
    take = OptimizerStep(short)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    calls = []
    monkeypatch.setattr(short, "step", lambda: calls.append("usual way"))
    for _ in range(3):
        _step(model, take)
    assert calls == [], "the short way was not taken: the test would prove nothing"
    monkeypatch.undo()
    for _ in range(3):
        _step(other, usual.step)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_hooks_are_run() -> None:
    model = nn.Linear(7, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    _step(model, OptimizerStep(optimizer))
    assert seen == ["before"]


def test_own_optimizers_keep_their_step() -> None:
    class Halving(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(0.5)

    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    _step_only = OptimizerStep(Halving(model.parameters(), lr=0.1))
    _step_only()
    assert torch.equal(model.weight, before * 0.5)


def test_training_loads_no_compiler() -> None:
    """In a fresh process: assemble, train, evaluate; then the scheduler must not complain either."""
    code = """
import sys, warnings
warnings.simplefilter("error")
import torch
import shardwise
from shardwise.run.live import start
x = torch.randn(24, 5)
job = shardwise.Job(model=lambda: torch.nn.Linear(5, 2), data=(x, x[:, :2]), loss=torch.nn.functional.mse_loss,
    optimizer=lambda p: torch.optim.AdamW(p, lr=0.1), batch_size=8, epochs=1,
    schedule=lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n))
with start(job) as run:
    losses = [run.step(batch) for batch in run.batches()]
assert len(losses) == 3 and losses[0] != losses[1]
print("compiler" if "torch._dynamo" in sys.modules else "no compiler")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "no compiler", done.stderr
