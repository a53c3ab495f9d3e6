"""A checkpoint brings model, optimizer and scheduler back bit for bit, and refuses what it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwise.errors import CheckpointError
from shardwise.run import checkpoint
from shardwise.run.checkpoint import latest, load, save, warm_up
from shardwise.run.encoding import decode, encode, tensor_paths
from shardwise.run.folder import RunFolder


class Awkward(nn.Module):
    """Tied weights, BatchNorm, dropout, buffers of both kinds, a parameter without gradient, extra state, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 15, bias=False)
        self.norm = nn.BatchNorm1d(15)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(7, 15, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(3, 5))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.wide = nn.Linear(15, 3).double()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.memo: dict[str, Any] = {"seen": 0}

    def get_extra_state(self) -> dict[str, Any]:
        return {"memo": dict(self.memo), "half": torch.tensor([0.5])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["half"], torch.tensor([0.5]))
        self.memo = state["memo"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.memo["seen"] += 1
        hidden = self.drop(self.norm(self.embed(x))) * self.scale * (1 + self.calls / 100)
        output: Tensor = self.wide(hidden.double()) + self.head(x).double().mean(1, keepdim=True)
        return output


@dataclass
class Training:
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None = None

    def run(self, first: int, last: int) -> list[float]:
        return [self.step(number) for number in range(first, last)]

    def step(self, number: int) -> float:
        torch.manual_seed(number)  # as the loop does: randomness is a function of the step
        x = torch.randn(9, 7)

        def closure() -> float:
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            return float(loss.item())

        loss = closure()
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(closure)
        else:
            self.optimizer.step()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(1.0)
        elif self.scheduler is not None:
            self.scheduler.step()
        return loss


def build(
    optimizer: Callable[[Any], Optimizer], scheduler: Callable[[Optimizer], LRScheduler] | None = None, seed: int = 0
) -> Training:
    torch.manual_seed(seed)
    model = Awkward()
    made = optimizer(model.parameters())
    return Training(model, made, scheduler(made) if scheduler else None)


def tensors(training: Training) -> dict[str, Tensor]:
    """Every tensor and number that decides the next steps."""
    found: dict[str, Tensor] = dict(training.model.named_parameters()) | dict(training.model.named_buffers())
    names: dict[Tensor, str] = {parameter: name for name, parameter in training.model.named_parameters()}
    encode({names[p]: dict(state) for p, state in training.optimizer.state.items()}, "state", found)
    return found


def assert_same(a: Training, b: Training) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
    options = [
        [{key: value for key, value in group.items() if key != "params"} for group in side.optimizer.param_groups]
        for side in (a, b)
    ]
    assert options[0] == options[1]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "test")


def keep(folder: RunFolder, training: Training, step: int = 4, **progress: Any) -> Path:
    return save(
        folder,
        step=step,
        model=training.model,
        optimizer=training.optimizer,
        scheduler=training.scheduler,
        progress=progress,
    )


def bring_back(path: Path, training: Training) -> dict[str, Any]:
    return load(path, model=training.model, optimizer=training.optimizer, scheduler=training.scheduler)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam-capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_steps_are_those_of_the_uninterrupted_run(name: str, folder: RunFolder) -> None:
    straight = build(OPTIMIZERS[name])
    straight.run(0, 4)
    path = keep(folder, straight)
    resumed = build(OPTIMIZERS[name], seed=1)
    bring_back(path, resumed)
    assert_same(straight, resumed)
    before = {name: tensor.clone() for name, tensor in straight.model.named_parameters()}
    assert straight.run(4, 8) == resumed.run(4, 8)
    assert_same(straight, resumed)
    still = {name for name, tensor in straight.model.named_parameters() if torch.equal(before[name], tensor)}
    assert still == {"unused", "frozen"}, "the steps after the checkpoint must change something"
    assert straight.model.memo == {"seen": 8}
    assert resumed.model.memo == {"seen": 8}


def test_lbfgs(folder: RunFolder) -> None:
    def make(seed: int) -> Training:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
        return Training(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3))

    straight, resumed = make(0), make(1)
    straight.run(0, 3)
    bring_back(keep(folder, straight), resumed)
    assert straight.run(3, 6) == resumed.run(3, 6)
    assert_same(straight, resumed)


def test_sparse_adam_keeps_its_counter_as_a_python_number(folder: RunFolder) -> None:
    def make(seed: int) -> tuple[nn.EmbeddingBag, Optimizer]:
        torch.manual_seed(seed)
        model = nn.EmbeddingBag(11, 3, sparse=True)
        return model, torch.optim.SparseAdam(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.tensor([[1, 2, 7]])).sum().backward()
        optimizer.step()

    model, optimizer = make(0)
    step(model, optimizer)
    path = save(folder, step=1, model=model, optimizer=optimizer, progress={})
    other, resumed = make(1)
    load(path, model=other, optimizer=resumed)
    assert isinstance(resumed.state[other.weight]["step"], int)
    step(model, optimizer)
    step(other, resumed)
    assert torch.equal(model.weight, other.weight)


def _sequential(optimizer: Optimizer) -> LRScheduler:
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    parts: list[LRScheduler] = [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 6)]
    return SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 6]),
    "sequential": _sequential,
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=9),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "warm-restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_go_on(name: str, folder: RunFolder) -> None:
    straight = build(OPTIMIZERS["momentum"], SCHEDULERS[name])
    straight.run(0, 4)
    path = keep(folder, straight)
    resumed = build(OPTIMIZERS["momentum"], SCHEDULERS[name], seed=1)
    bring_back(path, resumed)
    rates = []
    for number in range(4, 9):
        assert straight.step(number) == resumed.step(number)
        rates.append(straight.optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 1, "the schedule did nothing"
    assert_same(straight, resumed)


def two_groups(model: nn.Module, *, swapped: bool = False) -> Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.003}]
    return torch.optim.AdamW(groups[::-1] if swapped else groups, lr=0.01)


def test_several_groups_in_another_order_of_parameters(folder: RunFolder) -> None:
    torch.manual_seed(0)
    straight = Training(model := Awkward(), two_groups(model))
    straight.run(0, 3)
    path = keep(folder, straight)
    other = Awkward()
    optimizer = two_groups(other)
    for group in optimizer.param_groups:
        group["params"].reverse()
    resumed = Training(other, optimizer)
    bring_back(path, resumed)
    straight.run(3, 6)
    resumed.run(3, 6)
    assert_same(straight, resumed)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.003]


def test_names_are_the_users_whatever_wraps_the_model(folder: RunFolder) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(7, 5)), checkpoint_wrapper(nn.BatchNorm1d(5)))
    compiled = torch.compile(wrapped, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    first = Training(bare, torch.optim.Adam(bare.parameters()))
    first.run(0, 2)
    path = keep(folder, first, step=2)
    names = json.loads((path / "checkpoint.json").read_text())["structure"]["model"]
    assert set(names) == {"0.weight", "0.bias", "1.weight", "1.bias"} | {
        f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    second = Training(wrapped, torch.optim.Adam(compiled.parameters()))
    load(path, model=compiled, optimizer=second.optimizer)
    first.run(2, 4)
    second.run(2, 4)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), wrapped.parameters(), strict=True))
    back = save(folder, step=4, model=compiled, optimizer=second.optimizer, progress={})
    again = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    load(back, model=again, optimizer=torch.optim.Adam(again.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), again.parameters(), strict=True))


def test_progress_comes_back_as_it_was(folder: RunFolder) -> None:
    training = build(OPTIMIZERS["sgd"])
    progress: dict[str, Any] = {
        "epoch": 3,
        "text": "a",
        "sums": torch.arange(3.0),
        "best": float("inf"),
        "place": (1, [2, None]),
    }
    path = keep(folder, training, **progress)
    back = bring_back(path, build(OPTIMIZERS["sgd"]))
    assert torch.equal(back.pop("sums"), progress.pop("sums"))
    assert back == progress


def test_a_tied_tensor_is_stored_once_and_stays_tied(folder: RunFolder) -> None:
    path = keep(folder, build(OPTIMIZERS["sgd"]))
    structure = json.loads((path / "checkpoint.json").read_text())["structure"]
    assert structure["aliases"] == {"head.weight": "embed.weight"}
    assert "head.weight" not in structure["model"]
    resumed = build(OPTIMIZERS["sgd"], seed=1)
    bring_back(path, resumed)
    assert resumed.model.get_parameter("head.weight") is resumed.model.get_parameter("embed.weight")


def test_options_that_choose_how_stay_those_of_the_resuming_run(folder: RunFolder) -> None:
    path = keep(folder, build(lambda p: torch.optim.Adam(p, lr=0.5, betas=(0.5, 0.6), foreach=True)))
    resumed = build(lambda p: torch.optim.Adam(p, lr=0.1, foreach=False))
    bring_back(path, resumed)
    assert resumed.optimizer.param_groups[0]["foreach"] is False
    assert resumed.optimizer.param_groups[0]["lr"] == 0.5
    assert resumed.optimizer.param_groups[0]["betas"] == (0.5, 0.6)


def test_state_of_another_dtype_than_its_parameter(folder: RunFolder) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, resumed = (torch.optim.SGD(side.parameters(), lr=0.1, momentum=0.9) for side in (model, other))
    optimizer.state[model.weight]["momentum_buffer"] = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    load(save(folder, step=1, model=model, optimizer=optimizer, progress={}), model=other, optimizer=resumed)
    buffer = resumed.state[other.weight]["momentum_buffer"]
    assert buffer.dtype is torch.float64
    assert bool((buffer == 1 / 3).all())
    assert other.bias not in resumed.state


# What does not fit


class Plain(nn.Module):
    def __init__(self, **others: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2)
        for name, thing in others.items():
            setattr(self, name, thing)


def tied() -> Plain:
    model = Plain()
    model.b.weight = model.a.weight
    return model


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters())


def only_a(model: nn.Module) -> Optimizer:
    return torch.optim.Adam([p for name, p in model.named_parameters() if name.startswith("a")])


def groups(*names: str) -> Callable[[nn.Module], Optimizer]:
    def make(model: nn.Module) -> Optimizer:
        return torch.optim.Adam([{"params": list(model.get_submodule(name).parameters())} for name in names])

    return make


def amsgrad(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), amsgrad=True)


Make = Callable[[nn.Module], Optimizer]
MISFITS: list[tuple[str, Callable[[], nn.Module], Make, Callable[[], nn.Module], Make]] = [
    (r"lacks more\.bias, more\.weight", Plain, adam, lambda: Plain(more=nn.Linear(1, 1)), adam),
    (r"holds more\.bias, more\.weight that the model", lambda: Plain(more=nn.Linear(1, 1)), adam, Plain, adam),
    (r"a\.weight has shape \(2, 3\).* shape \(2, 4\)", Plain, adam, lambda: Plain(a=nn.Linear(4, 2)), adam),
    (r"a\.weight has .*float32.*float64", Plain, adam, lambda: Plain().double(), adam),
    (r"a\.weight and b\.weight are one tensor in", tied, adam, Plain, adam),
    (r"a\.weight and b\.weight are two tensors in", Plain, adam, tied, adam),
    (r"made with torch.optim.adam.Adam, .*AdamW", Plain, adam, Plain, lambda m: torch.optim.AdamW(m.parameters())),
    (r"has 2 parameter groups, and the optimizer 1", Plain, groups("a", "b"), Plain, adam),
    (r"b\.weight is in group 1 .* and in group 0 here", Plain, groups("a", "b"), Plain, groups("b", "a")),
    (r"trained b\.bias, b\.weight .* does not here", Plain, adam, Plain, only_a),
    (r"b\.weight is in no group .* and in group 0 here", Plain, only_a, Plain, adam),
    (r"amsgrad of optimizer group 0 is False", Plain, adam, Plain, amsgrad),
]  # fmt: skip


@pytest.mark.parametrize(("message", "model", "optimizer", "other", "other_optimizer"), MISFITS, ids=lambda v: None)
def test_what_does_not_fit_is_named_and_nothing_changes(
    message: str,
    model: Callable[[], nn.Module],
    optimizer: Make,
    other: Callable[[], nn.Module],
    other_optimizer: Make,
    folder: RunFolder,
) -> None:
    made = model()
    path = save(folder, step=1, model=made, optimizer=optimizer(made), progress={})
    target = other()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load(path, model=target, optimizer=other_optimizer(target))
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_another_scheduler_is_refused(folder: RunFolder) -> None:
    path = keep(folder, build(OPTIMIZERS["sgd"], SCHEDULERS["lambda"]))
    with pytest.raises(CheckpointError, match=r"scheduler .*LambdaLR, and this run has None"):
        bring_back(path, build(OPTIMIZERS["sgd"]))
    with pytest.raises(CheckpointError, match=r"LambdaLR, and this run has .*MultiStepLR"):
        bring_back(path, build(OPTIMIZERS["sgd"], SCHEDULERS["multistep"]))


def test_what_cannot_be_kept_is_refused_before_anything_is_written(folder: RunFolder) -> None:
    with pytest.raises(CheckpointError, match=r"progress/thing is a builtins\.object"):
        keep(folder, build(OPTIMIZERS["sgd"]), thing=object())
    model, stranger = nn.Linear(2, 2), nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([*model.parameters(), stranger], lr=0.1)
    with pytest.raises(
        CheckpointError, match=r"parameter 2 of optimizer group 0, of shape \(5,\), is none of the model"
    ):
        save(folder, step=1, model=model, optimizer=optimizer, progress={})
    with torch.device("meta"):
        ghost = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="weight has no values yet"):
        save(folder, step=1, model=ghost, optimizer=torch.optim.SGD(ghost.parameters()), progress={})
    with pytest.raises(CheckpointError, match="keep_last is 0"):
        save(folder, step=1, model=model, optimizer=optimizer, progress={}, keep_last=0)
    assert latest(folder) is None


def test_encoding_gives_back_the_same_values() -> None:
    from collections import Counter, deque

    value = {
        "numbers": [1, -2.5, 1e-300, float("-inf"), 3 + 4j, True, None],
        "kinds": [(1, (2,)), {3, 1}, frozenset({"x"}), deque([1, 2]), b"\x00\xff", torch.float16, torch.device("cpu")],
        "keys": {1: "int", (2, 3): "tuple", "a/b": "slash", "$": "tag"},
        "counter": Counter({3: 2}),
        "arrays": [np.arange(6, dtype="int16").reshape(2, 3)[:, ::-1], np.array(2.5)],
        "newest": deque([1, 2, 3], maxlen=3),
        "scalars": [np.int64(3), np.float32(0.1), np.bool_(True)],
        "tensors": ({7: torch.arange(3)}, [torch.tensor(2.0)]),
    }
    found: dict[str, Tensor] = {}
    record = json.loads(json.dumps(encode(value, "v", found), allow_nan=False))
    assert sorted(tensor_paths(record, "v")) == sorted(found)
    back = decode(record, "v", found)
    assert torch.equal(back["tensors"][0][7], torch.arange(3))
    assert len(found) == 4
    assert back["newest"].maxlen == 3
    for one, other in zip(back.pop("arrays"), cast("Any", value.pop("arrays")), strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    for side in (value, back):
        side.pop("tensors")
    assert back == value
    assert [type(item) for item in back["kinds"]] == [type(item) for item in value["kinds"]]  # type: ignore[attr-defined]
    assert isinstance(back["counter"], Counter)


def test_not_a_number_survives_the_encoding() -> None:
    assert decode(encode(float("nan"), "v", {}), "v", {}) != decode(encode(float("nan"), "v", {}), "v", {})


def test_warm_up_imports_what_a_checkpoint_needs() -> None:
    import sys

    warm_up().join(60)
    assert "torch.distributed.checkpoint" in sys.modules


@pytest.fixture(autouse=True)
def _compute_flat() -> Iterator[None]:
    """One compute thread, so that two runs add in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_module_is_cheap_to_import() -> None:
    """Training must not wait for DCP before its first step."""
    import subprocess
    import sys

    code = f"import {checkpoint.__name__}, sys; sys.exit('torch.distributed.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
