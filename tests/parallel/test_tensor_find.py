"""Finding splits: what is found, what is left whole and why, the user's rules, and the plan as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.dist.split import is_dtensor
from shardwise.errors import PlanError
from shardwise.parallel.steps import check_optimizer
from shardwise.parallel.tensor.apply import apply_split
from shardwise.parallel.tensor.find import find_split
from shardwise.parallel.tensor.plan import TensorPlan
from shardwise.parallel.tensor.ring import Cut
from shardwise.spec.layout import Layout


class Heads(nn.Module):
    """Attention with sizes written out; `fused` makes query, key and value with one layer."""

    def __init__(self, width: int, heads: int, fused: str = "three_first") -> None:
        super().__init__()
        self.heads, self.each, self.fused = heads, width // heads, fused
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        if self.fused == "three_first":
            q, k, v = self.qkv(x).view(n, t, 3, self.heads, self.each).permute(2, 0, 3, 1, 4)
        elif self.fused == "heads_first":
            q, k, v = self.qkv(x).view(n, t, self.heads, 3, self.each).permute(3, 0, 2, 1, 4).unbind(0)
        else:
            parts = self.qkv(x).split(width, dim=2)
            q, k, v = (part.reshape(n, -1, self.heads, self.each).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(n, t, width)
        return torch.as_tensor(self.out(y))


class Uneven(nn.Module):
    """Query, key and value of different widths from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 8 + 4 + 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([8, 4, 4], dim=-1)
        return torch.as_tensor(self.out(q * torch.cat([k, v], -1)))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(Double.apply(self.up(x))))  # type: ignore[no-untyped-call]


class InPlace(nn.Module):
    """Changes single elements of a hidden tensor, which no rank could do on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden[:, 3] = 0.0
        return torch.as_tensor(self.down(hidden))


class Lying(nn.Module):
    """Counts its calls: no two passes are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.calls = nn.Linear(4, 8), nn.Linear(8, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.as_tensor(self.down(self.up(x)) * self.calls)


def found(model: nn.Module, *shape: int, ranks: int = 2, **rules: str) -> TensorPlan:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    named = {name.replace("__", "."): how for name, how in rules.items()}
    return find_split(model, lambda m: m(x).square().mean(), ranks, rules=named)


def how(plan: TensorPlan) -> dict[str, str]:
    return {row.module: row.how for row in plan.rows}


@pytest.mark.parametrize(("fused", "outer"), [("three_first", 3), ("heads_first", 1), ("split", 3)])
@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (6, 3), (3, 3)])
def test_fused_attention_is_split_by_heads(fused: str, outer: int, heads: int, ranks: int) -> None:
    plan = found(Heads(12, heads, fused), 2, 5, 12, ranks=ranks)
    assert plan.shares["qkv.weight"].outer == plan.shares["qkv.bias"].outer == outer
    assert (plan.shares["out.weight"].dim, plan.shares["out.weight"].outer) == (1, 1)
    assert "out.bias" not in plan.shares
    assert plan.bytes_saved == 4 * (36 * 13 + 12 * 12) * (ranks - 1) // ranks


def test_heads_that_cannot_be_shared_stay_whole() -> None:
    with pytest.raises(PlanError, match=r"qkv \(Linear\): its shape .* cuts across the shares of 2 ranks"):
        found(Heads(15, 3, "heads_first"), 2, 5, 15)


def test_parts_of_different_widths_stay_whole() -> None:
    with pytest.raises(
        PlanError, match=r"qkv \(Linear\): its split dim is divided into parts of different lengths \[8, 4, 4\]"
    ):
        found(Uneven(), 3, 8)


def test_autograd_functions_of_the_users_own_need_whole_tensors() -> None:
    model = nn.Sequential(WithFunction(), nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    plan = found(model, 3, 4)
    assert how(plan) == {"0.up": "whole", "0.down": "whole", "1": "whole", "2": "column", "4": "row"}
    assert "autograd function Double" in plan.rows[0].why


def test_elements_changed_in_place_keep_a_tensor_whole() -> None:
    plan = found(nn.Sequential(InPlace(), nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), 3, 4)
    assert how(plan) == {"0.up": "whole", "0.down": "whole", "1": "whole", "2": "column", "4": "row"}


def test_a_model_with_nothing_to_split_is_told_what_was_looked_at() -> None:
    lstm = nn.LSTM(7, 8, batch_first=True)
    x = torch.randn(2, 3, 7)
    with pytest.raises(
        PlanError, match=r"nothing in this model can be split over 2 ranks. Looked at .*LSTM.*used by lstm"
    ):
        find_split(lstm, lambda m: m(x)[0].sum(), 2)
    with pytest.raises(PlanError, match=r"0 \(Linear\): layer_norm is taken along its split dim"):
        found(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 3, 4)


def test_too_few_units_stay_whole() -> None:
    with pytest.raises(PlanError, match=r"0 \(Linear\): 5 units leave some of 4 ranks without any"):
        found(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), 2, 3, ranks=4)


def test_longer_chains_pair_up() -> None:
    layers = [nn.Linear(6, 6) for _ in range(5)]
    chain = nn.Sequential(*(item for layer in layers for item in (layer, nn.Tanh())))
    plan = found(chain, 3, 6)
    assert how(plan) == {"0": "column", "2": "row", "4": "column", "6": "row", "8": "whole"}
    assert plan.inside == ("0", "1", "2", "4", "5", "6")


def test_rules_overrule() -> None:
    pair = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 6))
    assert how(found(pair, 3, 6)) == {"0": "column", "2": "row", "3": "whole"}
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 6))
    x = torch.randn(3, 6)
    plan = find_split(model, lambda m: m(x).square().mean(), 2, rules={"0": "replicate", "3": "row"})
    assert how(plan) == {"0": "whole", "2": "column", "3": "row"}
    assert plan.rows[0].why == "as its rule says"
    with pytest.raises(PlanError, match="no module of that name"):
        find_split(model, lambda m: m(x).sum(), 2, rules={"first": "column"})
    with pytest.raises(PlanError, match="must be one of column, row"):
        find_split(model, lambda m: m(x).sum(), 2, rules={"0": "rows"})
    with pytest.raises(PlanError, match="Tanh has no weight matrix"):
        find_split(model, lambda m: m(x).sum(), 2, rules={"1": "column"})
    with pytest.raises(PlanError, match="an Embedding is split by vocabulary"):
        find_split(model, lambda m: m(x).sum(), 2, rules={"0": "vocabulary"})


def test_a_pass_that_differs_from_the_whole_one_is_refused() -> None:
    with pytest.raises(PlanError, match="differs from the whole one"):
        found(Lying(), 3, 4)


def test_dropout_is_said_and_state_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plan = found(model, 3, 6)
    assert len(plan.remarks) == 1
    assert "dropout inside split layers" in plan.remarks[0]
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Dropout(0.1)), 3, 6).remarks == ()


def test_a_model_without_values_is_split_alike() -> None:
    model = nn.Sequential(Heads(12, 4), nn.LayerNorm(12), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 12))
    with torch.device("meta"):
        empty = nn.Sequential(Heads(12, 4), nn.LayerNorm(12), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 12))
        x = torch.empty(2, 5, 12)
    assert find_split(empty, lambda m: m(x).square().mean(), 2) == found(model, 2, 5, 12)


def test_the_plan_prints_itself_and_is_plain_data() -> None:
    plan = found(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), 3, 6)
    text = str(plan)
    assert "column" in text.splitlines()[1]
    assert text.splitlines()[-1] == "tensor=2 splits 2 of 2 modules and saves 208 B of parameters on each rank"
    assert plan.bytes_saved == 4 * (24 + 4 + 24)
    assert TensorPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("build", [lambda: Cut(1, 1, 7, 2), lambda: Cut(0, 3, 4, 2), lambda: Cut(1, 1, 10, 4)])
def test_pieces_join_to_the_whole(build: Callable[[], Cut]) -> None:
    cut = build()
    shape = [3, 3]
    shape[cut.dim] = cut.total
    whole = torch.arange(3.0 * cut.total).reshape(shape)
    pieces = [cut.piece(whole, rank) for rank in range(cut.ranks)]
    assert sum(piece.shape[cut.dim] for piece in pieces) == cut.total
    assert all(piece.shape[cut.dim] == cut.outer * cut.share(rank) for rank, piece in enumerate(pieces))
    assert torch.equal(cut.join(pieces), whole)


def test_optimizers_that_cannot_step_on_split_parameters_are_refused(ranks: Callable[..., list[Any]]) -> None:
    assert (
        ranks(2, stepping)
        == [
            {
                "AdamW": "stepped",
                "Adagrad": "stepped",
                "NAdam": "stepped",
                "Adafactor": "refused",
                "Rprop": "refused",
                "foreach": "refused",
                "fused": "refused",
            }
        ]
        * 2
    )
    plain = nn.Linear(3, 3)
    assert check_optimizer(torch.optim.AdamW(plain.parameters(), foreach=True), is_dtensor) == ()


def stepping() -> dict[str, str]:
    """What becomes of a step with each optimizer, on a model with whole and split parameters."""
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    mesh = Mesh(Layout(tensor=2), Group.world().rank)
    apply_split(model, found(model, 3, 6), mesh.group("tensor"), mesh.device_mesh("tensor"))
    model(torch.ones(2, 6)).sum().backward()
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        name: getattr(torch.optim, name) for name in ("AdamW", "Adagrad", "NAdam", "Adafactor", "Rprop")
    }
    kinds["foreach"] = lambda p: torch.optim.AdamW(p, foreach=True)
    kinds["fused"] = lambda p: torch.optim.AdamW(p, fused=True)
    outcome = {}
    for name, make in kinds.items():
        try:
            optimizer = make(list(model.parameters()))
            check_optimizer(optimizer, is_dtensor)
            optimizer.step()
            outcome[name] = "stepped"
        except PlanError:
            outcome[name] = "refused"
    return outcome
