"""Compressed gradient sums: within the format's rounding, exact where the rank suffices, and nothing is lost for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.dist.meter import Meter
from shardwise.errors import PlanError
from shardwise.parallel.compose import check_model
from shardwise.parallel.compress import HalfSum, LowRankSum
from shardwise.parallel.data import GradientSum
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

Ranks = Callable[..., list[Any]]
SHAPES = {"wide": (15, 37), "deep": (6, 3, 5, 5), "bias": (15,), "unused": (9, 20), "once": (12, 12)}


def model() -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(3)
    return nn.ParameterDict({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def gradient(name: str, rank: int, step: int = 0, of_rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + len(name))
    shape = SHAPES[name]
    if of_rank is None or len(shape) == 1:
        return torch.randn(shape, generator=generator) / (1 + rank)
    n = shape[0]
    m = torch.Size(shape).numel() // n
    factors = torch.randn(n, of_rank, generator=generator), torch.randn(of_rank, m, generator=generator)
    return (factors[0] @ factors[1]).view(shape)


def give(held: nn.ParameterDict, rank: int, step: int = 0, of_rank: int | None = None) -> None:
    """Gradients as a backward pass leaves them: `unused` has none, `once` has one on rank 1 alone."""
    for name, parameter in held.items():
        absent = name == "unused" or (name == "once" and rank != 1)
        parameter.grad = None if absent else gradient(name, rank, step, of_rank)


def exact_sum(name: str, size: int, of_rank: int | None = None) -> Tensor:
    ranks = [1] if name == "once" else range(size)
    return torch.stack([gradient(name, rank, of_rank=of_rank).double() for rank in ranks]).sum(0)


def reduce_once(make: str, shared: bool, of_rank: int | None, scale: float | None) -> tuple[dict[str, Any], int]:
    meter = Meter()
    world = Group.world(meter)
    if shared:
        world = world.with_shared_memory(30.0)
    held = model()
    named = list(held.named_parameters())
    sums: GradientSum | HalfSum | LowRankSum
    if make == "exact":
        sums = GradientSum(named, world)
    elif make == "powersgd":
        sums = LowRankSum(named, world, rank=4)
    else:
        sums = HalfSum(named, world, dtype=torch.float16 if make == "fp16" else torch.bfloat16)
    give(held, world.rank, of_rank=of_rank)
    before = meter.payload_bytes
    sums.expect()
    sums.finish(scale=scale)
    assert meter.payload_bytes - before <= sums.bytes_per_step + 8 * len(SHAPES)
    return {name: None if p.grad is None else p.grad.clone() for name, p in held.items()}, meter.payload_bytes - before


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("how", "spacing"), [("fp16", 2**-10), ("bf16", 2**-7)])
def test_halves_are_within_their_rounding(ranks: Ranks, how: str, spacing: float, size: int, shared: bool) -> None:
    found = ranks(size, reduce_once, how, shared, None, 0.5)
    for name in SHAPES:
        for gradients, _ in found:
            if name == "unused":
                assert gradients[name] is None
                continue
            assert torch.equal(gradients[name], found[0][0][name])
            # Half a spacing for each number that is rounded: every rank's own, and every sum on the way.
            sizes = torch.stack([gradient(name, rank).abs() for rank in range(size)]).sum(0) * 0.5
            off = (gradients[name].double() - 0.5 * exact_sum(name, size)).abs()
            assert (off <= spacing * size * sizes + 1e-7).all()
            assert off.max() > 1e-5  # it was rounded at all


def test_low_rank_is_exact_where_the_rank_suffices(ranks: Ranks) -> None:
    found = ranks(2, reduce_once, "powersgd", True, 2, 3.0)
    for name in SHAPES:
        for gradients, _ in found:
            if name == "unused":
                assert gradients[name] is None
                continue
            assert torch.equal(gradients[name], found[0][0][name])
            exact = 3.0 * exact_sum(name, 2, of_rank=2)
            assert (gradients[name].double() - exact).norm() < 1e-5 * exact.norm()
    # Of full rank they are not: the factors were used.
    full = ranks(2, reduce_once, "powersgd", True, None, None)[0][0]
    assert (full["wide"].double() - exact_sum("wide", 2)).norm() > 0.1 * exact_sum("wide", 2).norm()
    torch.testing.assert_close(full["bias"].double(), exact_sum("bias", 2), rtol=1e-6, atol=1e-6)


def test_fewer_bytes_are_sent(ranks: Ranks) -> None:
    sent = {how: ranks(2, reduce_once, how, False, None, None)[0][1] for how in ("exact", "fp16", "bf16", "powersgd")}
    assert sent["fp16"] == sent["bf16"] == sent["exact"] // 2
    # 4 (n + m) for n m of the three large matrices, `deep` and the bias as they are
    assert sent["powersgd"] < 0.6 * sent["exact"]


def steps(count: int, feedback: bool, save_at: int | None = None) -> dict[str, Any]:
    """The same gradients again and again."""
    world = Group.world().with_shared_memory(30.0)
    held = model()
    sums = LowRankSum(list(held.named_parameters()), world, rank=2)
    total = torch.zeros(SHAPES["wide"], dtype=torch.float64)
    state: dict[str, Any] = {}
    for step in range(count):
        if step == save_at:
            state = {
                name: {key: value.clone() for key, value in item.items()} for name, item in sums.share_out().items()
            }
        give(held, world.rank)
        sums.finish()
        grad = held["wide"].grad
        assert grad is not None
        total += grad
        if not feedback:
            sums.take_up({name: {**item, "error": 0 * item["error"]} for name, item in sums.share_out().items()})
    left_out = sums.share_out()["wide"]["error"]
    return {"total": total, "left_out": left_out, "state": state, "last": held["wide"].grad}


@pytest.mark.parametrize("feedback", [True, False])
def test_what_was_left_out_comes_later(ranks: Ranks, feedback: bool) -> None:
    count = 30
    found = ranks(2, steps, count, feedback)[0]
    exact = count * exact_sum("wide", 2)
    complete = (found["total"] + found["left_out"] - exact).norm() < 1e-4 * exact.norm()
    near = (found["total"] - exact).norm() < 0.3 * exact.norm()
    # Without the feedback, the planted fault, neither holds.
    assert (bool(complete), bool(near)) == (feedback, feedback)


def resume(state: dict[str, Any], count: int) -> dict[str, Any]:
    world = Group.world()
    if world.size > 1:
        world = world.with_shared_memory(30.0)
    held = model()
    sums = LowRankSum(list(held.named_parameters()), world, rank=2)
    sums.take_up(state)
    for _ in range(count):
        for rank in range(2):  # of two ranks, on one
            if world.size == 1 or rank == world.rank:
                before = {name: p.grad for name, p in held.items()} if rank and world.size == 1 else {}
                give(held, rank)
                for name, earlier in before.items():
                    now = held[name].grad
                    if earlier is not None:
                        held[name].grad = earlier if now is None else earlier + now
        sums.finish()
        if world.size == 1 and count > 1:
            raise AssertionError("one step only")
    return {"last": held["wide"].grad}


def test_a_resumed_sum_is_the_same(ranks: Ranks) -> None:
    whole = ranks(2, steps, 6, True, 5)
    again = ranks(2, resume, whole[0]["state"], 1)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one["last"], other["last"])
    fewer = ranks(1, resume, whole[0]["state"], 1)[0]
    assert (fewer["last"] - whole[0]["last"]).norm() < 1e-4 * whole[0]["last"].norm()
    fresh = ranks(2, resume, {}, 1)[0]
    assert (fresh["last"] - whole[0]["last"]).norm() > 1e-2 * whole[0]["last"].norm()


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("serial", {"compression": "bf16"}, "no gradient sum"),
        ("shard=2", {"compression": "bf16"}, "no gradient sum"),
        ("data=2,tensor=2", {"compression": "fp16"}, "whole replicas only"),
        ("data=2,pipeline=2", {"compression": "powersgd"}, "whole replicas only"),
        ("data=2", {"compression": "bf16", "compression_rank": 2}, "only powersgd has a rank"),
    ],
)
def test_refused(layout: str, changes: dict[str, Any], words: str) -> None:
    plan = Plan(layout=Layout.parse(layout), **changes)
    with pytest.raises(PlanError, match=words):
        check_model(nn.Linear(3, 3), plan, batch_size=8, batch_norm="global")


def test_sparse_gradients_are_refused() -> None:
    plan = Plan(layout=Layout(data=2), compression="fp16")
    with pytest.raises(PlanError, match=r"0\.weight is sparse"):
        check_model(nn.Sequential(nn.Embedding(5, 3, sparse=True)), plan, batch_size=8, batch_norm="global")
    with pytest.raises(PlanError, match="compression='zip'"):
        Plan.from_dict({"compression": "zip"})
    with pytest.raises(PlanError, match="compression_rank=None"):
        Plan.from_dict({"compression_rank": None})
