"""Experts and context together: the built-in moe model, split over samples, experts and tokens, equals the serial one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.tensor  # once, before ranks are forked
from torch import Tensor

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.dist.split import is_dtensor
from shardwise.jobs.charlm import next_character_loss
from shardwise.jobs.moe import MixtureGPT
from shardwise.nn.experts import Load, expert_load
from shardwise.nn.moe import with_auxiliary_loss
from shardwise.parallel.context.check import Objective, check_context
from shardwise.parallel.context.split import ContextSplit
from shardwise.parallel.data import GradientSum
from shardwise.parallel.expert import check_experts, split_experts
from shardwise.parallel.norm import BatchState
from shardwise.spec.layout import Layout
from shardwise.spec.shares import share_bounds

BATCH, LENGTH = 3, 7
Result = tuple[list[float], dict[str, Tensor], dict[str, Load]]


def whole(tensor: Tensor) -> Tensor:
    out: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return out.detach().clone()


def train(layout: str) -> Result:
    mesh = Mesh(Layout.parse(layout), Group.world().rank)
    torch.manual_seed(0)
    model = MixtureGPT(11, LENGTH, 12, 2, 3, experts=4, top_k=2, balance=0.5).double()
    state, objective = BatchState(), with_auxiliary_loss(next_character_loss)
    text = torch.randint(0, 11, (2, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    check_experts(model, mesh.layout, splits_share=False)
    checked = check_context(model, mesh.layout.context, text[0, :, :-1], text[0, :, 1:], Objective(objective=objective))
    context = ContextSplit(mesh.group("context"), checked)
    context.wire(model)
    split = split_experts(model, mesh, state)
    named = list(model.named_parameters())
    sums = [
        GradientSum([(n, p) for n, p in named if n not in split], mesh.group("data", "context", "expert")),
        GradientSum([(n, p) for n, p in named if n in split], mesh.group("data", "context")),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for windows in text:
        start, stop = share_bounds(BATCH, mesh.samples.size)[mesh.samples.rank]
        state.phantom = start == stop
        windows = windows[start:stop] if start < stop else windows[:1]
        optimizer.zero_grad()
        value = objective(model, context.local(windows[:, :-1], windows[:, 1:]))
        assert isinstance(value, Tensor)
        loss = value * ((stop - start) / BATCH * context.share)
        for each in sums:
            each.expect()
        loss.backward()
        for each in sums:
            each.finish()
        optimizer.step()
        losses.append(float(mesh.group("data", "context", "expert").sum_(loss.detach().clone())))
    return losses, {name: whole(tensor) for name, tensor in model.state_dict().items()}, expert_load(model)


@pytest.mark.parametrize("layout", ["context=2", "context=2,expert=2", "data=4", "context=2,data=2"])
def test_steps_equal_the_serial_steps(layout: str, ranks: Callable[..., list[Any]]) -> None:
    serial = train("serial")
    assert serial[0][0] != serial[0][1]
    for found in ranks(Layout.parse(layout).workers, train, layout):
        torch.testing.assert_close(found[:2], serial[:2], rtol=1e-9, atol=1e-11)
        assert found[2] == serial[2]
