"""MoE on one worker: what it computes, by the naive way, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardwise
from shardwise.errors import JobError
from shardwise.nn.experts import Load, declare_experts, dispatch, expert_load
from shardwise.nn.grouped import grouped_linear
from shardwise.nn.moe import MoE, auxiliary_loss, with_auxiliary_loss

D, H, E = 7, 15, 5


def make(seed: int = 0, **settings: Any) -> MoE:
    torch.manual_seed(seed)
    return MoE(D, H, E, **settings).double()


def tokens(count: int = 23, seed: int = 1) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def naive(layer: MoE, x: Tensor, capacity: int | None = None) -> Tensor:
    """Every token by itself, every expert one after the other."""
    taken = [0] * E
    rows = []
    for token in x:
        probability = torch.softmax(layer.router.weight @ token, 0)
        weight, chosen = probability.topk(layer.top_k)
        if layer.renormalize:
            weight = weight / weight.sum()
        out = torch.zeros_like(token)
        for w, e in sorted(zip(weight, chosen.tolist(), strict=True), key=lambda pair: pair[1]):
            taken[e] += 1
            if capacity is not None and taken[e] > capacity:
                continue
            hidden = token @ layer.w_in[e] + (0 if layer.b_in is None else layer.b_in[e])
            if layer.gated:
                hidden = nn.functional.gelu(hidden[:H]) * hidden[H:]
            else:
                hidden = nn.functional.gelu(hidden)
            out = out + w * (hidden @ layer.w_out[e] + (0 if layer.b_out is None else layer.b_out[e]))
        rows.append(out)
    return torch.stack(rows)


def gradients(out: Tensor, layer: MoE, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 1}, {"top_k": 5}, {"top_k": 3, "bias": True, "gated": True}, {"top_k": 2, "renormalize": False}],
)
def test_output_and_gradients_are_the_naive_ones(settings: dict[str, Any]) -> None:
    layer, x = make(balance=0, **settings), tokens()
    torch.testing.assert_close(layer(x), naive(layer, x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(layer(x), layer, x), gradients(naive(layer, x), layer, x))


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_capacity_serves_the_first_tokens(factor: float) -> None:
    layer, x = make(balance=0, capacity_factor=factor), tokens()
    capacity = math.ceil(factor * 23 * 2 / E)
    expected = naive(layer, x, capacity)
    assert not torch.allclose(expected, naive(layer, x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(layer(x), layer, x), gradients(expected, layer, x))
    layer.eval()
    torch.testing.assert_close(layer(x), naive(layer, x), rtol=1e-12, atol=1e-13)


def test_leading_dims_are_kept() -> None:
    layer, x = make(balance=0), tokens(12)
    torch.testing.assert_close(layer(x.view(3, 4, D)), layer(x).view(3, 4, D))


def test_auxiliary_losses_by_hand() -> None:
    layer, x = make(balance=0.3, z=0.2, top_k=2), tokens()
    layer(x)
    logits = x @ layer.router.weight.T
    probability = logits.softmax(1)
    fraction = torch.bincount(probability.topk(2).indices.flatten(), minlength=E) / (23 * 2)
    balance = E * (fraction * probability.mean(0)).sum()
    z = logits.logsumexp(1).square().mean()
    expected = 0.3 * balance + 0.2 * z
    found = layer.auxiliary_loss()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, layer.router.weight]), torch.autograd.grad(expected, [x, layer.router.weight])
    )
    assert layer.auxiliary_loss().item() == 0


def test_even_use_has_balance_one() -> None:
    layer = MoE(4, 3, 4, 1, balance=1.0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4) * 1e-3)
    layer(torch.eye(4))
    assert layer.auxiliary_loss().item() == pytest.approx(1.0, abs=1e-5)


def test_every_pass_counts_until_collected() -> None:
    layer = make(balance=0.3)
    layer(tokens(seed=1))
    layer(tokens(seed=2))
    both = layer.auxiliary_loss()
    layer(tokens(seed=1))
    first = layer.auxiliary_loss()
    layer(tokens(seed=2))
    torch.testing.assert_close(both, first + layer.auxiliary_loss())


def test_evaluation_has_no_auxiliary_loss_and_no_load() -> None:
    model = nn.Sequential(make(balance=0.3, z=0.1)).eval()
    model(tokens())
    assert auxiliary_loss(model).item() == 0
    assert expert_load(model) == {"0": Load((0,) * E, 0)}


def test_a_forgotten_auxiliary_loss_is_an_error() -> None:
    cases: list[dict[str, Any]] = [{"balance": 0.1}, {"balance": 0, "z": 0.1}]
    for settings in cases:
        layer = make(**settings)
        with pytest.raises(JobError, match="with_auxiliary_loss"):
            layer(tokens()).sum().backward()
    make(balance=0)(tokens()).sum().backward()


def test_objective_adds_the_auxiliary_loss() -> None:
    model = nn.Sequential(make(balance=0.3), nn.Linear(D, 3).double())
    x, y = tokens().detach(), torch.arange(23) % 3
    value = with_auxiliary_loss(nn.functional.cross_entropy)(model, (x, y))
    plain = nn.functional.cross_entropy(model(x), y)
    torch.testing.assert_close(value, plain + auxiliary_loss(model))
    assert isinstance(value, Tensor)
    value.backward()


def test_objective_with_a_weight_is_a_sum_and_a_count() -> None:
    model = nn.Sequential(make(balance=0.3), nn.Linear(D, 3).double())
    objective = with_auxiliary_loss(nn.functional.cross_entropy, lambda target: (target >= 0).sum())
    x, y = tokens().detach(), torch.arange(23) % 3
    y[5:] = -100
    value = objective(model, (x, y))
    assert isinstance(value, tuple)
    plain = nn.functional.cross_entropy(model(x), y)
    torch.testing.assert_close(value[0], (plain + auxiliary_loss(model)) * 5)
    assert value[1] == 5
    nothing = objective(model, (x, torch.full_like(y, -100)))
    assert isinstance(nothing, tuple)
    assert nothing[0] == 0 and nothing[1] == 0
    nothing[0].backward()


def test_load_counts_choices_and_drops() -> None:
    model = nn.ModuleDict({"a": make(balance=0, top_k=1, capacity_factor=0.5), "b": make(balance=0)})
    x = tokens()
    chosen = torch.bincount((x @ model["a"].router.weight.T).argmax(1), minlength=E)  # type: ignore[operator, union-attr]
    model["a"](x)
    model["a"](x)
    load = expert_load(model)
    assert load["a"].tokens == tuple((2 * chosen).tolist())
    assert load["a"].dropped == 2 * (chosen - math.ceil(0.5 * 23 / E)).clamp(min=0).sum().item() > 0
    assert load["b"] == Load((0,) * E, 0) == expert_load(model)["a"]


def test_recomputation_changes_nothing() -> None:
    results = []
    for recompute in (False, True):
        layer, x = make(balance=0.3, z=0.1), tokens()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        (y.square().sum() + layer.auxiliary_loss()).backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
        assert sum(expert_load(nn.Sequential(layer))["0"].tokens) == 23 * 2
        assert layer.auxiliary_loss().item() == 0
    torch.testing.assert_close(results[1], results[0])


def test_bf16_autocast_computes_the_experts_in_bf16_and_routes_in_float32() -> None:
    layer = MoE(D, H, E, balance=0)
    x = tokens().detach().float()
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        hidden = grouped_linear(x, [23, 0, 0, 0, 0], layer.w_in)
    assert (y.dtype, hidden.dtype) == (torch.float32, torch.bfloat16)
    assert 0 < (y - exact).norm() / exact.norm() < 0.02
    y.sum().backward()
    assert layer.w_in.grad is not None
    assert layer.w_in.grad.dtype == torch.float32


def test_no_tokens_at_all() -> None:
    layer = make(balance=0)
    y = layer(torch.zeros(0, D, dtype=torch.float64))
    assert y.shape == (0, D)
    y.sum().backward()
    assert layer.w_in.grad is not None
    assert layer.w_in.grad.abs().sum() == 0


def test_a_copy_is_independent() -> None:
    layer = make(balance=0)
    twin = copy.deepcopy(layer)
    layer(tokens())
    assert sum(expert_load(nn.Sequential(twin))["0"].tokens) == 0
    torch.testing.assert_close(twin(tokens()), layer(tokens()))


def test_grouped_linear_gradients_numerically() -> None:
    rows, weight, bias = tokens(6), torch.randn(3, D, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    leaves = (rows, weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda r, w, b: grouped_linear(r, [4, 0, 2], w, b), leaves)
    with pytest.raises(ValueError, match="one count an expert"):
        grouped_linear(rows, [4, 0, 1], weight)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"top_k": 6}, "more experts than there are"),
        ({"top_k": 0}, "top_k=0"),
        ({"capacity_factor": 0}, "capacity_factor=0"),
        ({"balance": -1}, "balance=-1"),
        ({"activation": "tanh"}, "one of gelu, relu, silu"),
    ],
)
def test_settings_that_make_no_layer(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError, match=text):
        make(**settings)


def test_declarations_that_name_no_experts() -> None:
    module = nn.Linear(3, 4)
    with pytest.raises(JobError, match="no parameter 'w'"):
        declare_experts(module, "w")
    with pytest.raises(JobError, match="names no parameter"):
        declare_experts(module)
    module.register_parameter("other", nn.Parameter(torch.zeros(5, 2)))
    with pytest.raises(JobError, match="first dims differ"):
        declare_experts(module, "weight", "other")
    with pytest.raises(JobError, match="declared no experts"):
        dispatch(module, tokens(), torch.zeros(23, 1, dtype=torch.long), torch.ones(23, 1), lambda *_: tokens())


def test_public_names() -> None:
    assert shardwise.nn.MoE is MoE
    assert shardwise.nn.with_auxiliary_loss is with_auxiliary_loss
    with pytest.raises(AttributeError, match="it has MoE"):
        shardwise.nn.Moe  # noqa: B018
