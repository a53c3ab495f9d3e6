"""The three models of the overhead benchmark, and their data in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


@dataclass(frozen=True)
class Case:
    """One model with its data and settings; `batch` is global."""

    name: str
    model: Callable[[], nn.Module]
    batch: int
    steps: int

    def data(self, samples: int) -> tuple[Tensor, Tensor]:
        """Seeded random data of the right shapes: how long a step takes does not depend on the values."""
        generator = torch.Generator().manual_seed(0)
        if self.name == "gpt10m":
            tokens = torch.randint(0, 65, (samples, 129), generator=generator)
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        images = torch.randn(samples, 3, 32, 32, generator=generator)
        return images, torch.randint(0, 10, (samples,), generator=generator)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy over samples or tokens."""
        return F.cross_entropy(output, target.flatten())

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """The usual one for the model."""
        if self.name == "gpt10m":
            return torch.optim.AdamW(parameters, lr=1e-3)
        return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)

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
        )


CASES = {
    "lenet": Case("lenet", LeNet, 100, 40),
    "resnet18": Case("resnet18", resnet18, 16, 4),
    "gpt10m": Case("gpt10m", GPT, 8, 6),
}
