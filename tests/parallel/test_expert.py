"""Steps under expert parallelism equal the serial steps: gradients, weights and expert loads, in float64 to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.tensor  # once, before ranks are forked
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise.run.dcp  # noqa: F401  # once, before ranks are forked
from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.dist.split import is_dtensor, local_part
from shardwise.errors import JobError, PlanError
from shardwise.nn.experts import Load, declare_experts, declared_experts, dispatch, expert_load
from shardwise.nn.grouped import grouped_linear
from shardwise.nn.moe import MoE, with_auxiliary_loss
from shardwise.parallel.data import GradientSum
from shardwise.parallel.expert import check_experts, forward_meets_others, split_experts
from shardwise.parallel.norm import BatchState
from shardwise.run.checkpoint import latest, load, save
from shardwise.run.export import load_weights, save_weights
from shardwise.run.folder import RunFolder
from shardwise.spec.layout import Layout
from shardwise.spec.shares import share_bounds

Ranks = Callable[..., list[Any]]
WIDTH, LENGTH, CLASSES = 6, 5, 3


class Net(nn.Module):
    """(B, T, 7) -> (B, T, 3): two residual mixture layers between linear ones."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(7, WIDTH)
        self.mix = nn.ModuleList(make() for _ in range(2))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for layer in self.mix:
            x = x + layer(x)
        out: Tensor = self.last(x)
        return out


class OwnExperts(nn.Module):
    """A user's own mixture: top-1, one matrix and one bias an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.matrix = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 3)
        self.shift = nn.Parameter(torch.randn(4, WIDTH) / 3)
        declare_experts(self, "matrix", "shift")

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weight, expert = self.gate(tokens).softmax(1).topk(1)
        return dispatch(self, tokens, expert, weight, self.run).view(x.shape)

    def run(self, rows: Tensor, counts: list[int], matrix: Tensor, shift: Tensor) -> Tensor:
        return grouped_linear(rows, counts, matrix, shift).sigmoid()


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: MoE(WIDTH, 9, 4, balance=0),
    "balanced": lambda: MoE(WIDTH, 9, 4, balance=0.7, z=0.1, gated=True, activation="silu"),
    "capacity": lambda: MoE(WIDTH, 9, 8, capacity_factor=0.6, balance=0.5, bias=True),
    "top_1": lambda: MoE(WIDTH, 9, 4, 1, activation="relu", bias=True),
    "own": OwnExperts,
}


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(MIXTURES[name]).double()


@dataclass
class Trained:
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    loads: dict[str, Load]
    losses: list[float]


def whole(tensor: Tensor) -> Tensor:
    out: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return out.detach().clone()


def assert_same(found: Trained, expected: Trained) -> None:
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-11)
    assert found.loads == expected.loads


class Training:
    """What compose and step do, with nothing but this kind and data parallelism."""

    def __init__(self, model: nn.Module, layout: str, fault: str = "") -> None:
        self.mesh = Mesh(Layout.parse(layout), Group.world().rank)
        self.model, self.fault, self.state = model, fault, BatchState()
        check_experts(model, self.mesh.layout, splits_share=False)
        split = split_experts(model, self.mesh, self.state)
        assert bool(split) is (self.mesh.layout.expert > 1)
        named = list(model.named_parameters())
        axes = ("data",) if fault == "dense not summed over expert" else ("data", "expert")
        self.sums = [
            GradientSum([(n, p) for n, p in named if n not in split], self.mesh.group(*axes)),
            GradientSum([(n, p) for n, p in named if n in split], self.mesh.group("data")),
        ]
        self.split = split
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        self.objective = with_auxiliary_loss(token_loss)

    def step(self, number: int, batch: int) -> tuple[float, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(batch, LENGTH, 7, generator=generator, dtype=torch.float64) * 2
        y = torch.randint(0, CLASSES, (batch, LENGTH), generator=generator)
        samples = self.mesh.samples
        start, stop = share_bounds(batch, samples.size)[samples.rank]
        self.state.phantom = start == stop and self.fault != "phantom counts"
        rows = slice(start, stop) if start < stop else slice(0, 1)
        self.optimizer.zero_grad()
        loss = self.objective(self.model, (x[rows].clone(), y[rows]))
        assert isinstance(loss, Tensor)
        loss = loss * ((stop - start) / batch)
        for gradient_sum in self.sums:
            gradient_sum.expect()
        loss.backward()
        for gradient_sum in self.sums:
            gradient_sum.finish()
        parameters = dict(self.model.named_parameters())
        if self.fault == "experts scaled by the degree":
            for name in self.split:
                gradient = parameters[name].grad
                assert gradient is not None
                gradient.div_(self.mesh.layout.expert)
        gradients = {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        for parameter in parameters.values():
            if parameter.grad is not None:
                local_part(parameter.grad).mul_(min(1.0, 0.3 / float(norm)))
        self.optimizer.step()
        return float(samples.sum_(loss.detach())), gradients

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in self.model.state_dict().items()}


def train(name: str, layout: str, batch: int = 7, steps: int = 3, fault: str = "") -> Trained:
    training = Training(build(name), layout, fault)
    gradients: dict[str, Tensor] = {}
    losses = []
    for number in range(steps):
        loss, new = training.step(number, batch)
        losses.append(loss)
        gradients = gradients or new
    return Trained(gradients, training.weights(), expert_load(training.model), losses)


LAYOUTS = [
    ("expert=2", 7),
    ("data=2", 7),
    ("expert=2,data=2", 7),
    ("expert=4", 9),
    ("expert=4", 3),  # one rank is a phantom
    ("expert=2,data=2", 2),  # half of the ranks are phantoms
]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("layout", "batch"), LAYOUTS)
def test_steps_equal_the_serial_steps(name: str, layout: str, batch: int, ranks: Ranks) -> None:
    serial = train(name, "serial", batch)
    start = build(name).state_dict()
    assert all(not torch.equal(start[key], value) for key, value in serial.weights.items())
    assert all(gradient.norm() > 1e-6 for gradient in serial.gradients.values())
    if name == "capacity":
        assert sum(each.dropped for each in serial.loads.values()) > 0, "no drop: the capacity would prove nothing"
    for found in ranks(Layout.parse(layout).workers, train, name, layout, batch):
        assert_same(found, serial)


FAULTS = [
    ("plain", "experts scaled by the degree", 7),
    ("plain", "dense not summed over expert", 7),
    ("balanced", "phantom counts", 1),
]


@pytest.mark.parametrize(("name", "fault", "batch"), FAULTS)
def test_a_planted_fault_shows(name: str, fault: str, batch: int, ranks: Ranks) -> None:
    serial = train(name, "serial", batch)
    with pytest.raises(AssertionError):
        assert_same(ranks(2, train, name, "expert=2", batch, 3, fault)[0], serial)
    assert_same(ranks(2, train, name, "expert=2", batch)[0], serial)


def hold(layout: str) -> tuple[int, int]:
    """Values of expert parameters on this rank, and what their optimizer states hold."""
    training = Training(build("balanced"), layout)
    training.step(0, 8)
    parameters = [p for n, p in training.model.named_parameters() if "w_" in n]
    states = [s for p in parameters for s in training.optimizer.state[p].values() if s.dim() > 0]
    return sum(local_part(p).numel() for p in parameters), sum(local_part(s).numel() for s in states)


def test_a_rank_holds_its_part_of_the_experts(ranks: Ranks) -> None:
    parameters, states = hold("serial")
    assert states == 2 * parameters
    assert ranks(4, hold, "expert=4") == [(parameters // 4, states // 4)] * 4
    assert ranks(4, hold, "expert=2,data=2") == [(parameters // 2, states // 2)] * 4


def save_part(path: str, layout: str) -> None:
    training = Training(build("balanced"), layout)
    for number in range(2):
        training.step(number, 7)
    folder = RunFolder(Path(path))
    save(folder, step=2, model=training.model, optimizer=training.optimizer, progress={})
    save_weights(training.model, folder.path / "model.safetensors")


def load_part(path: str, layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    training = Training(build("balanced", seed=1), layout)
    at = latest(RunFolder(Path(path)))
    assert at is not None
    load(at, model=training.model, optimizer=training.optimizer)
    loaded = training.weights()
    training.step(2, 7)
    return loaded, training.weights()


@pytest.mark.parametrize(
    ("before", "after"), [("expert=2,data=2", "expert=4"), ("expert=2", "serial"), ("data=2", "expert=2")]
)
def test_checkpoint_and_export_under_another_layout(before: str, after: str, ranks: Ranks, tmp_path: Any) -> None:
    folder = RunFolder.create(tmp_path / "run", "test")
    ranks(Layout.parse(before).workers, save_part, str(folder.path), before)
    expected = train("balanced", "serial", steps=2).weights
    for loaded, stepped in ranks(Layout.parse(after).workers, load_part, str(folder.path), after):
        torch.testing.assert_close(loaded, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(stepped, train("balanced", "serial").weights, rtol=1e-9, atol=1e-11)
    bare = build("balanced", seed=1)
    load_weights(bare, folder.path / "model.safetensors")
    torch.testing.assert_close(dict(bare.state_dict()), expected, rtol=1e-9, atol=1e-11)


def evaluate_part(layout: str) -> Tensor:
    training = Training(build("capacity"), layout)
    training.model.eval()
    rank = training.mesh.samples.rank
    x = torch.randn(4, LENGTH, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        out: Tensor = training.model(x[rank : rank + 1] if training.mesh.samples.size > 1 else x)
    assert expert_load(training.model)["mix.0"].tokens == (0,) * 8
    return out


def test_evaluation_drops_nothing_and_equals_serial(ranks: Ranks) -> None:
    parts = ranks(4, evaluate_part, "expert=4")
    torch.testing.assert_close(torch.cat(parts), evaluate_part("serial"), rtol=1e-11, atol=1e-12)


def check(model: nn.Module, layout: str, *, splits_share: bool = False) -> None:
    check_experts(model, Layout.parse(layout), splits_share=splits_share)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(PlanError, match="no experts to split"):
        check(nn.Linear(3, 3), "expert=2")
    with pytest.raises(PlanError, match=r"mix\.0 has 4 experts.*use one of 1, 2, 4"):
        check(build("plain"), "expert=3")
    with pytest.raises(PlanError, match=r"balance=0\.7 looks at all tokens.*micro_batch"):
        check(build("balanced"), "data=2", splits_share=True)
    with pytest.raises(PlanError, match=r"capacity_factor=0\.6.*context"):
        check(build("capacity"), "context=2")
    check(build("balanced"), "pipeline=2")
    check(build("plain"), "pipeline=2,expert=2", splits_share=True)


def test_undeclared_stacked_parameters_are_named() -> None:
    class Stacked(nn.Module):
        pass

    model = Stacked()
    model.conv = nn.Conv2d(2, 2, 3)
    model.stack = nn.Parameter(torch.zeros(4, 2, 2))
    with pytest.raises(PlanError, match=r"ones: stack \(4, 2, 2\)\)"):
        check(model, "expert=2")


def test_experts_shared_with_a_plain_module_are_refused() -> None:
    model = nn.ModuleDict({"own": OwnExperts(), "plain": nn.Linear(WIDTH, WIDTH)})
    model["plain"].register_parameter("extra", model["own"].get_parameter("matrix"))
    with pytest.raises(PlanError, match=r"plain\.extra is declared as stacked experts elsewhere"):
        check(model, "expert=2")


def test_experts_shared_by_two_layers_stay_shared(ranks: Ranks) -> None:
    serial = share_part("serial")
    for found in ranks(2, share_part, "expert=2"):
        torch.testing.assert_close(found, serial, rtol=1e-9, atol=1e-11)


def share_part(layout: str) -> dict[str, Tensor]:
    model = build("own")
    assert isinstance(model, Net)
    model.mix[1].register_parameter("matrix", model.mix[0].get_parameter("matrix"))
    training = Training(model, layout)
    training.step(0, 7)
    assert model.mix[0].get_parameter("matrix") is model.mix[1].get_parameter("matrix")
    return training.weights()


def test_which_forward_passes_meet_others() -> None:
    assert forward_meets_others(build("plain"), Layout(expert=2))
    assert forward_meets_others(build("balanced"), Layout(data=2))
    assert not forward_meets_others(build("plain"), Layout(data=2))
    assert not forward_meets_others(build("balanced"), Layout())
    assert not forward_meets_others(nn.Linear(2, 2), Layout(data=2))


def forgotten_part(layout: str) -> str:
    training = Training(build("balanced"), layout)
    training.objective = lambda model, batch: token_loss(model(batch[0]), batch[1])
    try:
        training.step(0, 4)
    except JobError as error:
        return str(error)
    return ""


def test_a_forgotten_auxiliary_loss_is_an_error_on_every_rank(ranks: Ranks) -> None:
    for text in ranks(2, forgotten_part, "expert=2"):
        assert "with_auxiliary_loss" in text


def test_experts_are_where_the_place_says(ranks: Ranks) -> None:
    assert ranks(4, place_part, "expert=2,data=2") == [(0, 0, (0, 1)), (1, 1, (0, 1)), (2, 0, (2, 3)), (3, 1, (2, 3))]


def place_part(layout: str) -> tuple[int, int, tuple[int, ...]]:
    model = build("plain")
    Training(model, layout)
    experts = declared_experts(model.get_submodule("mix.1"))
    assert experts is not None
    return experts.place.tokens.rank, experts.place.experts.rank, experts.place.members
