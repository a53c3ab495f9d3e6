"""What the comparison with the serial run would miss must not exist: each planted fault shows. And dropout keeps ranks equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.parallel.clip import clip_by_global_norm
from shardwise.parallel.tensor import products
from shardwise.parallel.tensor.apply import apply_split
from shardwise.parallel.tensor.find import find_split
from shardwise.parallel.tensor.ring import Cut, Ring
from shardwise.spec.layout import Layout

Ranks = Callable[..., list[Any]]
Gradients = dict[str, Tensor]


class Net(nn.Module):
    """A norm before and after a split pair of layers, so that gradients pass both ways over each crossing."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.LayerNorm(6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.inner, self.outer = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(torch.tanh(self.up(self.first(x))))
        return torch.as_tensor(self.last(self.outer(x + self.down(hidden))))


def batch() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loss_of(model: nn.Module) -> Tensor:
    return torch.as_tensor((model(batch()) * torch.arange(6)).square().mean())


def build(p: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(p).double()


def split(model: nn.Module) -> None:
    world = Group.world()
    mesh = Mesh(Layout(tensor=world.size), world.rank)
    plan = find_split(model, loss_of, world.size)
    apply_split(model, plan, mesh.group("tensor"), mesh.device_mesh("tensor"))


def gradients_of(model: nn.Module) -> Gradients:
    loss = loss_of(model)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def no_sum(self: Ring, values: Sequence[Tensor]) -> Tensor:
    """Every rank takes its own summand for the sum."""
    return values[0].clone()


def bias_on_every_rank(result: Tensor, bias: Tensor | None) -> Tensor:
    return result if bias is None else result + 2 * bias


def no_entry(self: Ring, whole: Tensor) -> tuple[Tensor, ...]:
    """The backward pass does not sum where a whole tensor meets pieces."""
    return (whole,)


def wrong_piece(self: Cut, whole: Tensor, rank: int) -> Tensor:
    """The last rank starts one element too early."""
    start = self.start(rank) - (1 if rank else 0)
    return whole.narrow(self.dim, start, self.share(rank))


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "none": (Ring, "add", Ring.add),
    "missing_sum": (Ring, "add", no_sum),
    "bias_on_every_rank": (products, "_plus", bias_on_every_rank),
    "gradient_of_input_not_summed": (Ring, "enter", no_entry),
    "wrong_piece": (Cut, "piece", wrong_piece),
}


def with_fault(fault: str) -> Gradients:
    model = build()
    world = Group.world()
    mesh = Mesh(Layout(tensor=world.size), world.rank)
    plan = find_split(model, loss_of, world.size)
    place, name, replacement = FAULTS[fault]
    setattr(place, name, replacement)
    apply_split(model, plan, mesh.group("tensor"), mesh.device_mesh("tensor"))
    return gradients_of(model)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_each_fault_shows(fault: str, ranks: Ranks) -> None:
    expected = gradients_of(build())
    wrong = set()
    for found in ranks(2, with_fault, fault):
        wrong |= {name for name, tensor in expected.items() if (found[name] - tensor).abs().max() > 1e-12}
    if fault == "none":
        assert not wrong
    elif fault == "gradient_of_input_not_summed":
        assert wrong == {"first.weight", "first.bias"}
    else:
        assert "loss" in wrong


def drop() -> tuple[Tensor, Gradients, Tensor]:
    model = build(0.5)
    split(model)
    masks: list[Tensor] = []
    model.inner.register_forward_hook(lambda module, args, output: masks.append(output.pieces[0].detach() == 0))
    torch.manual_seed(11)
    found = gradients_of(model)
    return masks[0], found, torch.rand(4)


def test_dropout_differs_between_pieces_and_keeps_whole_tensors_equal(ranks: Ranks) -> None:
    (first_mask, first, next_random), (second_mask, second, other_random) = ranks(2, drop)
    assert first_mask.any(), "nothing was dropped"
    assert not torch.equal(first_mask[:, :4], second_mask), "both ranks drop alike"
    assert torch.equal(next_random, other_random), "the ranks' random streams parted"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"ranks disagree on {name}"


def clip_all() -> tuple[Tensor, Tensor]:
    """Plain, split and doubly split gradients beside each other."""
    mesh = Mesh(Layout(shard=2, tensor=2), Group.world().rank)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    both = mesh.device_mesh("shard", "tensor")
    parameters = [
        nn.Parameter(wholes[0].clone()),
        nn.Parameter(distribute_tensor(wholes[1], mesh.device_mesh("tensor"), [Shard(1)])),
        nn.Parameter(distribute_tensor(wholes[2], both, [Shard(0), Shard(1)])),
        nn.Parameter(distribute_tensor(wholes[3], both, [Shard(0), Replicate()])),
    ]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    norm = clip_by_global_norm(parameters, 0.5)
    clipped = []
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        clipped.append((gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).flatten())
    return norm, torch.cat(clipped) - torch.cat([whole.flatten() for whole in wholes]) * (0.5 / (norm + 1e-6))


def test_the_norm_counts_every_element_once(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.cat([torch.randn(24, generator=generator, dtype=torch.float64) for _ in range(4)]).norm()
    for norm, difference in ranks(4, clip_all):
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
        assert difference.abs().max() < 1e-12


def untouched_output() -> Tensor:
    """A split output that no rule knows what to do with is put together: slower, never wrong."""
    torch.manual_seed(0)
    model = nn.Linear(4, 6).double()
    world = Group.world()
    mesh = Mesh(Layout(tensor=world.size), world.rank)
    plan = find_split(model, lambda m: m(batch()[:, :4]).sum(), world.size, rules={"": "column"})
    apply_split(model, plan, mesh.group("tensor"), mesh.device_mesh("tensor"))
    x = batch()[:, :4].requires_grad_()
    F.softmax(model(x).cumsum(1), 1)[:, 2].sum().backward()
    assert x.grad is not None
    return x.grad


def test_a_forced_split_is_exact(ranks: Ranks) -> None:
    expected = untouched_serial()
    for found in ranks(3, untouched_output):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def untouched_serial() -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 6).double()
    x = batch()[:, :4].requires_grad_()
    F.softmax(model(x).cumsum(1), 1)[:, 2].sum().backward()
    assert x.grad is not None
    return x.grad
