"""Recomputation changes no number: not gradients, not buffers, not random masks; and what it cannot do exactly is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from shardwise.errors import PlanError
from shardwise.parallel.blocks import repeated_blocks
from shardwise.parallel.compose import check_model
from shardwise.parallel.recompute import recompute, recomputed_modules
from shardwise.parallel.shard import unit_names
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan


class Block(nn.Module):
    """A convolution, BatchNorm, dropout, and an argument by keyword."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(p)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU())

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x + scale * torch.as_tensor(self.drop(self.inner(F.relu(self.norm(self.conv(x))))))


class Net(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(Block(p) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return torch.as_tensor(self.head(x.mean((2, 3))))


def net(p: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(p)


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 7, 7, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


def passes(model: nn.Module) -> dict[str, Tensor]:
    """Everything that two forward and backward passes leave."""
    x, y = images()
    torch.manual_seed(3)
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"random": torch.rand(4)}


def saved_bytes(model: nn.Module) -> int:
    """What a forward pass leaves for the backward pass, each piece of memory once."""
    x, y = images()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), y)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del loss
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_every_bit_is_the_same(how: Any) -> None:
    expected = passes(net(0.3))
    model = net(0.3)
    kept = recompute(model, Plan(recompute=how))
    found = passes(model)
    assert kept.names == ["blocks.0", "blocks.1", "blocks.2"]
    assert kept.calls == 6
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert expected["blocks.1.norm.num_batches_tracked"] == 2
    assert not torch.equal(expected["blocks.1.norm.running_mean"], torch.zeros(4))


def test_less_is_kept() -> None:
    whole = saved_bytes(net())
    kept: dict[str, int] = {}
    for how in ("full", "selective"):
        model = net()
        recompute(model, Plan(recompute=how))
        kept[how] = saved_bytes(model)
    assert kept["full"] < 0.35 * whole
    assert kept["full"] <= kept["selective"] < whole


def test_modules_by_name() -> None:
    model = net()
    kept = recompute(model, Plan(recompute="full", recompute_modules=("blocks.*.inner", "blocks.0.norm")))
    assert kept.names == ["blocks.0.inner", "blocks.1.inner", "blocks.2.inner", "blocks.0.norm"]
    passes(model)
    assert kept.calls == 8
    model.eval()
    with torch.no_grad():
        model(images()[0])
    assert kept.calls == 8


REFUSED: dict[str, tuple[Plan, str]] = {
    "no module": (Plan(recompute="full", recompute_modules=("blocks.7",)), "no module is called 'blocks.7'"),
    "container": (
        Plan(recompute="full", recompute_modules=("blocks",)),
        "never called; name what is in it, as 'blocks.*'",
    ),
    "inside": (
        Plan(recompute="full", recompute_modules=("blocks.*", "blocks.1.inner")),
        "'blocks.1.inner' lies inside 'blocks.1'",
    ),
    "compile": (Plan(recompute="full", compile=True), "with compile"),
    "names alone": (Plan(recompute_modules=("blocks.*",)), "recompute is 'none': give recompute as well"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case: str) -> None:
    plan, message = REFUSED[case]
    with pytest.raises(PlanError) as error:
        check_model(net(), plan, batch_size=8, batch_norm="global")
    assert message in str(error.value)


def test_without_blocks_modules_must_be_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(PlanError, match=r"Sequential has no repeated blocks \(looked at 0, 1, 2\)"):
        recomputed_modules(model, Plan(recompute="full"))


class InPlace(nn.Module):
    """The sum of a block is added to the block's own input, which it needs again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        for block in self.blocks:
            x += block(x)
        return x


def test_an_input_that_was_changed_is_found_out() -> None:
    model = InPlace()
    recompute(model, Plan(recompute="full"))
    with pytest.raises(PlanError, match=r"an input of module 'blocks.1' was changed in place"):
        model(torch.ones(2, 4)).sum().backward()


def test_a_kept_result_that_was_changed_is_found_out() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(2)))
    expected = model(torch.ones(2, 4))
    recompute(model, Plan(recompute="selective"))
    with pytest.raises(PlanError, match=r"in place \(as ReLU\(inplace=True\) does\).*use recompute='full'"):
        model(torch.ones(2, 4)).sum().backward()
    again = nn.Sequential(*model)
    torch.testing.assert_close(again(torch.ones(2, 4)), expected)


@pytest.mark.parametrize("fault", ["none", "buffers"])
def test_buffers_put_back_are_what_keeps_them_right(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, BatchNorm counts every batch twice."""
    from shardwise.parallel import recompute as module

    if fault == "buffers":
        monkeypatch.setattr(module, "_buffers", lambda _: iter(()))
    model = net()
    recompute(model, Plan(recompute="full"))
    twice = passes(model)["blocks.0.norm.num_batches_tracked"] != 2
    assert bool(twice) is (fault == "buffers")


class Averages(nn.Module):
    """Divides by an average that it keeps of its own outputs, which it writes in place or anew."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.get_buffer("mean")
        y = self.linear(x) / mean.clone()
        new = 0.5 * mean + 0.5 * y.detach().abs().mean(0)
        if self.kind == "in place":
            mean.copy_(new)
        elif self.kind == "anew":
            self.mean = new
        return torch.as_tensor(y.tanh())


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("kind", ["in place", "anew", "large", "spectral_norm"])
def test_what_reads_a_buffer_that_it_writes_reads_the_same_again(kind: str, how: Any) -> None:
    def block() -> nn.Module:
        if kind == "spectral_norm":
            return nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Tanh())
        return Averages("in place") if kind == "large" else Averages(kind)

    def train(plan: Plan | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(block() for _ in range(3))).double()
        if plan is not None:
            recompute(model, plan)
        for step in range(3):  # gradients add up
            model(torch.full((5, 4), step + 1.0, dtype=torch.float64).cumsum(0)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | dict(
            model.named_buffers()
        )

    with pytest.MonkeyPatch.context() as patch:
        if kind == "large":
            patch.setattr("shardwise.parallel.recompute.SMALL", 3)
        found = train(Plan(recompute=how))
    expected = train(None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_large_buffer_that_is_written_later_on_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.parallel.recompute.SMALL", 3)
    model = nn.Sequential(*(Averages("not") for _ in range(2)))
    recompute(model, Plan(recompute="full"))
    model(torch.ones(2, 4)).sum().backward()
    for block in model:
        vars(block)["kind"] = "in place"
    with pytest.raises(PlanError, match=r"module '0' changes its buffer 'mean' in this call"):
        model(torch.ones(2, 4))


def test_blocks_and_units_of_torchs_transformer() -> None:
    """Its layers are blocks; attention inside of a layer is none, and lists are never called."""
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    layers = [f"{side}.layers.{index}" for side in ("encoder", "decoder") for index in range(2)]
    assert repeated_blocks(model) == layers == unit_names(model)
    assert repeated_blocks(nn.Transformer(8, 2, 1, 1, 16, batch_first=True)) == []
    lists = nn.ModuleDict({side: nn.ModuleList(Block() for _ in range(2)) for side in ("down", "up")})
    assert repeated_blocks(lists) == ["down.0", "down.1", "up.0", "up.1"]


def test_a_pipeline_refuses_modules_that_it_cuts() -> None:
    from shardwise.parallel.recompute import check_cut

    plan = Plan(layout=Layout(pipeline=2), recompute="full")
    check_cut(net(), plan, {"blocks"})
    with pytest.raises(PlanError, match=r"module 'blocks.1' is cut by the pipeline's stages"):
        check_cut(net(), plan, {"blocks.1"})
