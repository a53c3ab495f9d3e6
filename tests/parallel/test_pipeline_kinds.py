"""Pipelines together with replicas, sharding, global BatchNorm, recompute, bf16 and models that compute their own loss."""

from __future__ import annotations

import functools
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.errors import RunFailed
from shardwise.parallel.data import GradientSum
from shardwise.parallel.norm import BatchState, globalize_batch_norm
from shardwise.parallel.pipeline.part import PipelinePart, split, take_part
from shardwise.parallel.pipeline.runner import PipelineRunner
from shardwise.parallel.pipeline.shared import SharedGradientSum
from shardwise.spec.layout import Layout

CPU = torch.device("cpu")
Weights = dict[str, Tensor]


class Tied(nn.Module):
    """Tied embedding and head around a few blocks, one of them recomputed in the backward pass."""

    def __init__(self, *, recompute: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.recompute = recompute
        self.tok = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 15), nn.GELU(), nn.Linear(15, 8), nn.Dropout(dropout))
            for _ in range(4)
        )
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        y: Tensor = self.head(x)
        return y


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.second(x)))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def _tokens(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 13, (count, 5), generator=generator)
    return tokens, tokens.roll(1, 1)


def _images(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (count,), generator=generator)


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _serial(
    build: Callable[[], nn.Module], data: tuple[Tensor, Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> Weights:
    """State after two steps of SGD."""
    torch.manual_seed(0)
    model = build().double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
    assert any(not torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _hybrid(
    layout: Layout,
    build: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    pieces: int,
) -> Weights:
    """This rank's owned state after two steps; every replica or shard takes a part of the samples."""
    world = Group.world()
    mesh = Mesh(layout, world.rank)
    torch.manual_seed(0)
    model = build().double()
    pipeline, samples = mesh.group("pipeline"), mesh.samples
    inputs, targets = (leaf.tensor_split(samples.size)[samples.rank] for leaf in data)
    part = take_part(split(model, inputs[:2], pipeline.size), model, pipeline.rank, pipeline.size)
    globalize_batch_norm(model, samples, BatchState())
    if layout.shard > 1:
        _shard_units(part, mesh)
    plain = [(name, p) for name, p in part.named_parameters() if not isinstance(p, DTensor)]
    sums = GradientSum(plain, samples)
    shared = SharedGradientSum(part, pipeline)
    runner = PipelineRunner(part, pipeline, schedule="1f1b", device=CPU, timeout_seconds=30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    parts = list(zip(inputs.tensor_split(pieces), targets.tensor_split(pieces), strict=True))
    parts = [(x, y) for x, y in parts if len(x)]
    for _ in range(2):
        optimizer.zero_grad()
        runner.step(
            [x for x, _ in parts],
            lambda output, index: loss(output, parts[index][1]) * len(parts[index][1]) / len(data[1]),
            on_last_backward=sums.expect,
        )
        sums.finish()
        shared.finish()
        optimizer.step()
    state = part.state_dict()
    return {name: _whole(tensor) for name, tensor in state.items()}


def _shard_units(part: PipelinePart, mesh: Mesh) -> None:
    """FSDP2 around the units this rank holds alone, summing gradients over the ranks as shardwise wants them."""
    for _, unit in part.units():
        sharded = fully_shard(unit, mesh=mesh.device_mesh("shard"))
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        whole: Tensor = tensor.full_tensor()
        return whole
    return tensor.clone()


def _check(serial: Weights, parts: list[Weights]) -> None:
    merged: Weights = {}
    for part in parts:
        for name, tensor in part.items():
            if name in merged:  # replicas
                torch.testing.assert_close(tensor, merged[name], rtol=1e-12, atol=0)
        merged |= part
    assert set(merged) == set(serial)
    torch.testing.assert_close(merged, serial, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Forked ranks find what tracing imports already imported."""
    split(Tied(), _tokens()[0], 2)


@pytest.mark.parametrize("pieces", [1, 3])
def test_data_and_pipeline(pieces: int, ranks: Callable[..., list[Any]]) -> None:
    serial = _serial(Tied, _tokens(), _token_loss)
    _check(serial, ranks(4, _hybrid, Layout(data=2, pipeline=2), Tied, _tokens(), _token_loss, pieces))


@pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module .* returned a view tensor"
)  # by FSDP2 alone, without `shard_model`
def test_shard_and_pipeline(ranks: Callable[..., list[Any]]) -> None:
    serial = _serial(Tied, _tokens(8), _token_loss)
    _check(serial, ranks(4, _hybrid, Layout(shard=2, pipeline=2), Tied, _tokens(8), _token_loss, 2))


def test_batch_norm_over_the_global_batch(ranks: Callable[..., list[Any]]) -> None:
    """One micro-batch: its statistics are those of the batch, over the replicas of a stage too."""
    serial = _serial(Normed, _images(), F.cross_entropy)
    _check(serial, ranks(2, _hybrid, Layout(pipeline=2), Normed, _images(), F.cross_entropy, 1))
    _check(serial, ranks(4, _hybrid, Layout(data=2, pipeline=2), Normed, _images(), F.cross_entropy, 1))


def test_recompute(ranks: Callable[..., list[Any]]) -> None:
    build = functools.partial(Tied, recompute=True)
    serial = _serial(Tied, _tokens(), _token_loss)
    _check(serial, ranks(2, _hybrid, Layout(pipeline=2), build, _tokens(), _token_loss, 3))


def _own_loss(schedule: str, dtype: torch.dtype | None) -> tuple[Weights, float]:
    """Gradients where the traced program is an objective: the model, its loss and an auxiliary term."""
    group = Group.world()
    torch.manual_seed(0)
    model = Tied().float()
    tokens, targets = _tokens()

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            output = model(batch[0])
            value: Tensor = _token_loss(output.float(), batch[1]) * batch[1].numel() + output.float().square().mean()
            return value

    parts = list(zip(tokens.split(3), targets.split(3), strict=True))
    total = 0.0

    def on_output(value: Tensor, _: int) -> Tensor:
        nonlocal total
        total += value.item()
        return value

    if group.size == 1:
        for batch in parts:
            on_output(objective(model, batch), 0).backward()
        return _gradients(model), total
    part = take_part(split(model, parts[0], group.size, forward=objective), model, group.rank, group.size)
    PipelineRunner(part, group, schedule=schedule, device=CPU).step(parts, on_output)
    SharedGradientSum(part, group).finish()
    return _gradients(model), total


def _gradients(model: nn.Module) -> Weights:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_objective_and_autocast(dtype: torch.dtype | None, ranks: Callable[..., list[Any]]) -> None:
    """Stages compute what the serial run computes, so even bfloat16 agrees far below its own rounding."""
    gradients, total = _own_loss("gpipe", dtype)
    parts = ranks(2, _own_loss, "gpipe", dtype)
    merged: Weights = {}
    for found, _ in parts:
        merged |= found
    torch.testing.assert_close(merged, gradients, rtol=1e-4, atol=1e-5)
    assert sum(value for _, value in parts) == pytest.approx(total, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler itself
def test_compiled_units() -> None:
    """Two stages on one rank, no messages; the units are captured by the compiler's front end."""
    captured: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        captured.append(len(graph.graph.nodes))
        forward: Callable[..., Any] = graph.forward
        return forward

    torch.manual_seed(0)
    model, reference = Tied(), Tied()
    reference.load_state_dict(model.state_dict())
    tokens, targets = _tokens()
    part = take_part(split(model, tokens, 2, ["blocks.2"]), model, 0, 1)
    part.compile(backend=backend)
    PipelineRunner(part, Group(), schedule="interleaved1f1b", device=CPU).step(
        [tokens] * 3, lambda output, _: _token_loss(output, targets)
    )
    assert len(captured) >= 3, "nothing was compiled"
    assert max(captured) > 10, "no whole block was compiled"
    for _ in range(3):
        _token_loss(reference(tokens), targets).backward()
    torch.testing.assert_close(_gradients(model), _gradients(reference))


def _dropout_masks() -> tuple[bool, float]:
    """Whether training runs differ from pass to pass (dropout is on), and the largest difference in evaluation."""
    group = Group.world()
    torch.manual_seed(0)
    model = Tied(dropout=0.5)
    reference = Tied(dropout=0.5)
    reference.load_state_dict(model.state_dict())
    tokens, _ = _tokens()
    part = take_part(split(model, tokens, group.size), model, group.rank, group.size)
    runner = PipelineRunner(part, group, schedule="1f1b", device=CPU)
    outputs: list[Tensor] = []
    runner.evaluate([tokens, tokens], lambda output, _: outputs.append(output))
    model.eval()
    reference.eval()
    distances: list[float] = []
    runner.evaluate([tokens], lambda output, _: distances.append(float((output - reference(tokens)).abs().max())))
    return bool(outputs) and not torch.equal(outputs[0], outputs[1]), max(distances, default=0.0)


def test_dropout_follows_the_mode_of_the_model(ranks: Callable[..., list[Any]]) -> None:
    differs, distance = ranks(2, _dropout_masks)[1]
    assert differs
    assert distance < 1e-6


def _silent_neighbour() -> str:
    group = Group.world()
    torch.manual_seed(0)
    model = Tied()
    tokens, _ = _tokens()
    part = take_part(split(model, tokens, group.size), model, group.rank, group.size)
    if group.rank == 0:
        time.sleep(1.5)  # busy with something else
        return ""
    runner = PipelineRunner(part, group, schedule="1f1b", device=CPU, timeout_seconds=0.5)
    try:
        runner.step([tokens], lambda output, _: output.sum())
    except RunFailed as error:
        return str(error)
    return "no error"


def test_a_neighbour_that_never_sends_is_named(ranks: Callable[..., list[Any]]) -> None:
    message = ranks(2, _silent_neighbour)[1]
    assert "the activations of micro-batch 0 did not get from stage 0 (rank 0) to stage 1 (rank 1)" in message


class TwoRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(5, 6), nn.LSTM(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x)[0])[0]
        return y


def test_what_other_ranks_hold_gives_its_memory_back() -> None:
    model = TwoRecurrent()
    x = torch.randn(3, 2, 5)
    watched = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    part = take_part(split(model, x, 2), model, 0, 2)
    gc.collect()
    alive = {name for name, reference in watched.items() if reference() is not None}
    assert alive == {name for name, _ in part.named_parameters()} == {n for n in watched if n.startswith("first")}
    assert [name for name, _ in model.named_parameters()] == list(watched)


def _held() -> tuple[list[str], int, list[str]]:
    group = Group.world()
    model = Tied()
    part = take_part(split(model, _tokens()[0], group.size), model, group.rank, group.size)
    held = [name for name, _ in part.named_parameters()]
    return held, sum(p.numel() for _, p in part.named_parameters()), sorted(part.state_dict())


def test_a_rank_holds_its_stages_alone(ranks: Callable[..., list[Any]]) -> None:
    (first, first_size, first_state), (last, last_size, last_state) = ranks(2, _held)
    assert set(first) & set(last) == {"tok.weight"}
    assert set(first_state) & set(last_state) == set()
    assert {"tok.weight", "head.weight"} <= set(first_state)
    assert set(first_state) | set(last_state) == set(Tied().state_dict())
    whole = sum(p.numel() for p in Tied().parameters())
    assert first_size + last_size == whole + 13 * 8
