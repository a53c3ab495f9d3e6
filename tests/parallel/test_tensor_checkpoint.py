"""A split model is saved, exported, and continued under other layouts, fused weights and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import shardwise.run.dcp  # noqa: F401  # imported once, before ranks are forked
from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.jobs.charlm import CharGPT, next_character_loss
from shardwise.parallel.data import GradientSum
from shardwise.parallel.shard import shard_model
from shardwise.parallel.tensor.apply import apply_split
from shardwise.parallel.tensor.find import find_split
from shardwise.run.checkpoint import latest, load, save
from shardwise.run.export import load_weights, save_weights
from shardwise.run.folder import RunFolder
from shardwise.spec.layout import Layout

Ranks = Callable[..., list[Any]]
Weights = dict[str, Tensor]


def tokens(step: int) -> Tensor:
    return torch.randint(0, 17, (4, 8), generator=torch.Generator().manual_seed(step))


def build(layout: Layout, seed: int = 0) -> tuple[nn.Module, Optimizer, Callable[[Tensor], None]]:
    """A GPT with fused projections, its optimizer, and a function that leaves the gradient of a batch's loss."""
    torch.manual_seed(seed)
    model = CharGPT(17, 8, 16, 1, 4).double()
    mesh = Mesh(layout, Group.world().rank)
    sharded, no_units = None, tuple[str, ...]()
    if layout.tensor > 1:
        plan = find_split(model, lambda m: next_character_loss(m(tokens(0)), tokens(0)), layout.tensor)
        assert plan.shares["blocks.0.attention.qkv.weight"].outer == 3
        apply_split(model, plan, mesh.group("tensor"), mesh.device_mesh("tensor"), sharded_next=layout.shard > 1)
        no_units = plan.inside
    if layout.shard > 1:
        sharded = shard_model(model, mesh, no_units=no_units)
    gradients = GradientSum(model.named_parameters(), mesh.group("data"), sharded=sharded)

    def backward(batch: Tensor) -> None:
        gradients.expect()
        mine = batch.chunk(layout.replicas)[mesh.samples.rank]
        (next_character_loss(model(mine), mine) / layout.replicas).backward()
        gradients.finish()

    return model, torch.optim.AdamW(model.parameters(), lr=0.01), backward


def train(made: tuple[nn.Module, Optimizer, Callable[[Tensor], None]], first: int, last: int) -> Weights:
    model, optimizer, backward = made
    for step in range(first, last):
        optimizer.zero_grad()
        backward(tokens(step))
        optimizer.step()
    return weights(model)


def weights(model: nn.Module) -> Weights:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def save_part(path: Path, layout: Layout) -> Weights:
    made = build(layout)
    trained = train(made, 0, 2)
    save(RunFolder(path), step=2, model=made[0], optimizer=made[1], progress={})
    save_weights(made[0], path / "model.safetensors")
    return trained


def load_part(path: Path, layout: Layout) -> tuple[Weights, Weights]:
    made = build(layout, seed=1)
    at = latest(RunFolder(path))
    assert at is not None
    load(at, model=made[0], optimizer=made[1])
    return weights(made[0]), train(made, 2, 4)


def assert_close(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The gradient of a key bias is zero but for rounding, which AdamW enlarges.
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(tensor=2), Layout()),
        (Layout(), Layout(tensor=2)),
        (Layout(tensor=2), Layout(tensor=4)),
        (Layout(tensor=4), Layout(shard=2, tensor=2)),
        (Layout(shard=2, tensor=2), Layout(data=2, tensor=2)),
    ],
    ids=str,
)
def test_a_split_model_moves_between_layouts(before: Layout, after: Layout, ranks: Ranks, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    saved = ranks(before.workers, save_part, folder.path, before)
    serial = build(Layout())
    two = train(serial, 0, 2)
    four = train(serial, 2, 4)
    assert not torch.equal(two["blocks.0.attention.qkv.weight"], four["blocks.0.attention.qkv.weight"])
    assert_close(saved[0], two)
    for loaded, trained in ranks(after.workers, load_part, folder.path, after):
        for name, tensor in saved[0].items():
            assert torch.equal(loaded[name], tensor), f"{name} was not restored bit for bit"
        assert_close(trained, four)
    exported = CharGPT(17, 8, 16, 1, 4).double()
    load_weights(exported, folder.path / "model.safetensors")
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, saved[0][name])
