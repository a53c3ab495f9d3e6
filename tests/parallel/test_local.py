"""Local steps: data parallelism where every step is averaged, other weights where not, and equal copies after each average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.dist.collectives import Group
from shardwise.dist.meter import Meter
from shardwise.errors import PlanError, RunFailed
from shardwise.nn import MoE
from shardwise.parallel.compose import check_model
from shardwise.parallel.data import GradientSum
from shardwise.parallel.local import LocalSteps
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

Ranks = Callable[..., list[Any]]
ROWS = 13


def run(every: int, steps: int, kind: str = "sgd", skip_average: bool = False, unused: bool = False) -> dict[str, Any]:
    """Steps over uneven shares of the same rows; `every` 0 sums gradients instead."""
    meter = Meter()
    world = Group.world(meter).with_shared_memory(30.0)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 3))
    named = list(model.named_parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    if kind == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sums = GradientSum(named, world) if every == 0 else LocalSteps(named, world, every=every)
    rows = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(2))
    targets = rows[:, :3].argmax(1)
    bounds = [ROWS * rank // world.size for rank in range(world.size + 1)]
    own = slice(bounds[world.rank], bounds[world.rank + 1])
    before, spread = meter.payload_bytes, []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        sums.expect()
        nn.functional.cross_entropy(model(rows[own]), targets[own], reduction="sum").backward()
        if unused and world.rank == 1:
            model[0].weight.grad = None
        sums.finish(scale=1 / ROWS)
        optimizer.step()
        if isinstance(sums, LocalSteps) and not skip_average:
            sums.after_step(optimizer, step)
        sent, before = meter.payload_bytes - before, meter.payload_bytes
        spread.append((sent, torch.cat([p.detach().reshape(-1) for p in model.parameters()])))
        before = meter.payload_bytes
    state = [value for item in optimizer.state.values() for value in item.values()]
    return {"weights": spread[-1][1], "trail": spread, "state": state}


@pytest.mark.parametrize("size", [2, 3])
def test_averaged_every_step_it_is_data_parallelism(ranks: Ranks, size: int) -> None:
    exact = ranks(size, run, 0, 6)
    local = ranks(size, run, 1, 6)
    for one, other in zip(exact, local, strict=True):
        torch.testing.assert_close(other["weights"], one["weights"], rtol=1e-5, atol=1e-6)
    # The planted fault: nobody averages.
    apart = ranks(size, run, 1, 6, "sgd", True)
    assert (apart[0]["weights"] - exact[0]["weights"]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_copies_are_equal_after_each_average_and_only_then(ranks: Ranks, kind: str) -> None:
    first, second = ranks(2, run, 3, 6, kind)
    for step in range(1, 7):
        same = torch.equal(first["trail"][step - 1][1], second["trail"][step - 1][1])
        assert same == (step % 3 == 0), step
    assert all(torch.equal(a, b) for a, b in zip(first["state"], second["state"], strict=True))
    exact = ranks(2, run, 0, 6, kind)[0]
    assert (first["weights"] - exact["weights"]).abs().max() > 1e-4


def test_bytes_are_sent_with_averages_only(ranks: Ranks) -> None:
    first = ranks(2, run, 3, 6)[0]
    exact = ranks(2, run, 0, 6)[0]
    sent = [bytes_ for bytes_, _ in first["trail"]]
    assert sent[0] == sent[1] == sent[3] == sent[4] == 0
    elements = 7 * 15 + 15 + 15 * 3 + 3
    assert sent[2] == sent[5] == 2 * 4 * elements  # weights and momentum
    assert sum(sent) < sum(bytes_ for bytes_, _ in exact["trail"])


def test_a_step_that_cannot_be_averaged_is_said(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="had no gradient on one of them"):
        ranks(2, run, 1, 1, "sgd", False, True)
    assert issubclass(RunFailed, Exception)


@pytest.mark.parametrize(
    ("layout", "model", "changes", "words"),
    [
        ("serial", nn.Linear(3, 3), {}, "only whole replicas"),
        ("data=2,shard=2", nn.Linear(3, 3), {}, "only whole replicas"),
        ("data=2", nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), {}, "BatchNorm layer '1'"),
        ("data=2", nn.Linear(3, 3), {"compression": "bf16"}, "leave one of the two out"),
        ("data=2", MoE(6, 9, 4, 1), {}, "talks to other workers"),
    ],
)
def test_refused(layout: str, model: nn.Module, changes: dict[str, Any], words: str) -> None:
    plan = Plan(layout=Layout.parse(layout), local_steps=4, **changes)
    with pytest.raises(PlanError, match=words):
        check_model(model, plan, batch_size=8, batch_norm="global")
    with pytest.raises(PlanError, match="local_steps=0"):
        Plan(local_steps=0)
