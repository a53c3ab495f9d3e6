"""A pipelined step equals the serial step, in float64 to rounding, for models of every shape of dataflow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.dist.collectives import Group
from shardwise.dist.p2p import start_receive
from shardwise.parallel.data import GradientSum
from shardwise.parallel.pipeline.part import call_model, split, take_part
from shardwise.parallel.pipeline.runner import PipelineRunner
from shardwise.parallel.pipeline.shared import SharedGradientSum
from shardwise.spec.schedule import placement_of, stages_for

STEPS = 2


class Residual(nn.Module):
    """Convolutions with in-place sums and activations, and values that skip a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))
            for _ in range(4)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            out = block(x)
            out += x
            x = F.relu(out, inplace=True)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class InPlaceStream(nn.Module):
    """One tensor that every block changes in place, on whatever stage it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 15)
        self.blocks = nn.ModuleList(nn.Linear(15, 15) for _ in range(5))
        self.last = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        gathered = torch.zeros(x.shape[0], 15, dtype=x.dtype)
        for index, block in enumerate(self.blocks):
            stream += torch.tanh(block(stream.clone()))
            gathered[:, index] = stream.mean(1)
        y: Tensor = self.last(stream + gathered)
        return y


class UNet(nn.Module):
    """Three skip connections, each over all cuts between its ends."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 4, 6, 8]
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(2 * b, a, 3, padding=1) for a, b in reversed(pairs))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = F.gelu(layer(x))
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for layer in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = layer(torch.cat([x, skips.pop()], 1))
        return x.mean((2, 3))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + self.proj(attended)
        y: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))
        return y


class GPT(nn.Module):
    """Embedding tied to the head, and with `three` to a second input embedding in the middle of the model."""

    def __init__(self, *, three: bool = False) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(13, 8), nn.Embedding(6, 8)
        self.h = nn.ModuleList(Block(8, 2) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.tok.weight
        self.again = nn.Embedding(13, 8)
        if three:
            self.again.weight = self.tok.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        assert tokens_BT.shape[1] <= 6
        x_BTD = self.tok(tokens_BT) + self.pos(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for index, block in enumerate(self.h):
            if index == 2:
                x_BTD = x_BTD + self.again(tokens_BT)
            # one of them is called by its forward function
            x_BTD = block.forward(x_BTD) if index == 1 else block(x_BTD)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV


class Functional(nn.Module):
    """Parameters used by functions, a buffer, a tied weight without a module, a parameter that nothing uses, and a branch
    on the values of the inputs."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(13, 8))
        self.start = nn.Parameter(torch.randn(8))
        self.never = nn.Parameter(torch.randn(4))
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = F.embedding(tokens_BT, self.table) + self.start.expand(*tokens_BT.shape, -1)
        weights_BTT = self.mask * (tokens_BT != 0).to(x_BTD.dtype).unsqueeze(1)
        if tokens_BT.shape[0] == 1 and tokens_BT[0, 0].item() % 2:
            weights_BTT = weights_BTT * 1.0
        for layer in self.layers:
            x_BTD = x_BTD + torch.tanh(layer(weights_BTT @ x_BTD))
        return x_BTD @ self.table.t()


class Translator(nn.Module):
    """Encoder and decoder: every layer of the decoder looks at the encoder's output. Dict inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(13, 8), nn.Embedding(13, 8)
        encoder_layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        decoder_layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder_layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder_layer, 3)
        self.head = nn.Linear(8, 13)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        memory = self.encoder(self.source(source))
        length = target.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf"), dtype=memory.dtype), 1)
        return {"logits": self.head(self.decoder(self.target(target), memory, tgt_mask=mask)), "memory": memory}


class Recurrent(nn.Module):
    """Outputs in tuples, activations that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(5, 7, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(14, 6)
        self.third = nn.GRU(6, 6)
        self.head = nn.Linear(12, 3)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD, (hidden, _) = self.first(x_BTD)
        x_TBD, _ = self.second(x_BTD.transpose(0, 1))
        x_TBD, _ = self.third(x_TBD)
        y: Tensor = self.head(torch.cat([x_TBD[-1], hidden.transpose(0, 1)[:, 0, :6]], 1))
        return y


class Pair(nn.Module):
    """Tuple inputs, a frozen layer, a layer used twice, an integer activation, an output of the first stage, and an
    output that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(7, 15), nn.Linear(4, 15)
        self.right.requires_grad_(False)
        self.twice = nn.Linear(15, 15)
        self.aside = nn.Linear(15, 2)
        self.codes = nn.Embedding(15, 15)
        self.middle = nn.ModuleList(nn.Linear(15, 15) for _ in range(2))
        self.head = nn.Linear(15, 3)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.left(left)
        unused = self.aside(first)
        code = first.argmax(1)
        x = self.twice(torch.tanh(first + self.right(right)))
        for layer in self.middle:
            x = torch.tanh(layer(x))
        x = self.twice(x) + self.codes(code)
        return self.head(x), first, unused


class Mixture(nn.Module):
    """Each token goes to the expert its router picks: the shapes inside depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 15), nn.GELU(), nn.Linear(15, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            picked = (choice == index).nonzero(as_tuple=True)
            if len(picked[0]):
                out[picked] = expert(x[picked]) * weight[picked].unsqueeze(-1)
        return x + out


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Mixtures(nn.Module):
    """Layers of experts, and an answer in a data class."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(13, 8)
        self.layers = nn.ModuleList(Mixture() for _ in range(3))
        self.head = nn.Linear(8, 13)

    def forward(self, tokens: Tensor) -> Answer:
        x = self.tok(tokens)
        for layer in self.layers:
            x = layer(x)
        return Answer(self.head(x), x)


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(5, 6), nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.first(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        y: Tensor = self.head(self.lstm(packed)[1][0][-1])
        return y


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.tanh(x) * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 0.5  # not the true derivative, so that its use shows


class Custom(nn.Module):
    """autograd functions between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = Scaled.apply(layer(x))  # type: ignore[no-untyped-call]
        return x


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, int], Any]
    targets: Callable[[torch.Generator, int], Tensor]
    loss: Callable[[Any, Tensor], Tensor]


def _images(generator: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)


def _big_images(generator: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def _rows(generator: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, 7, generator=generator, dtype=torch.float64)


def _sequences(generator: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, 4, 5, generator=generator, dtype=torch.float64)


def _tokens(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(0, 13, (count, 6), generator=generator)


def _classes(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(0, 3, (count,), generator=generator)


def _translation(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    return {"target": _tokens(generator, count), "source": _tokens(generator, count)[:, :5]}


def _pair(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    return _rows(generator, count), _rows(generator, count)[:, :4]


def _lengths(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    return _sequences(generator, count), torch.randint(1, 5, (count,), generator=generator)


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _pair_loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output[0], target) + output[1].square().mean()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 15), nn.Tanh(), nn.Linear(15, 15), nn.Linear(15, 3))


CASES = {
    "mlp": Case(_mlp, _rows, _classes, F.cross_entropy),
    "residual": Case(Residual, _images, _classes, F.cross_entropy),
    "in_place": Case(InPlaceStream, _rows, _classes, F.cross_entropy),
    "unet": Case(UNet, _big_images, _classes, F.cross_entropy),
    "gpt_tied": Case(GPT, _tokens, _tokens, _token_loss),
    "gpt_tied_three": Case(lambda: GPT(three=True), _tokens, _tokens, _token_loss),
    "functional": Case(Functional, _tokens, _tokens, _token_loss),
    "translator": Case(Translator, _translation, _tokens, lambda out, target: _token_loss(out["logits"], target)),
    "recurrent": Case(Recurrent, _sequences, _classes, F.cross_entropy),
    "mixtures": Case(Mixtures, _tokens, _tokens, lambda out, target: _token_loss(out.logits, target)),
    "packed": Case(Packed, _lengths, _classes, F.cross_entropy),
    "custom": Case(Custom, _rows, _classes, F.cross_entropy),
    "pair": Case(Pair, _pair, _classes, _pair_loss),
}

Weights = dict[str, Tensor]
Result = tuple[Weights, Weights, list[float], float]
"""Gradients of the first step, final state, loss of every step, loss of the evaluation."""


def _build(case: str) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = CASES[case].model().double()
    generator = torch.Generator().manual_seed(1)
    return model, CASES[case].inputs(generator, 7), CASES[case].targets(generator, 7)


def _serial(case: str) -> Result:
    model, inputs, targets = _build(case)
    loss_function = CASES[case].loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    losses: list[float] = []
    gradients: Weights = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_function(call_model(model, inputs), targets)
        loss.backward()
        gradients = gradients or _gradients(model.named_parameters())
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        after = loss_function(call_model(model, inputs), targets)
    return gradients, _copies(model.state_dict()), losses, after.item()


def _parallel(case: str, schedule: str, sizes: list[int], fault: str = "") -> Result:
    """One rank's part of the same; the samples of a batch in micro-batches of the given sizes."""
    group = Group.world()
    model, inputs, targets = _build(case)
    loss_function = CASES[case].loss
    cut = split(model, _rows_of(inputs, 0, 2), stages_for(schedule, group.size))
    part = take_part(cut, model, group.rank, group.size, placement_of(schedule, group.size, cut.stages))
    runner = PipelineRunner(part, group, schedule=schedule, device=torch.device("cpu"), timeout_seconds=30)
    shared = SharedGradientSum(part, group)
    sums = GradientSum(part.named_parameters(), Group(), bucket_bytes=200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    edges = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    parts = [_rows_of(inputs, start, stop) for start, stop in itertools.pairwise(edges)]
    part_targets = [targets[start:stop] for start, stop in itertools.pairwise(edges)]
    losses: list[float] = []
    gradients: Weights = {}

    def objective(output: Any, index: int) -> Tensor:
        share = len(part_targets[index]) / len(targets)
        if fault == "dropped" and index == 1:
            share = 0.0
        value = loss_function(output, part_targets[index]) * share
        losses[-1] += value.item()
        return value

    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(0.0)
        runner.step(parts, objective, on_last_backward=sums.expect)
        sums.finish()
        if fault != "untied":
            shared.finish()
        gradients = gradients or _gradients(part.named_parameters())
        optimizer.step()
    assert runner._halves is None or any(runner._halves._sound.values()), "no backward pass was halved"
    model.eval()
    after = [0.0]

    def on_output(output: Any, _: int) -> None:
        after[0] += loss_function(output, targets).item()

    runner.evaluate([inputs], on_output)
    return gradients, _copies(part.state_dict()), losses, after[0]


def _rows_of(tree: Any, start: int, stop: int) -> Any:
    if isinstance(tree, tuple):
        return tuple(leaf[start:stop] for leaf in tree)
    if isinstance(tree, dict):
        return {key: leaf[start:stop] for key, leaf in tree.items()}
    return tree[start:stop]


def _gradients(parameters: Any) -> Weights:
    return {name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None}


def _copies(state: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in state.items()}


def _compare(serial: Result, parts: list[Result]) -> None:
    start_gradients, state, losses, after = serial
    merged: Weights = {}
    for _, owned, _, _ in parts:
        assert not set(merged) & set(owned), "a tensor is saved by two stages"
        merged |= owned
    assert set(merged) == set(state), "the stages together do not have the model's state"
    gradients: Weights = {}
    for found, *_ in parts:
        for name, gradient in found.items():
            if name in gradients:
                assert torch.equal(gradients[name], gradient), f"copies of {name} have different gradients"
        gradients |= found
    assert set(gradients) == set(start_gradients), "other parameters have gradients"
    torch.testing.assert_close(gradients, start_gradients, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged, state, rtol=1e-9, atol=1e-12)
    summed = [sum(values) for values in zip(*(result[2] for result in parts), strict=True)]
    torch.testing.assert_close(summed, losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(result[3] for result in parts), after, rtol=1e-10, atol=1e-12)


SETTINGS = [
    *((case, "1f1b", 2, [3, 3, 1]) for case in CASES),
    *((case, "1f1b", 4, [6, 1]) for case in CASES if case not in ("mixtures", "packed")),
    *((case, "gpipe", 2, [7]) for case in ("mlp", "gpt_tied", "unet")),
    *((case, "gpipe", 2, [2, 2, 2, 1]) for case in ("mlp", "gpt_tied", "unet")),
    *((case, "zbv", 2, [2, 1, 1, 1, 2]) for case in ("mlp", "gpt_tied_three", "unet", "pair")),
    *((case, "dualpipev", 2, [2, 1, 1, 1, 2]) for case in ("mlp", "gpt_tied", "in_place")),
    *((case, "interleaved1f1b", 2, [3, 1, 3]) for case in ("mlp", "gpt_tied_three", "unet", "pair", "in_place")),
]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Forked ranks find what tracing imports already imported."""
    split(_mlp(), torch.zeros(1, 7), 2)


@pytest.mark.parametrize(("case", "schedule", "size", "sizes"), SETTINGS, ids=lambda value: str(value).replace(" ", ""))
def test_pipeline_equals_serial(
    case: str, schedule: str, size: int, sizes: list[int], ranks: Callable[..., list[Any]]
) -> None:
    serial = _serial(case)
    start = _build(case)[0].state_dict()
    assert any(not torch.equal(start[name], serial[1][name]) for name in start), "nothing was trained"
    _compare(serial, ranks(size, _parallel, case, schedule, sizes))


@pytest.mark.parametrize(("case", "fault"), [("gpt_tied", "untied"), ("mlp", "dropped")])
def test_a_planted_fault_is_seen(case: str, fault: str, ranks: Callable[..., list[Any]]) -> None:
    parts = ranks(2, _parallel, case, "1f1b", [3, 3, 1], fault)
    with pytest.raises(AssertionError):
        _compare(_serial(case), parts)


def _events(case: str) -> list[str]:
    """What the last rank of two does in a step of four micro-batches: passes, and receives that it begins."""
    group = Group.world()
    model, inputs, targets = _build(case)
    cut = split(model, _rows_of(inputs, 0, 2), 2)
    part = take_part(cut, model, group.rank, group.size)
    runner = PipelineRunner(part, group, schedule="1f1b", device=torch.device("cpu"), timeout_seconds=30)
    found: list[str] = []

    def begin_receive(tensor: Tensor, among: Group, peer: int) -> Any:
        found.append("ask")
        return start_receive(tensor, among, peer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardwise.parallel.pipeline.runner.start_receive", begin_receive)
        runner.step(
            [_rows_of(inputs, index, index + 1) for index in range(4)],
            lambda output, index: CASES[case].loss(output, targets[index : index + 1]),
            on_micro_batch=lambda index: found.append(f"pass {index}"),
        )
    return found


def test_the_next_message_is_asked_for_when_one_is_taken(ranks: Callable[..., list[Any]]) -> None:
    # over gloo a message starts when it is asked for: it is to travel while this rank computes
    first, last = ranks(2, _events, "mlp")
    ahead = ["ask", "pass 0", "ask", "pass 0", "pass 1", "ask", "pass 1", "pass 2", "ask", "pass 2", "pass 3", "pass 3"]
    assert last == ahead
    # the first rank asks for the first gradient before its first pass
    assert first[0] == "ask" and first.count("ask") == 4


def _order(case: str) -> tuple[list[str], list[str]]:
    """What the first rank of two computes in a step of four micro-batches of `zerobubble`, and what its table says."""
    group = Group.world()
    model, inputs, targets = _build(case)
    cut = split(model, _rows_of(inputs, 0, 2), 2)
    part = take_part(cut, model, group.rank, group.size)
    runner = PipelineRunner(part, group, schedule="zerobubble", device=torch.device("cpu"), timeout_seconds=30)
    found: list[str] = []
    whole, ahead = torch.autograd.backward, part.around

    def backward(*arguments: Any) -> None:
        found.append("W")
        whole(*arguments)

    def around(*arguments: Any) -> Any:
        found.append("F")
        return ahead(*arguments)

    part.around = around
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", backward)
        runner.step(
            [_rows_of(inputs, index, index + 1) for index in range(4)],
            lambda output, index: CASES[case].loss(output, targets[index : index + 1]),
        )
    return found, [action.kind for action in runner.table(4).rows[group.rank] if action.kind in "FW"]


def test_the_first_stage_goes_back_when_nothing_else_is_to_be_done(ranks: Callable[..., list[Any]]) -> None:
    # nobody waits for its gradients, so its passes back are done at the table's W, behind forward passes that others wait for
    found, wanted = ranks(2, _order, "mlp")[0]
    assert found == wanted
    assert sorted(found) == ["F"] * 4 + ["W"] * 4
