"""What users do with parameters: hooks on gradients, attributes, thawing, optimizers that look at all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once, before ranks are forked
import torch.distributed.tensor
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.data.source import as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.split import whole_tensor
from shardwise.errors import PlanError, RunFailed
from shardwise.prove.runs import walk_batches
from shardwise.run.assemble import CPU, assemble, check_job
from shardwise.run.step import take_step
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

BATCH, STEPS = 7, 3
CLAMP = 2e-3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 14), nn.Linear(14, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.down(F.gelu(self.up(self.norm(x)))))


def build() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 2))
    rows = torch.ones(6, 5)
    rows[:3] = 0
    first, last = model[0].weight, model[3].weight
    assert isinstance(first, Tensor) and isinstance(last, Tensor)
    first.register_hook(lambda gradient: gradient * rows)  # these rows are not trained
    for parameter in model[1].parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-CLAMP, CLAMP))  # not linear: parts would not do
    last.register_post_accumulate_grad_hook(_halve)
    last.rate = 3.0  # type: ignore[attr-defined]
    model[2].up.weight.rate = 0.0  # type: ignore[union-attr]
    return model


def _halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": 0.1 * getattr(p, "rate", 1.0)} for p in model.parameters()]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def make_job() -> Job:
    x = torch.randn(STEPS * BATCH, 5, generator=torch.Generator().manual_seed(1))
    return Job(
        model=build,
        data=(x, (x.sum(1) > 0).long()),
        loss=F.cross_entropy,
        optimizer=optimizer,
        batch_size=BATCH,
        steps=STEPS,
        shuffle=False,
    )


def trained(layout: str, micro_batch: int | None = None, make: Callable[[], Job] = make_job) -> dict[str, Tensor]:
    job = make()
    plan = Plan(layout=Layout.parse(layout), micro_batch=micro_batch)
    a = assemble(job, plan, Group.world(), CPU, total_steps=STEPS)
    for batch in walk_batches(a, as_splits(job.data), STEPS):
        take_step(a, batch)
    return {name: whole_tensor(parameter.detach()).clone() for name, parameter in a.model.named_parameters()}


def by_hand() -> dict[str, Tensor]:
    """The same in plain torch, where hooks are called in the backward pass."""
    torch.manual_seed(0)
    model = build()
    stepper = optimizer(model)
    x, y = make_job().data
    for start in range(0, STEPS * BATCH, BATCH):
        stepper.zero_grad()
        F.cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH]).backward()
        stepper.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_hooks_and_attributes_are_those_of_plain_torch(ranks: Callable[..., list[Any]]) -> None:
    expected = by_hand()
    torch.manual_seed(0)
    kept = dict(build().named_parameters())
    assert torch.equal(expected["0.weight"][:3], kept["0.weight"][:3])
    assert not torch.equal(expected["0.weight"][3:], kept["0.weight"][3:])
    torch.testing.assert_close(trained("serial"), expected)
    torch.testing.assert_close(trained("serial", micro_batch=3), expected)
    for layout in ("data=2", "shard=2", "tensor=2", "shard=2,tensor=2"):
        for found in ranks(Layout.parse(layout).workers, trained, layout):
            torch.testing.assert_close(found, expected, msg=layout)


def thawed(layout: str, pair: bool = False) -> dict[str, Tensor] | str:
    """Blocks are frozen for the first step and trained after it, as loops of users do."""

    def frozen() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 2))
        return model.requires_grad_(False).append(nn.Linear(2, 2))

    def sum_and_count(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), torch.tensor(len(batch[1]))

    job = replace(make_job(), model=frozen, optimizer=lambda p: torch.optim.SGD(list(p), lr=0.1, momentum=0.9))
    if pair:  # the summed gradient is divided by the count afterwards
        job = replace(job, loss=None, objective=sum_and_count)
    plan = Plan(layout=Layout.parse(layout))
    a = assemble(job, plan, Group.world(), CPU, total_steps=STEPS)
    for step, batch in enumerate(walk_batches(a, as_splits(job.data), STEPS)):
        if step == 1:
            a.model.requires_grad_(True)
        try:
            take_step(a, batch)
        except PlanError as error:
            return str(error)
    return {name: whole_tensor(parameter.detach()).clone() for name, parameter in a.model.named_parameters()}


def test_parameters_may_be_thawed(ranks: Callable[..., list[Any]]) -> None:
    expected = thawed("serial")
    for layout in ("data=2", "shard=2"):
        for found in ranks(2, thawed, layout, True):
            torch.testing.assert_close(found, expected, msg=layout)
    assert any("was frozen when the run began" in str(found) for found in ranks(2, thawed, "pipeline=2"))


class WholeNorm(torch.optim.Optimizer):
    """Scales by the norm of all gradients, as optimizers with clipping or a global step size do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        size = sum(float(p.grad.norm()) ** 2 for p in parameters) ** 0.5
        for parameter in parameters:
            parameter.add_(parameter.grad, alpha=-0.1 / size)


def normed(layout: str) -> dict[str, Tensor]:
    return trained(layout, make=lambda: replace(make_job(), optimizer=WholeNorm))


def test_numbers_of_split_tensors_are_those_of_whole_ones(ranks: Callable[..., list[Any]]) -> None:
    expected = normed("serial")
    for layout in ("shard=2", "tensor=2"):
        for found in ranks(2, normed, layout):
            torch.testing.assert_close(found, expected, msg=layout)


def test_an_optimizer_that_looks_at_all_parameters_is_refused_in_a_pipeline() -> None:
    job, plan = replace(make_job(), optimizer=WholeNorm), Plan(layout=Layout(pipeline=2))
    with pytest.raises(PlanError, match="WholeNorm steps on a parameter by what the gradients of others are"):
        check_job(job, plan)
    check_job(replace(job, optimizer=AloneSGD), plan)


class AloneSGD(torch.optim.SGD):
    """Of a class that is not torch's, but steps on each parameter by itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)


class Skips(nn.Module):
    """Leaves one of three equal blocks out, in training; by a random number, which differs from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        left_out = int(torch.randint(3, ()))
        for index, block in enumerate(self.blocks):
            x = x if index == left_out else block(x)
        return torch.as_tensor(self.head(x))


def skipping(layout: str) -> str:
    try:
        trained(layout, make=lambda: replace(make_job(), model=Skips, optimizer=AloneSGD))
    except RunFailed as error:
        return str(error)
    return ""


def test_ranks_that_gather_different_blocks_are_noticed(ranks: Callable[..., list[Any]]) -> None:
    for found in ranks(2, skipping, "shard=2"):
        assert "did not compute the blocks of the model in the same order" in found
    assert ranks(2, skipping, "data=2") == ["", ""]
