"""Steps under context parallelism equal the serial steps, in float64 to rounding; what cannot be split is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.errors import JobError, PlanError
from shardwise.jobs.charlm import CharGPT
from shardwise.parallel.context.attention import WholeSequence
from shardwise.parallel.context.check import Objective, _prepared, check_context
from shardwise.parallel.context.part import Part
from shardwise.parallel.context.split import ContextSplit
from shardwise.parallel.data import GradientSum
from shardwise.spec.layout import Layout
from shardwise.spec.shares import share_bounds

Ranks = Callable[..., list[Any]]
Result = tuple[list[float], dict[str, Tensor], dict[str, Tensor], Tensor]
VOCABULARY, LENGTH = 11, 15


class Rope(nn.Module):
    """Grouped heads, rotary positions from a table, causal; position of a table is a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.q, self.kv, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, VOCABULARY)
        angles = torch.outer(torch.arange(40.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        n, t, _ = x.shape
        q = self.turn(self.q(x).view(n, t, 4, 4).transpose(1, 2))
        k, v = self.kv(x).view(n, t, 2, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, self.turn(k), v, is_causal=True, scale=0.4, enable_gqa=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Encoder(nn.Module):
    """Torch's own layers, not causal, with a mask of padded tokens; positions are a slice of a parameter."""

    def __init__(self, *, causal: bool = False, recompute: bool = False) -> None:
        super().__init__()
        self.causal, self.recompute = causal, recompute
        self.embed = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.place = nn.Parameter(torch.randn(1, 30, 8) / 2)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place[:, : tokens.shape[1]]
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64)
        for layer in self.layers:
            padded = None if self.causal else tokens == 0
            if self.recompute:
                x = checkpoint(layer, x, mask, padded, use_reentrant=False)
            else:
                x = layer(x, mask, padded)
        out: Tensor = self.head(x)
        return out


class Translator(nn.Module):
    """Encoder and decoder with cross attention, two inputs of one length; flattened samples and tokens in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.place = nn.Embedding(LENGTH, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.mix = nn.Linear(8, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        places = self.place(torch.arange(0, source.size(1)))
        memory, x = self.embed(source) + places, self.embed(target) + places
        x = x + self.attend(x, x, causal=True)
        x = x + self.attend(x, memory, causal=False)
        out: Tensor = self.mix(x.reshape(-1, 8).tanh())
        return out.view(*source.shape, VOCABULARY)

    def attend(self, x: Tensor, memory: Tensor, *, causal: bool) -> Tensor:
        q, k, v = self.q(x)[:, None], self.k(memory)[:, None], self.v(memory)[:, None]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if causal else None
        return F.scaled_dot_product_attention(q, k, v, mask)[:, 0]


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)


def counted(target: Tensor) -> Tensor:
    return (target != -100).sum()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "charlm": lambda: CharGPT(VOCABULARY, LENGTH, 12, 2, 3),
    "rope": Rope,
    "encoder": Encoder,
    "causal_encoder": lambda: Encoder(causal=True),
    "recompute": lambda: Encoder(recompute=True),
    "translator": Translator,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def data(name: str, batch: int, seed: int) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (batch, LENGTH), generator=generator)
    targets = torch.randint(0, VOCABULARY, (batch, LENGTH), generator=generator)
    if name in ("encoder", "recompute"):
        for row in range(batch):  # padding at the end, another length each
            tokens[row, LENGTH - 2 * row - 1 :] = 0
            targets[row, LENGTH - 2 * row - 1 :] = -100
    if name == "translator":
        return (tokens, tokens.roll(3, 1)), targets
    return tokens, targets


def rows_of(tree: Any, rows: slice) -> Any:
    return tuple(leaf[rows] for leaf in tree) if isinstance(tree, tuple) else tree[rows]


def call(model: nn.Module, inputs: Any) -> Tensor:
    out: Tensor = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return out


def train(name: str, layout: str, batch: int = 3, fault: str = "") -> Result:
    """Losses, gradients of the first step, weights after two, and the whole output then."""
    mesh = Mesh(Layout.parse(layout), Group.world().rank)
    model = build(name)
    weighs = name in ("encoder", "recompute")
    context = None
    if mesh.layout.context > 1:
        example = data(name, batch, 0)
        objective = Objective(loss=token_loss, weight=counted if weighs else None)
        checked = check_context(model, mesh.layout.context, *example, objective)
        context = ContextSplit(mesh.group("context"), checked)
        context.wire(model)
    axes = ("data",) if fault == "no sum over context" else ("data", "context")
    gradients = GradientSum(model.named_parameters(), mesh.group(*axes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    first: dict[str, Tensor] = {}
    losses = []
    for step in range(2):
        inputs, targets = data(name, batch, step)
        total = float(counted(targets)) if weighs else float(batch)
        start, stop = share_bounds(batch, mesh.samples.size)[mesh.samples.rank]
        inputs, targets = rows_of(inputs, slice(start, stop)), targets[start:stop]
        weight = float(stop - start)
        if context is not None:
            inputs, targets = context.local(inputs, targets)
            weight *= 1 / mesh.layout.context if fault == "even shares" else context.share
        if weighs:
            weight = float(counted(targets))
        optimizer.zero_grad()
        gradients.expect()
        loss = token_loss(call(model, inputs), targets) * (weight / total) if weight else call(model, inputs).sum() * 0
        loss.backward()
        gradients.finish()
        first = first or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(mesh.group("data", "context").sum_(loss.detach().clone())))
    model.eval()
    inputs, targets = data(name, batch, 9)
    with torch.no_grad():
        if context is not None:
            inputs, _ = context.local(inputs, targets)
        output = call(model, inputs)
        output = output if context is None else context.whole(output)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return losses, first, weights, output


def assert_same(found: Result, expected: Result) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["context=2", "context=4", "context=2,data=2"])
def test_steps_equal_the_serial_steps(name: str, layout: str, ranks: Ranks) -> None:
    serial = train(name, "serial")
    start = build(name).state_dict()
    trained = [key for key in start if not key.endswith(("cos", "sin"))]
    assert all(not torch.equal(start[key], serial[2][key]) for key in trained)
    assert all(gradient.norm() > 1e-9 for gradient in serial[1].values())
    for found in ranks(Layout.parse(layout).workers, train, name, layout):
        assert_same(found, serial)


@pytest.mark.parametrize("fault", ["no sum over context", "even shares"])
def test_a_planted_fault_shows(fault: str, ranks: Ranks) -> None:
    serial = train("charlm", "serial")
    with pytest.raises(AssertionError):
        assert_same(ranks(2, train, "charlm", "context=2", 3, fault)[0], serial)


@pytest.mark.parametrize("blind", ["arange", "__getitem__", "scaled_dot_product_attention"])
def test_the_check_notices_what_is_not_answered(blind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one of the answers for the whole sequence left out, the models that need it are refused."""
    answered = WholeSequence.__torch_function__

    def forgetful(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == blind:
            return func(*args, **(kwargs or {}))
        return answered(self, func, types, args, kwargs)

    name = {"arange": "charlm", "__getitem__": "rope", "scaled_dot_product_attention": "charlm"}[blind]
    accepted = check(build(name), *data(name, 2, 0))
    assert accepted == LENGTH
    monkeypatch.setattr(WholeSequence, "__torch_function__", forgetful)
    with pytest.raises(PlanError, match="First to differ"):
        check(build(name), *data(name, 2, 0))


def check(model: nn.Module, inputs: Any, targets: Any, degree: int = 2, **objective: Any) -> int:
    return check_context(model, degree, inputs, targets, Objective(**(objective or {"loss": token_loss}))).length


class Coupled(nn.Module):
    """Residual stack of a token-wise layer and something that mixes tokens, whose output weight may start at zero."""

    def __init__(self, mix: nn.Module, *, zero: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(VOCABULARY, 6), mix, nn.Linear(6, VOCABULARY)
        self.scale = nn.Parameter(torch.zeros(()) if zero else torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        out: Tensor = self.head(x + self.scale * self.mix(x))
        return out


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)[0]
        return out


class Weighed(nn.Module):
    """Attention that returns its weights, which torch computes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x)[0]
        return out


def alibi(x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    bias = -(places[None] - places[:, None]).abs().to(x.dtype)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


MIXES: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("convolution", Convolution, r"'mix\.inner', a Conv1d"),
    ("recurrent", Recurrent, r"'mix\.inner', a LSTM"),
    ("weights by hand", Weighed, r"'mix\.inner', a MultiheadAttention"),
    ("mean", lambda: Call(lambda x: x.mean(1, keepdim=True).expand_as(x)), r"'mix', a Call"),
    ("running sum", lambda: Call(lambda x: x.cumsum(1)), r"'mix', a Call"),
    ("shift", lambda: Call(lambda x: x.roll(1, 1)), r"'mix', a Call"),
    ("attention by hand", lambda: Call(lambda x: (x @ x.transpose(1, 2)).softmax(2) @ x), r"'mix', a Call"),
    ("own queries", lambda: Call(lambda x: F.scaled_dot_product_attention(x[:, :3], x, x).repeat(1, 5, 1)), "of 3 queries"),
    ("range", lambda: Call(lambda x: x + torch.tensor([float(i) for i in range(x.shape[1])])[:, None]), r"'mix'"),
]  # fmt: skip


@pytest.mark.parametrize(("mix", "named"), [mix[1:] for mix in MIXES], ids=[mix[0] for mix in MIXES])
@pytest.mark.parametrize("zero", [False, True])
def test_tokens_that_meet_elsewhere_are_refused(mix: Callable[[], nn.Module], named: str, zero: bool) -> None:
    torch.manual_seed(0)
    with pytest.raises(PlanError, match=named):
        check(Coupled(mix(), zero=zero), *data("charlm", 3, 0))


def test_token_wise_layers_are_accepted() -> None:
    model = Coupled(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.5), nn.GELU()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(7)
    assert check(model, *data("charlm", 3, 0)) == LENGTH
    after = torch.rand(())
    torch.manual_seed(7)
    assert torch.equal(torch.rand(()), after), "the check drew from the training's generator"
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training


class Distances(nn.Module):
    """A learned bias for each distance between two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * LENGTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        bias = self.table(places[None, :] - places[:, None] + LENGTH).permute(2, 0, 1).to(x.dtype)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


@pytest.mark.parametrize("mix", [lambda: Call(alibi), Distances], ids=["fixed", "learned"])
def test_a_bias_over_pairs_of_tokens_is_that_of_the_whole(mix: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert check(Coupled(mix()), *data("charlm", 3, 0)) == LENGTH


def test_a_model_that_needs_float32_is_tried_in_float32() -> None:
    model = Coupled(Call(lambda x: F.linear(x, torch.eye(6))))
    assert check(model, *data("charlm", 3, 0)) == LENGTH
    with pytest.raises(PlanError, match="'mix'"):
        check(Coupled(Call(lambda x: F.linear(x.roll(1, 1), torch.eye(6)))), *data("charlm", 3, 0))


class _Made(TorchDispatchMode):
    """Counts tensors of some size whose memory is that of none of the arguments."""

    def __init__(self, numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = {leaf.data_ptr() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, Tensor) and result.numel() == self.numel and result.data_ptr() not in given
        self.count += made
        return result


def test_a_table_is_copied_once_and_no_other_tensor_of_its_size_is_made() -> None:
    model = build("charlm")
    table = nn.Embedding(2**15, 65)  # two blocks of noise, and a part of one
    model.add_module("table", table)
    with _Made(table.weight.numel()) as made:
        assert check(model, *data("charlm", 2, 0)) == LENGTH
    assert made.count == 1


def test_the_tried_copy_keeps_ties_and_moves_every_weight() -> None:
    one, other, model = nn.Linear(3, 4), nn.Linear(3, 4), nn.Module()
    other.weight = one.weight
    one.bias = nn.Parameter(torch.zeros(4), requires_grad=False)
    model.add_module("one", one)
    model.add_module("other", other)
    model.register_parameter("scale", nn.Parameter(torch.zeros(())))
    model.register_parameter("none", nn.Parameter(torch.zeros(0, 2)))
    model.register_parameter("words", nn.Parameter(torch.arange(3), requires_grad=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tried = _prepared(model, torch.float64)
    assert tried.get_submodule("other").weight is tried.get_parameter("one.weight")
    assert not tried.get_parameter("one.bias").requires_grad and tried.get_parameter("one.weight").requires_grad
    for name, parameter in tried.named_parameters():
        if name == "words":
            assert parameter.equal(before[name])
        else:
            assert parameter.dtype == torch.float64 and not (parameter == before[name]).any()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def shifted(output: Tensor, target: Tensor) -> Tensor:
    return token_loss(output[:, :-1], target[:, 1:])


def test_losses_that_are_no_mean_over_tokens_are_refused() -> None:
    model, (tokens, targets) = build("charlm"), data("charlm", 3, 0)
    with pytest.raises(PlanError, match="not the mean of the losses"):
        check(model, tokens, targets, loss=lambda o, y: token_loss(o[:, -1:], y[:, -1:]))
    with pytest.raises(PlanError, match="not the mean of the losses"):
        check(model, tokens, targets, loss=shifted)
    assert check(model, tokens, targets, loss=shifted, weight=lambda y: counted(y[:, 1:])) == LENGTH
    targets[:, 4:] = -100
    with pytest.raises(PlanError, match=r"give Job\.weight"):
        check(model, tokens, targets)
    assert check(model, tokens, targets, loss=token_loss, weight=counted) == LENGTH

    def pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        output, target = model(batch[0]), batch[1]
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum"), counted(target)

    assert check(model, tokens, targets, objective=pair) == LENGTH


def test_what_has_no_sequence_is_refused() -> None:
    with pytest.raises(PlanError, match="no input has a"):
        check(nn.Linear(3, 3), torch.zeros(3), torch.zeros(3))
    tokens, targets = data("charlm", 3, 0)
    with pytest.raises(PlanError, match="at most context=3"):
        check(build("charlm"), tokens[:, :3], targets[:, :3], degree=4)
    with pytest.raises(PlanError, match="context=2 with sequences of 15 tokens"):
        pooled = nn.Sequential(nn.Embedding(VOCABULARY, 4), Call(lambda x: x.mean(1)))
        check(pooled, tokens, targets[:, 0] % 4, loss=F.cross_entropy)


def test_other_shapes_than_checked_are_refused() -> None:
    tokens, targets = data("charlm", 3, 0)
    context = ContextSplit(Group(), check_context(build("charlm"), 2, tokens, targets, Objective(loss=token_loss)))
    with pytest.raises(JobError, match=r"\(B, 12\), and the context axis was checked for \(B, 15\)"):
        context.local(tokens[:, :12], targets[:, :12])
    context.local(tokens[:1], targets[:1])


class Picks(nn.Module):
    """Also counts samples: as many as a rank has tokens, in some batches."""

    def __init__(self, *, helper: bool = False) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, 8), nn.Embedding(LENGTH, 8)
        self.helper = helper
        self.head = nn.Linear(8, VOCABULARY)

    def count(self, number: int) -> Tensor:
        return torch.arange(number)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.helper:
            x, samples = x + self.place(self.count(tokens.shape[1])), self.count(len(tokens))
        else:
            x, samples = x + self.place(torch.arange(tokens.shape[1])), torch.arange(len(tokens))
        out: Tensor = self.head(x[samples])
        return out


def pick(layout: str) -> Tensor:
    torch.manual_seed(0)
    model, mesh = Picks().double(), Mesh(Layout.parse(layout), Group.world().rank)
    tokens, targets = data("charlm", 8, 0)
    if mesh.layout.context == 1:
        return torch.as_tensor(model(tokens).detach())
    checked = check_context(model, 2, tokens, targets, Objective(loss=token_loss))
    context = ContextSplit(mesh.group("context"), checked)
    context.wire(model)
    mine, _ = context.local(tokens, targets)
    assert (len(mine) == mine.shape[1]) is (mesh.rank == 1)  # 8 samples, and 7 or 8 tokens
    whole: Tensor = context.whole(model(mine).detach())
    return whole


def test_as_many_samples_as_tokens_are_not_taken_for_positions(ranks: Ranks) -> None:
    for found in ranks(2, pick, "context=2"):
        torch.testing.assert_close(found, pick("serial"))
    with pytest.raises(PlanError, match=r"test_context\.py, line \d+, counts tokens at one time and something else"):
        check(Picks(helper=True), *data("charlm", 3, 0))


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = CharGPT(VOCABULARY, LENGTH, 12, 1, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        scores = self.inner(tokens)
        return {"flat": scores.flatten(0, 1), "swapped": scores.transpose(1, 2), "scale": self.inner.norm.weight}


def fold(layout: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, mesh = Folded().double(), Mesh(Layout.parse(layout), Group.world().rank)
    tokens, targets = data("charlm", 3, 0)
    with torch.no_grad():
        if mesh.layout.context == 1:
            return dict(model(tokens))
        loss = Objective(loss=lambda output, target: F.cross_entropy(output["flat"], target.flatten()))
        context = ContextSplit(mesh.group("context"), check_context(model, 2, tokens, targets, loss))
        context.wire(model)
        return dict(context.whole(model(context.local(tokens, targets)[0])))


def test_outputs_of_any_form_are_put_together(ranks: Ranks) -> None:
    for found in ranks(2, fold, "context=2"):
        torch.testing.assert_close(found, fold("serial"))


@pytest.mark.parametrize(("length", "degree"), [(15, 2), (15, 4), (16, 4), (5, 4), (4, 4), (1, 1), (97, 8)])
def test_parts_are_all_tokens_once_and_even(length: int, degree: int) -> None:
    parts = [Part(length, degree, rank) for rank in range(degree)]
    taken = [part.take(torch.arange(length), 0).tolist() for part in parts]
    assert sorted(token for tokens in taken for token in tokens) == list(range(length))
    assert all(tokens == sorted(tokens) and tokens for tokens in taken)
    assert [len(tokens) for tokens in taken] == list(parts[0].counts)
    assert max(parts[0].counts) - min(parts[0].counts) <= 1
    assert sum(part.share for part in parts) == pytest.approx(1)
    if length % (2 * degree) == 0:  # causal attention: pairs of a token and those before, the same for every rank
        work = [sum(token + 1 for token in tokens) for tokens in taken]
        assert max(work) == min(work)
