"""The short way to step an optimizer is the same step, and loads no compiler."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import MethodType
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

TOGETHER: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "ascent": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, maximize=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, maximize=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "tensor betas": lambda p: torch.optim.Adam(p, betas=(torch.tensor(0.9), torch.tensor(0.999))),
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
    monkeypatch.setattr(type(short), "step", lambda _: calls.append("usual way"))
    for _ in range(3):
        _step(model, take)
    assert calls == [], "the short way was not taken: the test would prove nothing"
    monkeypatch.undo()
    for _ in range(3):
        _step(other, usual.step)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def _count_lists(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the lists that `foreach` adds to, from now on."""
    lengths: list[int] = []
    plain = torch._foreach_add_

    def counted(tensors: Any, *values: Any, **named: Any) -> Any:
        lengths.append(len(tensors))
        return plain(tensors, *values, **named)

    monkeypatch.setattr(torch, "_foreach_add_", counted)
    return lengths


@pytest.mark.parametrize("name", list(TOGETHER))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_small_parameters_in_lists_are_the_same_steps(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes around the widths of vectors, a large and an empty one without gradient; gradients and groups stay as they were."""
    generator = torch.Generator()
    sizes = (0, 3, 7, 8, 15, 17, 33, 20_000, 1000, 4097, *range(50, 59))
    sides: list[tuple[list[nn.Parameter], Any]] = []
    for _ in range(2):
        generator.manual_seed(2)
        parameters = [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]
        sides.append((parameters, TOGETHER[name](parameters)))
    (ours, short), (theirs, usual) = sides
    take, groups, lengths = OptimizerStep(short), short.param_groups, _count_lists(monkeypatch)
    for _ in range(5):
        gradients = [torch.randn(size, generator=generator).to(dtype) for size in sizes[1:]]
        for one, two, gradient in zip(ours[1:], theirs[1:], gradients, strict=True):
            one.grad, two.grad = gradient.clone(), gradient.clone()
        take()
        usual.step()
        for side in sides:
            assert all(torch.equal(parameter.grad, own) for parameter, own in zip(side[0][1:], gradients, strict=True))  # type: ignore[arg-type]
    alone = name in ("nesterov", "tensor lr", "tensor betas") or dtype == torch.bfloat16
    assert set(lengths) == (set() if alone else {len(sizes) - 2}), "not the way that was to be compared"
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert short.param_groups is groups
    assert groups[0]["params"] == ours
    assert groups[0]["foreach"] is None
    ours_states, their_states = (optimizer.state_dict()["state"] for optimizer in (short, usual))
    assert ours_states.keys() == their_states.keys()
    for index, state in their_states.items():
        for key, value in state.items():
            assert value is None or torch.equal(ours_states[index][key], value), key


@pytest.mark.parametrize("case", ["large", "sparse", "chosen", "other class"])
def test_parameters_that_are_stepped_on_one_by_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(2**14 + 1 if case == "large" else 4, 1))
    make: Any = torch.optim.Adagrad if case == "other class" else torch.optim.SGD
    optimizer = make([parameter], lr=0.5, **({"foreach": False} if case == "chosen" else {}))
    lengths = _count_lists(monkeypatch)
    parameter.grad = torch.ones_like(parameter)
    if case == "sparse":
        parameter.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 1), (4, 1), check_invariants=True)
    OptimizerStep(optimizer)()
    assert lengths == []
    assert float(parameter.detach()[1]) == pytest.approx(0.5)


def test_lists_are_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.ones(2**13)) for _ in range(40)]  # of 32 KiB each: 32 of them are 1 MiB
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    lengths = _count_lists(monkeypatch)
    OptimizerStep(torch.optim.SGD(parameters, lr=0.5))()
    assert lengths == [32, 8]
    assert all(bool((parameter == 0.5).all()) for parameter in parameters)


@pytest.mark.parametrize("change", ["replaced", "swapped", "thawed"])
def test_lists_follow_the_groups(change: str) -> None:
    """A group may come to hold other parameters, as many as before; so may another group at the same address."""

    def train(short: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(5)) for _ in range(41)]
        groups: list[dict[str, Any]] = [{"params": parameters[:20]}, {"params": parameters[20:40], "lr": 0.1}]
        optimizer = torch.optim.Adam(groups, lr=0.01)
        step = OptimizerStep(optimizer) if short else optimizer.step
        first, second = optimizer.param_groups
        for count in range(4):
            if count == 2 and change == "replaced":
                first["params"][3] = parameters[40]
            if count == 2 and change == "swapped":
                first["params"], second["params"] = second["params"], first["params"]
            for place, parameter in enumerate(parameters):
                frozen = change == "thawed" and count < 2 and place < 25
                parameter.grad = None if frozen else torch.randn(5)
            step()
        return [parameter.detach() for parameter in parameters]

    for own, theirs in zip(train(short=True), train(short=False), strict=True):
        assert torch.equal(own, theirs)


def test_hooks_are_run() -> None:
    model = nn.Linear(7, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    _step(model, OptimizerStep(optimizer))
    assert seen == ["before"]


def test_step_that_was_put_into_an_optimizer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for `optimizer.step` (and keeps averages, say) is called, with a schedule, which wraps it too, and without."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with building_optimizers():
        optimizer = torch.optim.SGD([parameter], lr=0.5)
    calls: list[object] = []
    take = OptimizerStep(optimizer)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    take()
    monkeypatch.setattr(optimizer, "step", MethodType(calls.append, optimizer))
    take()
    monkeypatch.undo()
    assert len(calls) == 1
    optimizer.step = MethodType(lambda self: calls.append(self), optimizer)  # type: ignore[method-assign]
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    take()
    assert len(calls) == 2
    assert torch.equal(parameter, torch.full((3,), 0.5))


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
from shardwise.run.start import start
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


@pytest.mark.parametrize("plan", ["data=2", "shard=2"])
def test_workers_load_the_compiler_only_where_it_is_needed_and_before_they_are_forked(
    plan: str, tmp_path: Path
) -> None:
    code = f"""
import os, pathlib, sys
import torch
import shardwise
parent = os.getpid()
def model():
    if os.getpid() != parent:
        pathlib.Path({str(tmp_path)!r}, f"worker{{os.getpid()}}").write_text(str("torch._dynamo" in sys.modules))
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 2))
x = torch.randn(16, 5)
job = shardwise.Job(model=model, data=(x, x[:, :2]), loss=torch.nn.functional.mse_loss,
    optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=8, epochs=1)
shardwise.train(job, plan={plan!r}, device="cpu", out={str(tmp_path / "run")!r}, progress=False, last_checkpoint=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.read_text() for path in tmp_path.glob("worker*")] == [str(plan == "shard=2")] * 2
