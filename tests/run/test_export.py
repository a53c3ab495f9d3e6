"""Final weights load into the bare model: by safetensors alone, and by shardwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from safetensors import safe_open
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from shardwise.errors import CheckpointError
from shardwise.run.export import load_weights, save_weights


class Shapes(nn.Module):
    """Tied weights, BatchNorm, views, dtypes, an empty tensor, a transposed weight, a buffer that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.short = nn.Parameter(torch.randn(3).to(torch.bfloat16))
        self.wide = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        self.flipped = nn.Parameter(torch.randn(4, 3).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        base = torch.randn(6)
        self.register_buffer("base", base)
        self.register_buffer("part", base[1:4])
        self.register_buffer("first", base[:2])
        self.register_buffer("temporary", torch.ones(2), persistent=False)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one = make()
    torch.manual_seed(1)
    return one, make()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
        assert a[name].dtype == b[name].dtype, name


LOADERS: list[Callable[[nn.Module, Path], Any]] = [load_model, load_weights]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("make", [Shapes, lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))])
def test_the_bare_model_loads_it(
    make: Callable[[], nn.Module], loader: Callable[[nn.Module, Path], Any], tmp_path: Path
) -> None:
    one, other = pair(make)
    path = tmp_path / "model.safetensors"
    save_weights(one, path)
    assert not torch.equal(next(iter(one.parameters())), next(iter(other.parameters())))
    loader(other, path)
    assert_same(one, other)
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, other = pair(Shapes)
    save_weights(model, path)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        metadata = file.metadata()
    assert {"head.weight", "part", "first", "temporary"} & names == set()
    assert metadata["head.weight"] == "embed.weight"
    assert metadata["part"] == "base"
    load_weights(other, path)
    assert other.get_parameter("head.weight") is other.get_parameter("embed.weight")


def test_a_model_that_no_longer_ties_gets_both(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, other = pair(Shapes)
    save_weights(model, path)
    assert isinstance(other, Shapes)
    other.head.weight = nn.Parameter(torch.zeros(11, 5))
    load_weights(other, path)
    assert torch.equal(other.head.weight, model.get_parameter("embed.weight"))


def compiled(model: nn.Module) -> nn.Module:
    made = torch.compile(model, backend="eager")
    assert isinstance(made, nn.Module)
    return made


def test_names_are_the_users(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    inner, model = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    model.append(compiled(inner))
    save_weights(compiled(model), path)
    bare = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    load_model(bare, path)
    assert torch.equal(bare.get_parameter("1.weight"), inner.weight)


def save_split(path: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 15), nn.Linear(15, 1), nn.BatchNorm1d(1))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fully_shard(model[0])
    fully_shard(model)
    save_weights(model, path)
    c10d.barrier()
    return whole


@pytest.mark.parametrize("loader", LOADERS)
def test_split_weights_are_put_together(
    loader: Callable[[nn.Module, Path], Any], ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    whole = ranks(2, save_split, path)[0]
    model = nn.Sequential(nn.Linear(7, 15), nn.Linear(15, 1), nn.BatchNorm1d(1))
    loader(model, path)
    found = model.state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(nn.Linear(3, 2), path)
    with pytest.raises(CheckpointError, match="it lacks nothing, and holds bias that the model has not"):
        load_weights(nn.Linear(3, 2, bias=False), path)
    with pytest.raises(CheckpointError, match=r"it lacks 0\.weight, and holds bias, weight"):
        load_weights(nn.Sequential(nn.Linear(3, 2, bias=False)), path)
    with pytest.raises(CheckpointError, match=r"weight is \(2, 3\) torch.float32 in .*, and \(2, 4\) torch.float32 in"):
        load_weights(nn.Linear(4, 2), path)
    with pytest.raises(CheckpointError, match=r"torch.float32 in .*torch.float64 in the model"):
        load_weights(nn.Linear(3, 2).double(), path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(nn.Linear(3, 2), path)
    save_weights(nn.Linear(3, 2), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(nn.Linear(3, 2), path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(nn.Linear(3, 2), tmp_path / "nowhere" / "model.safetensors")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex128))]), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]
