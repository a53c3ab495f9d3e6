"""Tensor parallelism equals the serial run: every gradient and two optimizer steps, in float64 up to rounding.

Models are the user's: nothing in them knows that they are split. Shapes: N samples, T positions, D features, V entries of
a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.jobs.charlm import CharGPT, bits_per_character, next_character_loss
from shardwise.parallel.clip import clip_by_global_norm
from shardwise.parallel.data import GradientSum
from shardwise.parallel.shard import shard_model
from shardwise.parallel.tensor.apply import apply_split
from shardwise.parallel.tensor.find import find_split
from shardwise.spec.layout import Layout

Ranks = Callable[..., list[Any]]
State = dict[str, Tensor]


class Gated(nn.Module):
    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(F.silu(self.gate(x)) * self.up(x)))


class FusedGated(nn.Module):
    """One layer makes gate and value; they are its halves."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, dim=-1)
        return torch.as_tensor(self.down(F.gelu(gate) * value))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GroupedAttention(nn.Module):
    """Rotary positions, a norm of the heads' queries, fewer heads for keys than for queries, sizes written out."""

    def __init__(self, width: int = 16, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, self.each = heads, shared, width // heads
        self.query = nn.Linear(width, heads * self.each, bias=False)
        self.key = nn.Linear(width, shared * self.each, bias=False)
        self.value = nn.Linear(width, shared * self.each, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = RMSNorm(self.each)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        query = self.norm(self.query(x).view(n, t, self.heads, self.each)).transpose(1, 2)
        key = self.key(x).view(n, t, self.shared, self.each).transpose(1, 2)
        value = self.value(x).view(n, t, self.shared, self.each).transpose(1, 2)
        angle = torch.arange(t, dtype=x.dtype)[:, None] * torch.arange(1, self.each // 2 + 1)[None]
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        query, key = (y * cos + self._turned(y) * sin for y in (query, key))
        key = key[:, :, None].expand(n, self.shared, self.heads // self.shared, t, self.each)
        key = key.reshape(n, self.heads, t, self.each)
        value = value.repeat_interleave(self.heads // self.shared, dim=1)
        scores = (query @ key.transpose(-2, -1)) / self.each**0.5
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(n, t, -1)
        return torch.as_tensor(self.out(mixed))

    def _turned(self, x: Tensor) -> Tensor:
        return torch.cat((-x[..., self.each // 2 :], x[..., : self.each // 2]), -1)


class Llama(nn.Module):
    def __init__(self, vocabulary: int = 19, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.attentions = nn.ModuleList(GroupedAttention(width) for _ in range(layers))
        self.networks = nn.ModuleList(Gated(width) for _ in range(layers))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, (attention, network) in enumerate(zip(self.attentions, self.networks, strict=True)):
            x = x + attention(self.norms[2 * index](x))
            x = x + network(self.norms[2 * index + 1](x))
        return torch.as_tensor(self.head(self.norms[-1](x)))


class Attention(nn.Module):
    """Queries from one sequence, keys and values from another."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return torch.as_tensor(y.unflatten(-1, (self.heads, -1)).movedim(-2, 1))

        mixed = F.scaled_dot_product_attention(heads(self.query(x)), heads(self.key(memory)), heads(self.value(memory)))
        return torch.as_tensor(self.out(mixed.movedim(1, -2).flatten(-2)))


class EncoderDecoder(nn.Module):
    def __init__(self, vocabulary: int = 17, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder, self.decoder, self.cross = Attention(width), Attention(width), Attention(width)
        self.encoder_mlp, self.decoder_mlp = FusedGated(width), Gated(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.embedding(source)
        memory = memory + self.encoder(memory, memory)
        memory = self.norm(memory + self.encoder_mlp(memory))
        x = self.embedding(target)
        x = x + self.decoder(x, x)
        x = x + self.cross(self.norm(x), memory)
        x = x + self.decoder_mlp(self.norm(x))
        return F.linear(x, self.embedding.weight)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.second(F.relu(self.first(x)))
        return torch.as_tensor(self.head(x.mean((2, 3))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 6, batch_first=True)
        self.up, self.down = nn.Linear(6, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(torch.tanh(self.up(self.lstm(x)[0][:, -1]))))


class Masked(nn.Module):
    """torch's own transformer, with a causal and a padding mask."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, width)
        self.transformer = nn.Transformer(width, 4, 1, 1, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 17)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
        padding = torch.arange(8)[None] > torch.tensor([[3], [7]]).repeat(source.shape[0] // 2, 1)
        mixed = self.transformer(
            self.embedding(source), self.embedding(target), tgt_mask=causal, src_key_padding_mask=padding
        )
        return torch.as_tensor(self.head(mixed))


class Transposed(nn.Module):
    """A projection whose weight has its inputs first, as in GPT-2; recomputed in the backward pass."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(width, 3 * width)), nn.Parameter(torch.randn(3 * width))
        self.down, self.down_bias = nn.Parameter(torch.randn(3 * width, width)), nn.Parameter(torch.randn(width))
        self.scale = nn.Parameter(torch.rand(3 * width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(checkpoint(self.body, x, use_reentrant=False))

    def body(self, x: Tensor) -> Tensor:
        x = x + 0
        x *= 0.5
        hidden = F.gelu(torch.addmm(self.up_bias, x, self.up)) * self.scale
        hidden += 1.0
        return torch.as_tensor(hidden @ self.down + self.down_bias)


@dataclass(frozen=True)
class Case:
    """A model, samples `(inputs, targets)`, and the names of parameters that must be split on two ranks."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    targets: Callable[[], Tensor]
    split: tuple[str, ...]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


def _values(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)


def _tokens(
    count: int = 1, vocabulary: int = 17, samples: int = 6, length: int = 8
) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(2)
        return tuple(torch.randint(0, vocabulary, (samples, length), generator=generator) for _ in range(count))

    return make


def _classes() -> Tensor:
    return torch.tensor([0, 1, 2, 2, 1, 0])


def _regression(output: Tensor, target: Tensor) -> Tensor:
    return (output.sum(-1) - target).square().mean()


def _shifted() -> Tensor:
    return torch.roll(_tokens()()[0], -1, 1)


def _ignoring(scores_NTV: Tensor, target_NT: Tensor) -> Tensor:
    target_NT = target_NT.clone()
    target_NT[::2, 3:] = -100
    return F.cross_entropy(scores_NTV.transpose(1, 2), target_NT, label_smoothing=0.1)


CASES = {
    "mlp_7x15x3": Case(
        lambda: nn.Sequential(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 3)),
        _values(6, 7),
        _classes,
        ("0.weight", "0.bias", "2.weight"),
    ),
    "mlp_8x16x4": Case(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), _values(6, 8), _classes, ("0.weight",)
    ),
    "gated": Case(Gated, _values(6, 8), lambda: torch.ones(6), ("gate.weight", "up.bias", "down.weight"), _regression),
    "fused_gated": Case(FusedGated, _values(6, 8), lambda: torch.ones(6), ("both.weight", "down.weight"), _regression),
    "gpt_fused_qkv_tied": Case(
        lambda: CharGPT(17, 8, 16, 2, 4),
        _tokens(),
        _shifted,
        ("characters.weight", "blocks.1.attention.qkv.weight", "blocks.0.attention.qkv.bias", "blocks.0.out.weight"),
        next_character_loss,
    ),
    "llama_grouped": Case(Llama, _tokens(), _shifted, ("head.weight", "networks.1.down.weight"), next_character_loss),
    "encoder_decoder": Case(
        EncoderDecoder,
        _tokens(2),
        _shifted,
        ("embedding.weight", "cross.key.weight", "encoder.out.weight", "encoder_mlp.both.weight"),
        _ignoring,
    ),
    "torch_transformer": Case(
        Masked,
        _tokens(2),
        _shifted,
        (
            "transformer.encoder.layers.0.self_attn.in_proj_weight",
            "transformer.encoder.layers.0.self_attn.in_proj_bias",
        ),
        next_character_loss,
    ),
    "weights_used_directly": Case(
        Transposed, _values(6, 8), lambda: torch.ones(6), ("up", "up_bias", "scale", "down"), _regression
    ),
    "residual_batch_norm": Case(Residual, _values(6, 3, 5, 5), _classes, ("head.0.weight", "first.weight")),
    "lstm_with_head": Case(Recurrent, _values(6, 4, 7), _classes, ("up.weight", "down.weight")),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model().double()


def objective(case: Case, model: nn.Module) -> Tensor:
    return case.loss(model(*case.inputs()), case.targets())


def split(case: Case, model: nn.Module, mesh: Mesh) -> None:
    plan = find_split(model, lambda m: objective(case, m), mesh.layout.tensor)
    apply_split(model, plan, mesh.group("tensor"), mesh.device_mesh("tensor"))


def steps(
    model: nn.Module, backward: Callable[[], None], optimizer: str, clip: float | None = None
) -> tuple[State, State]:
    """Gradients of the first step (before clipping) and weights and buffers after two."""
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    gradients: State = {}
    for step in range(2):
        made.zero_grad()
        backward()
        if not step:
            gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            gradients["norm"] = torch.stack([g.norm() for g in gradients.values()]).norm()
        if clip is not None:
            norm = clip_by_global_norm(model.parameters(), clip)
            if not step:
                torch.testing.assert_close(norm, gradients["norm"], rtol=1e-12, atol=0)
        made.step()
    return gradients, {name: whole(t) for name, t in model.state_dict().items()}


def serial(name: str, optimizer: str, clip: float | None = None) -> tuple[State, State]:
    model = build(CASES[name])
    return steps(model, lambda: objective(CASES[name], model).backward(), optimizer, clip)


def tensor_parallel(name: str, optimizer: str, clip: float | None = None) -> tuple[State, State, list[str]]:
    world, case = Group.world(), CASES[name]
    mesh = Mesh(Layout(tensor=world.size), world.rank)
    model = build(case)
    split(case, model, mesh)
    gradients, state = steps(model, lambda: objective(case, model).backward(), optimizer, clip)
    return gradients, state, [key for key, p in model.named_parameters() if isinstance(p, DTensor)]


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        distance = (found[name] - tensor).abs().max()
        assert distance <= 1e-10 * tensor.abs().max() + 1e-12, f"{name} is off by {float(distance):.3g}"


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(("size", "optimizer", "clip"), [(2, "sgd", None), (4, "adamw", 0.05)])
def test_split_equals_serial(name: str, size: int, optimizer: str, clip: float | None, ranks: Ranks) -> None:
    gradients, state = serial(name, optimizer, clip)
    start = build(CASES[name]).state_dict()
    assert any(not torch.equal(start[key], state[key]) for key in start), "nothing was trained"
    answers = ranks(size, tensor_parallel, name, optimizer, clip)
    for found_gradients, found_state, split_names in answers:
        assert split_names, "nothing was split"
        assert size > 2 or set(CASES[name].split) <= set(split_names)
        assert_same(found_gradients, gradients)
        assert_same(found_state, state)
    for key, tensor in answers[0][0].items():
        assert all(torch.equal(other[0][key], tensor) for other in answers[1:]), (
            f"ranks disagree on the gradient of {key}"
        )


def data_and_tensor(name: str, clip: float | None) -> tuple[State, State]:
    """Two replicas of a model that is split over two ranks; the samples are shared out unevenly, 4 and 2."""
    world, case = Group.world(), CASES[name]
    mesh = Mesh(Layout(data=2, tensor=2), world.rank)
    model = build(case)
    split(case, model, mesh)
    mine = slice(0, 4) if mesh.coordinate("data") == 0 else slice(4, 6)
    inputs, targets = tuple(value[mine] for value in case.inputs()), case.targets()[mine]
    # Small buckets, so that some are sent while the backward pass runs.
    gradients = GradientSum(model.named_parameters(), mesh.samples, bucket_bytes=2000)

    def backward() -> None:
        gradients.expect()
        (case.loss(model(*inputs), targets) * (len(targets) / 6)).backward()
        gradients.finish()

    return steps(model, backward, "adamw", clip)


@pytest.mark.parametrize("name", ["mlp_7x15x3", "gpt_fused_qkv_tied", "llama_grouped"])
def test_data_and_tensor_equal_serial(name: str, ranks: Ranks) -> None:
    gradients, state = serial(name, "adamw", 0.05)
    for found_gradients, found_state in ranks(4, data_and_tensor, name, 0.05):
        assert_same(found_gradients, gradients)
        assert_same(found_state, state)


def shard_and_tensor(name: str, clip: float | None) -> tuple[State, State]:
    """FSDP2 shards what the tensor axis has split already; the samples are shared out unevenly, 4 and 2."""
    world, case = Group.world(), CASES[name]
    mesh = Mesh(Layout(shard=2, tensor=2), world.rank)
    model = build(case)
    plan = find_split(model, lambda m: objective(case, m), 2)
    apply_split(model, plan, mesh.group("tensor"), mesh.device_mesh("tensor"), sharded_next=True)
    sharded = shard_model(model, mesh, no_units=plan.inside)
    mine = slice(0, 4) if mesh.coordinate("shard") == 0 else slice(4, 6)
    inputs, targets = tuple(value[mine] for value in case.inputs()), case.targets()[mine]
    gradients = GradientSum(model.named_parameters(), mesh.group("data"), sharded=sharded)

    def backward() -> None:
        gradients.expect()
        (case.loss(model(*inputs), targets) * (len(targets) / 6)).backward()
        gradients.finish()

    return steps(model, backward, "adamw", clip)


@pytest.mark.parametrize("name", ["mlp_8x16x4", "gpt_fused_qkv_tied", "llama_grouped", "fused_gated"])
def test_shard_and_tensor_equal_serial(name: str, ranks: Ranks) -> None:
    gradients, state = serial(name, "adamw", 0.05)
    for found_gradients, found_state in ranks(4, shard_and_tensor, name, 0.05):
        assert_same(found_gradients, gradients)
        assert_same(found_state, state)


def measured(size: int) -> list[Tensor]:
    """What evaluation does with a model's output: metrics of many kinds, without gradients."""
    case = CASES["gpt_fused_qkv_tied"]
    model = build(case)
    if size > 1:
        split(case, model, Mesh(Layout(tensor=size), Group.world().rank))
    model.eval()
    with torch.no_grad():
        scores, target = model(*case.inputs()), case.targets()
        bits, count = bits_per_character(scores, target)
        top = scores.topk(3, dim=-1).indices
        return [
            bits,
            count,
            (scores.argmax(-1) == target).double().mean(),
            (top == target.unsqueeze(-1)).any(-1).double().mean(),
            scores.softmax(-1).max(),
            torch.as_tensor(scores[0, 0].tolist()),
            F.nll_loss(F.log_softmax(scores, -1).flatten(0, 1), target.flatten()),
        ]


def test_metrics_see_whole_outputs(ranks: Ranks) -> None:
    expected = measured(1)
    for found in ranks(2, measured, 2):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_an_output_in_pieces_can_be_used_as_any_tensor(ranks: Ranks) -> None:
    """The seven metrics above depend on it; here the values themselves."""
    case = CASES["gpt_fused_qkv_tied"]
    with torch.no_grad():
        expected = build(case)(*case.inputs())
    for found in ranks(2, outputs):
        torch.testing.assert_close(found, expected.numpy().tolist(), rtol=1e-12, atol=1e-12)


def outputs() -> Any:
    case = CASES["gpt_fused_qkv_tied"]
    model = build(case)
    split(case, model, Mesh(Layout(tensor=2), Group.world().rank))
    with torch.no_grad():
        return model(*case.inputs()).cpu().numpy().tolist()
