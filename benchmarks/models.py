"""The models of the overhead benchmark, and their data in memory.

Shapes: B samples, T characters, D features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

import shardwise
from shardwise.data.source import Arrays, Splits


class LeNet(nn.Module):
    """The network of the CIFAR-10 tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        out: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return out


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outside)
        same = stride == 1 and inside == outside
        self.short: nn.Module = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        out: Tensor = F.relu(inner + self.short(x))
        return out


def resnet18() -> nn.Module:
    """ResNet-18 for 32x32 images, with GroupNorm: BatchNorm over the global batch is something DDP does not do on CPU,
    so that a comparison with it would compare different work."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    inside = 64
    for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Residual(inside, outside, stride), _Residual(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))
        return out


class GPT(nn.Module):
    """10.7 million parameters: 6 layers of width 384, as in the small character models people train on one machine."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(65, 384), nn.Embedding(128, 384)
        self.blocks = nn.Sequential(*[_Block(384, 6) for _ in range(6)])
        self.norm, self.head = nn.LayerNorm(384), nn.Linear(384, 65, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.blocks(self.tokens(tokens_BT) + self.positions(places_T))
        out: Tensor = self.head(self.norm(x_BTD)).flatten(0, 1)
        return out


def wide_convolutions(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """Three convolutions on whole 32x32 images: tensors of tens of MiB at a batch of 256."""
    layers: list[nn.Module] = []
    for inside, outside, pool in ((3, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), norm(outside), nn.ReLU(), nn.MaxPool2d(pool)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    """For digits of 28x28."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def tabular() -> nn.Module:
    """So little to compute that a step is overhead alone."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def batch_norms() -> nn.Module:
    """Ten small convolutions, each with a BatchNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(10):
        layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class ManySmall(nn.Module):
    """604 small parameters: what is paid once for each of them shows here."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3072, 16), nn.Linear(16, 10)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh()) for _ in range(150)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(x)
        return out


class Recommender(nn.Module):
    """Users and items of 32 numbers each; with `sparse`, only the rows of a batch have gradients."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(50_000, 32, sparse=sparse), nn.Embedding(20_000, 32, sparse=sparse)
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        x = torch.cat([self.users(pairs[:, 0]), self.items(pairs[:, 1])], 1)
        out: Tensor = self.head(F.relu(self.hidden(x))).squeeze(1)
        return out


class Lstm(nn.Module):
    """Two layers of 128 over 32 words, and the class of the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(2000, 64), nn.LSTM(64, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.words(tokens))[0][:, -1])
        return out


class UNet(nn.Module):
    """Two levels with skip connections; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._pair(3, 16), self._pair(16, 32)])
        self.middle = self._pair(32, 64)
        self.rise = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.up = nn.ModuleList([self._pair(64, 32), self._pair(32, 16)])
        self.head = nn.Conv2d(16, 3, 1)

    @staticmethod
    def _pair(inside: int, outside: int) -> nn.Module:
        convolutions = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for pair in self.down:
            kept.append(pair(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for rise, pair in zip(self.rise, self.up, strict=True):
            x = pair(torch.cat([rise(x), kept.pop()], 1))
        out: Tensor = self.head(x)
        return out


class Deep(nn.Module):
    """A transformer of 24 blocks of width 48: 290 parameters of a few KB."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(65, 48), nn.Linear(48, 65, bias=False)
        self.blocks = nn.Sequential(*[_Block(48, 4) for _ in range(24)])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.tokens(tokens_BT))).flatten(0, 1)
        return out


def _images(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, 32, 32, generator=generator), torch.randint(0, 10, (samples,), generator=generator)


def _vectors(width: int, classes: int) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    def make(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        classified = torch.randint(0, classes, (samples,), generator=generator)
        return torch.randn(samples, width, generator=generator), classified

    return make


def _texts(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 65, (samples, 129), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _short_texts(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 65, (samples, 33), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _words(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 2000, (samples, 32), generator=generator)
    return tokens, torch.randint(0, 10, (samples,), generator=generator)


def _pairs(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    users = torch.randint(0, 50_000, (samples,), generator=generator)
    items = torch.randint(0, 20_000, (samples,), generator=generator)
    return torch.stack([users, items], 1), torch.rand(samples, generator=generator).round()


def _pictures(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, _ = _images(samples, generator)
    return images, images.roll(1, 2)


def _classes(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target.flatten())


def _momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.001, momentum=0.9)


def _plain(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01)


def _adam(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=1e-3)


def _adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-3)


@dataclass(frozen=True)
class Case:
    """One model with its data and settings.

    Attributes:
        batch: samples of a global batch.
        steps: taken in a row where contenders take turns in one process.
        make: data of so many samples.
        loss: (output, target) -> mean.
        optimizer: the usual one for the model.
        settings: fields of the job beside these: `clip_norm`, `micro_batch`, `precision`, `compile`, `batch_norm`.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: int
    steps: int
    make: Callable[[int, torch.Generator], tuple[Tensor, Tensor]] = _images
    loss: Callable[[Tensor, Tensor], Tensor] = _classes
    optimizer: Callable[[Any], Optimizer] = _momentum
    settings: dict[str, Any] = field(default_factory=dict)

    def data(self, samples: int) -> tuple[Tensor, Tensor]:
        """Seeded random data of the right shapes: how long a step takes does not depend on the values."""
        return self.make(samples, torch.Generator().manual_seed(0))

    def job(self, samples: int) -> shardwise.Job:
        """The same as a shardwise job."""
        return shardwise.Job(
            name=self.name,
            model=self.model,
            data=Splits(Arrays(self.data(samples))),
            loss=self.loss,
            optimizer=self.optimizer,
            batch_size=self.batch,
            epochs=1,
            **self.settings,
        )


def _cases() -> list[Case]:
    digits = _vectors(784, 10)
    group_norms = functools.partial(wide_convolutions, functools.partial(nn.GroupNorm, 8))
    recommender, sparse = functools.partial(Recommender, sparse=False), functools.partial(Recommender, sparse=True)
    return [
        Case("lenet", LeNet, 100, 40),
        Case("resnet18", resnet18, 16, 4),
        Case("gpt10m", GPT, 8, 6, _texts, optimizer=_adamw),
        Case("mlp", mlp, 128, 40, digits, optimizer=_adam),
        Case("tabular", tabular, 8, 200, _vectors(16, 2), optimizer=_adam),
        Case("recommender", recommender, 256, 20, _pairs, F.binary_cross_entropy_with_logits, _adam),
        Case("recommender sparse", sparse, 256, 40, _pairs, F.binary_cross_entropy_with_logits, _plain),
        Case("lstm", Lstm, 32, 10, _words, optimizer=_adam),
        Case("unet", UNet, 16, 4, _pictures, F.mse_loss, _adam),
        Case("deep transformer", Deep, 8, 10, _short_texts, optimizer=_adamw),
        Case("604 parameters", ManySmall, 32, 10, optimizer=_adam),
        Case("wide convolutions", group_norms, 256, 2),
        Case("BatchNorm own", batch_norms, 32, 10, settings={"batch_norm": "local"}),
        Case("BatchNorm global", batch_norms, 32, 10),
        Case("mlp clipped", mlp, 128, 40, digits, optimizer=_adam, settings={"clip_norm": 1.0}),
        Case("mlp accumulated", mlp, 128, 20, digits, optimizer=_adam, settings={"micro_batch": 16}),
        Case("gpt10m bf16", GPT, 8, 6, _texts, optimizer=_adamw, settings={"precision": "bf16"}),
        Case("mlp compiled", mlp, 128, 40, digits, optimizer=_adam, settings={"compile": True}),
    ]


CASES = {case.name: case for case in _cases()}
