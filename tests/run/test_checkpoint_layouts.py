"""A checkpoint saved under one layout loads under another, and the next steps are those of the serial run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

import shardwise.run.dcp  # noqa: F401  # imported once, before ranks are forked
from shardwise.errors import CheckpointError
from shardwise.run.checkpoint import latest, load, save
from shardwise.run.folder import RunFolder

Ranks = Callable[..., list[Any]]
Weights = dict[str, Tensor]

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def build(layout: str, optimizer: str, seed: int = 0) -> tuple[nn.Module, Optimizer]:
    """Awkward shapes: 14 rows on three ranks are 5, 5, 4, and of 2 rows or 1 some ranks have none."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 14), nn.Tanh(), nn.Linear(14, 2), nn.Linear(2, 1))
    model.register_buffer("offset", torch.full((1,), float(seed)))
    if layout == "shard":
        fully_shard(model[0])
        fully_shard(model)
    elif layout == "tensor":
        mesh = init_device_mesh("cpu", (c10d.get_world_size(),))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model, OPTIMIZERS[optimizer](list(model.parameters()))


def steps(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    """All ranks see the whole batch, so that every layout computes the serial gradient."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(9, 7, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> Weights:
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = whole.detach().clone()
    return found


def save_part(path: Path, layout: str, optimizer: str) -> Weights:
    model, made = build(layout, optimizer)
    steps(model, made, 0, 3)
    save(RunFolder(path), step=3, model=model, optimizer=made, progress={"rank": rank()})
    return weights(model)


def load_part(path: Path, layout: str, optimizer: str) -> tuple[Weights, Weights, dict[str, Any], bool]:
    model, made = build(layout, optimizer, seed=1)
    at = latest(RunFolder(path))
    assert at is not None
    progress = load(at, model=model, optimizer=made)
    loaded = weights(model)
    split = all(
        isinstance(t, DTensor) for p in model.parameters() for t in made.state[p].values() if t.shape == p.shape
    )
    steps(model, made, 3, 6)
    return loaded, weights(model), progress, split


def rank() -> int:
    return c10d.get_rank() if c10d.is_initialized() else 0


def assert_close(found: Weights, expected: Weights, *, exactly: bool = False) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0 if exactly else 1e-4, atol=0 if exactly else 1e-5, msg=name
        )


LAYOUTS = [
    ("shard", 2, "shard", 3, "momentum"),
    ("shard", 2, "shard", 3, "adamw"),
    ("shard", 2, "serial", 1, "adamw"),
    ("serial", 1, "shard", 3, "adamw"),
    ("tensor", 2, "shard", 2, "adamw"),
    ("shard", 3, "tensor", 2, "momentum"),
    ("serial", 1, "tensor", 2, "adamw"),
    ("serial", 2, "shard", 2, "adamw"),
]


@pytest.mark.parametrize(("before", "size", "after", "other_size", "optimizer"), LAYOUTS)
def test_a_checkpoint_moves_between_layouts(
    before: str, size: int, after: str, other_size: int, optimizer: str, ranks: Ranks, tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    saved = ranks(size, save_part, folder.path, before, optimizer)
    model, made = build("serial", optimizer)
    steps(model, made, 0, 3)
    assert_close(saved[0], weights(model))
    steps(model, made, 3, 6)
    for loaded, stepped, progress, split in ranks(other_size, load_part, folder.path, after, optimizer):
        assert_close(loaded, saved[0], exactly=True)
        assert_close(stepped, weights(model))
        assert progress == {"rank": 0}
        assert split is (after == "shard")
    assert not torch.equal(saved[0]["0.weight"], weights(model)["0.weight"])


def pass_on(path: Path) -> None:
    """Load and save again, split."""
    model, optimizer = build("shard", "adafactor", seed=1)
    at = latest(RunFolder(path))
    assert at is not None
    load(at, model=model, optimizer=optimizer)
    assert isinstance(optimizer.state[model.get_parameter("0.weight")]["row_var"], DTensor)
    save(RunFolder(path), step=4, model=model, optimizer=optimizer, progress={})


def test_state_of_another_shape_than_its_parameter(ranks: Ranks, tmp_path: Path) -> None:
    """Adafactor keeps row and column sums. Its step does not run on split parameters (torch 2.13), its state moves."""
    folder = RunFolder.create(tmp_path / "run", "test")
    save_part(folder.path, "serial", "adafactor")
    model, optimizer = build("serial", "adafactor")
    steps(model, optimizer, 0, 3)
    ranks(3, pass_on, folder.path)
    other, resumed = build("serial", "adafactor", seed=1)
    at = latest(folder)
    assert at is not None
    assert at.name == "step-00000004"
    load(at, model=other, optimizer=resumed)
    row_sums = 0
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert optimizer.state[one].keys() == resumed.state[two].keys()
        for key, tensor in optimizer.state[one].items():
            assert torch.equal(tensor, resumed.state[two][key]), key
            row_sums += key == "row_var"
    assert row_sums == 3


def save_unfinished_sum(path: Path) -> None:
    mesh = init_device_mesh("cpu", (c10d.get_world_size(),))
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    part = DTensor.from_local(torch.full((2, 2), 1.0 + rank()), mesh, [Partial()])
    optimizer.state[model.weight]["momentum_buffer"] = part
    save(RunFolder(path), step=1, model=model, optimizer=optimizer, progress={})


def test_sums_left_to_do_are_done(ranks: Ranks, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    ranks(3, save_unfinished_sum, folder.path)
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    at = latest(folder)
    assert at is not None
    load(at, model=model, optimizer=optimizer)
    assert bool((optimizer.state[model.weight]["momentum_buffer"] == 6).all())


def save_after_evaluation(path: Path) -> bool:
    model, made = build("shard", "momentum")
    steps(model, made, 0, 1)
    with torch.no_grad():
        model(torch.ones(1, 7))  # FSDP2 leaves the outermost parameters whole after a forward alone
    assert isinstance(model, FSDPModule)
    whole = any(not isinstance(p, DTensor) for p in model.parameters())
    save(RunFolder(path), step=1, model=model, optimizer=made, progress={})
    return whole


def test_saving_after_a_forward_alone(ranks: Ranks, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    assert ranks(2, save_after_evaluation, folder.path) == [True, True], "the case no longer occurs"
    loaded, *_ = load_part(folder.path, "serial", "momentum")
    model, made = build("serial", "momentum")
    steps(model, made, 0, 1)
    assert_close(loaded, weights(model))


def save_own_buffers(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.BatchNorm1d(5 + 40 * number) for number in range(4)))
    for buffer in model.buffers():
        buffer.fill_(rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save(RunFolder(path), step=1, model=model, optimizer=optimizer, progress={})


def test_of_buffers_that_differ_the_lowest_ranks_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    ranks(3, save_own_buffers, folder.path)
    model = nn.Sequential(*(nn.BatchNorm1d(5 + 40 * number) for number in range(4)))
    at = latest(folder)
    assert at is not None
    load(at, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(bool((buffer == 0).all()) for buffer in model.buffers())
    assert len(list(at.glob("*.distcp"))) > 1, "parameters are written by all ranks"


class Half(nn.Module):
    """One of two pipeline stages: rank 0 holds `a`, rank 1 holds `b`; both are there in the whole model."""

    def __init__(self, parts: str) -> None:
        super().__init__()
        for part in parts:
            self.add_module(part, nn.Linear(3, 3))

    def optimizer(self) -> Optimizer:
        return torch.optim.SGD(list(self.parameters()), lr=0.1, momentum=0.9)

    def fill(self, optimizer: Optimizer) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, float(len(name)))
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, float(ord(name[0])))


def save_stage(path: Path, parts: list[str]) -> None:
    model = Half(parts[rank()])
    model.fill(optimizer := model.optimizer())
    save(RunFolder(path), step=1, model=model, optimizer=optimizer, progress={})


def load_stage(path: Path, parts: list[str]) -> list[float] | str:
    model = Half(parts[rank()])
    optimizer = model.optimizer()
    at = latest(RunFolder(path))
    assert at is not None
    try:
        load(at, model=model, optimizer=optimizer)
    except CheckpointError as error:
        return str(error)
    return [float(optimizer.state[p]["momentum_buffer"].mean()) for p in model.parameters()]


def test_ranks_may_hold_different_parts_of_the_model(ranks: Ranks, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    ranks(2, save_stage, folder.path, ["a", "b"])
    assert load_stage(folder.path, ["ab"]) == [97.0, 97.0, 98.0, 98.0]
    assert ranks(2, load_stage, folder.path, ["b", "a"]) == [[98.0, 98.0], [97.0, 97.0]]
    for problem in ranks(2, load_stage, folder.path, ["a", "a"]):
        assert "holds b.bias, b.weight that the model does not have" in problem
        assert "out of the run folder" not in problem  # it is whole
    for problem in ranks(2, load_stage, folder.path, ["ab", "abc"]):
        assert problem.startswith("rank 1: checkpoint")
        assert "lacks c.bias, c.weight" in problem


def save_with_one_bad_rank(path: Path) -> str:
    model = nn.Linear(2, 2)
    strangers = [nn.Parameter(torch.ones(1))] if rank() == 1 else []
    optimizer = torch.optim.SGD([*model.parameters(), *strangers], lr=0.1)
    with pytest.raises(CheckpointError) as caught:
        save(RunFolder(path), step=1, model=model, optimizer=optimizer, progress={})
    return str(caught.value)


def test_an_error_on_one_rank_is_raised_on_all(ranks: Ranks, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    messages = ranks(2, save_with_one_bad_rank, folder.path)
    assert messages[0] == messages[1]
    assert "rank 1: parameter 2 of optimizer group 0" in messages[0]
    assert latest(folder) is None


def test_damage_is_an_error_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    ranks(2, save_stage, folder.path, ["a", "b"])
    at = latest(folder)
    assert at is not None
    manifest = json.loads((at / "checkpoint.json").read_text())
    data = at / "__1_0.distcp"
    content = bytearray(data.read_bytes())
    content[content.find(torch.full((3,), 98.0).numpy().tobytes())] ^= 1
    data.write_bytes(bytes(content))
    assert len(content) == manifest["files"]["__1_0.distcp"]
    for problem in ranks(2, load_stage, folder.path, ["a", "b"]):
        assert "__1_0.distcp at byte" in problem
