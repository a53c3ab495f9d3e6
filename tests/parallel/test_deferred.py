"""Models built without memory and filled in parts: the same bits as built as ever, or refused with the reason."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from shardwise.errors import RunFailed
from shardwise.parallel.deferred.build import Deferred, build_deferred
from shardwise.parallel.deferred.log import CannotReplayError

MIN_BYTES = 1024


class Tied(nn.Module):
    """Weights drawn twice, tied, scaled, partly overwritten and copied between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32, padding_idx=3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3))
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.embed.weight
        self.apply(self._draw)
        for name, parameter in self.named_parameters():
            if name.endswith("2.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(6))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.5)
            first, second, third = (block[0].weight for block in self.blocks)  # type: ignore[index]
            first[5:9].zero_()
            second[torch.arange(64) % 2 == 0] = 1.5
            third[[1, 3]] += second[2:4]
            third[np.array([4, 5])] = 0.25

    @staticmethod
    def _draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)


class Buffers(nn.Module):
    """Positions, masks, plain tensors, NumPy and Python numbers, stacked layers."""

    def __init__(self) -> None:
        super().__init__()
        place, rate = torch.arange(200.0).unsqueeze(1), torch.exp(torch.arange(0, 32, 2) * (-math.log(1e4) / 32))
        table = torch.zeros(200, 32)
        table[:, 0::2], table[:, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
        self.register_buffer("table", table)
        self.register_buffer("part", table[3:])
        self.plain = torch.randn(64, 64)
        self.mask = torch.tril(torch.ones(64, 64))
        self.weight = nn.Parameter(self.plain.clone().t().contiguous())
        self.drawn = nn.Parameter(torch.tensor(np.random.randn(64, 64)) * random.random())  # noqa: NPY002
        self.stack = nn.Parameter(torch.stack([nn.Linear(32, 32).weight.detach() for _ in range(4)]))


def _looks_at_values() -> nn.Module:
    first, second = nn.Linear(32, 64), nn.Linear(64, 64)
    model = nn.Sequential(first, nn.Tanh(), second, nn.BatchNorm1d(64))
    model(torch.randn(50, 32))
    for layer in (first, second):
        nn.init.orthogonal_(layer.weight)
    with torch.no_grad():
        first.weight.div_(model(torch.randn(50, 32)).std().item())
        if second.weight.norm() > 1:
            second.weight.mul_(0.3)
        second.weight[0, 0] = sum(first.weight[0].tolist())
    return model


def _parametrized() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(64, 64)),
        parametrizations.spectral_norm(nn.Linear(64, 64)),
        parametrizations.orthogonal(nn.Linear(64, 64)),
    )


def _copies() -> nn.Module:
    first = nn.Linear(64, 64).double()
    second = copy.deepcopy(nn.Sequential(first, copy.deepcopy(first))).bfloat16()
    loaded = nn.Linear(64, 64).to("cpu")
    loaded.load_state_dict(nn.Linear(64, 64).state_dict())
    loaded.weight.requires_grad_(False)
    turned = nn.Linear(64, 64)
    turned.weight.data = turned.weight.data.t().contiguous() * 2
    turned.weight.data[0] = 7
    turned.weight.data.cpu()[1] = 3.0
    joined = nn.Linear(64, 64).to(torch.zeros(1))
    joined.weight = nn.Parameter(torch.cat([turned.weight[:32], loaded.weight[:32] * torch.rand(1)]).detach())
    joined.register_buffer("moved", torch.zeros(3).to(joined.weight) + joined.weight.to("cpu").detach().mean())
    return nn.ModuleList([first, second, loaded, turned, joined])


def _initialisers() -> nn.Module:
    def with_generator(weight: Tensor) -> None:
        nn.init.uniform_(weight, generator=torch.Generator().manual_seed(7))

    ways: list[Callable[[Tensor], Any]] = [
        *(nn.init.eye_, nn.init.xavier_uniform_, nn.init.xavier_normal_, nn.init.kaiming_normal_, nn.init.ones_),
        *(nn.init.zeros_, with_generator),
        lambda weight: nn.init.sparse_(weight, 0.3),
        lambda weight: nn.init.dirac_(weight.data.view(64, 64, 1)),
        lambda weight: weight.data.bernoulli_(0.3),
        lambda weight: weight.data.bernoulli_(torch.full((64, 64), 0.5)),
        lambda weight: weight.data.exponential_(),
        lambda weight: weight.data.random_(0, 10),
        lambda weight: weight.data.copy_(torch.randperm(4096).view(64, 64)),
        lambda weight: weight.data.copy_(torch.rand(64, 64) + torch.rand_like(weight)),
        lambda weight: weight.data[:7].normal_(),
    ]
    weights = nn.ParameterList([nn.Parameter(torch.zeros(64, 64)) for _ in ways])
    for weight, fill in zip(weights, ways, strict=True):
        fill(weight)
    return weights


def _convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ConvTranspose2d(64, 8, 3), nn.Bilinear(16, 16, 32))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "buffers": Buffers,
    "looks at values": _looks_at_values,
    "parametrized": _parametrized,
    "copies": _copies,
    "initialisers": _initialisers,
    "convolutions": _convolutions,
    "lstm": lambda: nn.LSTM(32, 64, 2, bidirectional=True),
    "transformer": lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True),  # copies of one layer
}


def _seed() -> None:
    torch.manual_seed(3)
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002


def _next_draws() -> tuple[Any, ...]:
    return torch.rand(3).tolist(), random.random(), float(np.random.rand())  # noqa: NPY002


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    plain = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {**dict(named), **plain}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _difference(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of tensors that are not the same in value, type, layout or in which of them are one."""
    a, b = _tensors(one), _tensors(other)
    assert list(a) == list(b)
    return [
        name
        for name in a
        if (a[name].shape, a[name].stride(), a[name].dtype, a[name].requires_grad, type(a[name]))
        != (b[name].shape, b[name].stride(), b[name].dtype, b[name].requires_grad, type(b[name]))
        or not torch.equal(_bits(a[name]), _bits(b[name]))
        or [other for other in a if a[other] is a[name]] != [other for other in b if b[other] is b[name]]
    ]


def _fill(deferred: Deferred) -> nn.Module:
    """In parts, the last first: no order may matter."""
    for child in reversed(list(deferred.model.children())):
        deferred.fill(child)
    deferred.fill(deferred.model)
    return deferred.model


@pytest.mark.parametrize("kind", MODELS)
def test_same_bits_in_parts(kind: str) -> None:
    _seed()
    serial = MODELS[kind]()
    after = _next_draws()
    _seed()
    deferred = build_deferred(MODELS[kind], min_bytes=MIN_BYTES)
    assert _next_draws() == after
    assert any(parameter.is_meta for parameter in deferred.model.parameters())
    state = torch.get_rng_state()
    model = _fill(deferred)
    assert torch.equal(torch.get_rng_state(), state)
    assert _difference(serial, model) == []
    torch.manual_seed(4)
    assert _difference(serial, MODELS[kind]()) != []  # the comparison sees other weights


def test_a_lost_operation_shows() -> None:
    """One scaling left out of the log, and the weights differ: what the test above would say of a bad log."""
    _seed()
    serial = Tied()
    _seed()
    deferred = build_deferred(Tied, min_bytes=MIN_BYTES)
    scaled = [index for index, entry in enumerate(deferred._log.entries) if entry.name == "mul_"]
    lost = deferred._log.entries[scaled[-1]]
    deferred._log.entries[scaled[-1]] = replace(lost, call=torch.ops.aten.add_.Tensor)
    assert _difference(serial, _fill(deferred)) != []


def test_other_random_numbers_are_noticed() -> None:
    _seed()
    deferred = build_deferred(lambda: nn.Linear(64, 64), min_bytes=MIN_BYTES)
    entries = deferred._log.entries
    place = next(index for index, entry in enumerate(entries) if entry.state is not None)
    entries[place] = replace(entries[place], state=torch.Generator().manual_seed(9).get_state())
    with pytest.raises(RunFailed, match="drew other random numbers for a weight of \\(64, 64\\)"):
        deferred.fill(deferred.model)


def _list_of_tensors() -> nn.Module:
    model = nn.Linear(64, 64)
    vars(model)["kept"] = [torch.randn(64, 64)]
    return model


def _as_array(model: nn.Module) -> nn.Module:
    next(model.parameters()).detach().numpy()[:] = 3
    return model


def _as_array_or_not() -> nn.Module:
    model = nn.Linear(64, 64)
    try:
        return _as_array(model)
    except Exception:  # noqa: BLE001  # what a model's author may write; the values would be others without a word
        return model


def _hooked() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(64, 64))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a list": (_list_of_tensors, "neither a parameter nor a buffer"),
    "NumPy": (lambda: _as_array(nn.Linear(64, 64)), "asks for the memory"),
    "NumPy, with the error caught": (_as_array_or_not, "asks for the memory"),
    "meta": (lambda: nn.Linear(64, 64, device="meta"), "uses the meta device itself"),
    "computed weights": (_hooked, "computed from weights"),
    "its own error": (lambda: nn.Linear(64, 64)(torch.zeros(3, 5)), "fails on a large tensor"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_replayed_is_refused(kind: str) -> None:
    build, reason = REFUSED[kind]
    _seed()
    expected = _next_draws()
    _seed()
    with pytest.raises(CannotReplayError, match=reason):
        build_deferred(lambda: (np.random.rand(), random.random(), build())[2], min_bytes=MIN_BYTES)  # noqa: NPY002
    assert _next_draws() == expected  # the ordinary construction starts as if nothing had been


def test_digest_tells_other_values() -> None:
    def digest(seed: int, build: Callable[[], nn.Module]) -> str:
        _seed()
        np.random.seed(seed)  # noqa: NPY002
        return build_deferred(build, min_bytes=MIN_BYTES).digest

    assert digest(1, Buffers) == digest(1, Buffers)
    assert digest(1, Buffers) != digest(2, Buffers)
    assert digest(1, lambda: nn.Linear(64, 64)) == digest(2, lambda: nn.Linear(64, 64))
    assert digest(1, lambda: nn.Linear(64, 65)) != digest(1, lambda: nn.Linear(64, 64))
