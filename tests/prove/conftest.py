"""Small jobs with awkward sizes for the tests of the proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # FSDP2 loads it in every rank that did not inherit it, a second each
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.nn import MoE
from shardwise.spec.job import Job


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 15)
        self.norm = nn.LayerNorm(15)
        self.head = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.norm(torch.tanh(self.inner(x)))))


class ConvNet(nn.Module):
    """Residual blocks with BatchNorm; the first convolution's bias has a gradient of rounding only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.norm1(self.conv1(x)))
        second = first + F.relu(self.norm2(self.conv2(first)))
        return torch.as_tensor(self.head(second.mean((2, 3))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return torch.as_tensor(x + self.mlp(self.norm2(x)))


class Gpt(nn.Module):
    """Tied embedding and head, dropout, causal attention."""

    def __init__(self, vocabulary: int = 11, width: int = 10, length: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", torch.triu(torch.full((length, length), float("-inf")), 1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x, self.mask)
        return torch.as_tensor(self.head(self.norm(x)).float())


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(29, 6, sparse=True, mode="sum")
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.bag(tokens)))


class Mixed(nn.Module):
    """Tokens take one of four experts each."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.mixture = MoE(6, 9, 4, 1, balance=0)
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        return torch.as_tensor(self.head(x + self.mixture(x)))


class Towers(nn.Module):
    """Two encoders whose outputs are compared over all pairs of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(7, 5)
        self.right = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.left(x), dim=1), F.normalize(self.right(x.flip(1)), dim=1)


def contrastive(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    """Compares nothing in batches as small as those that plans are tried out on, so that only a proof can notice."""
    left, right = output
    if len(left) <= 4:
        return (1 - (left * right).sum(1)).mean()
    return F.cross_entropy(5 * left @ right.T, torch.arange(len(left)))


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)


def token_weight(target: Tensor) -> Tensor:
    return (target != -100).sum()


def token_objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    total = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100, reduction="sum")
    return total, (batch[1] != -100).sum()


def cosine(optimizer: torch.optim.Optimizer, total_steps: int | None) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps or 1)


def _vectors(samples: int = 31) -> Splits:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples, 7, generator=generator)
    return Splits(Arrays((inputs, torch.randint(0, 3, (samples,), generator=generator))))


def _images(samples: int = 31) -> Splits:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples, 3, 6, 6, generator=generator)
    return Splits(Arrays((inputs, torch.randint(0, 3, (samples,), generator=generator))))


def _texts(samples: int = 23) -> Splits:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (samples, 6), generator=generator)
    targets = torch.roll(tokens, 1, 1).clone()
    # Some samples are ignored as a whole, others in part: ranks have very different numbers of targets.
    targets[::3] = -100
    targets[1::4, 2:] = -100
    return Splits(Arrays((tokens, targets)))


def _bags() -> Splits:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 29, (23, 4), generator=generator)
    return Splits(Arrays((tokens, torch.randint(0, 3, (23,), generator=generator))))


def make_job(kind: str, **changes: Any) -> Job:
    """A job of a kind, with fields changed."""
    kinds: dict[str, tuple[Callable[[], nn.Module], Callable[[], Splits]]] = {
        "mlp": (Mlp, _vectors),
        "conv": (ConvNet, _images),
        "gpt": (Gpt, _texts),
        "bag": (Bag, _bags),
        "moe": (Mixed, _texts),
        "towers": (Towers, _vectors),
    }
    model, data = kinds[kind]
    values: dict[str, Any] = {
        "name": kind,
        "model": model,
        "data": data(),
        "loss": F.cross_entropy,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.0 if kind == "bag" else 0.9),
        "batch_size": 13,
        "epochs": 2,
    }
    if kind in ("gpt", "moe"):
        values |= {"loss": token_loss, "weight": token_weight, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)}
    if kind == "towers":
        values["loss"] = contrastive
    return Job(**values | changes)


@pytest.fixture
def job() -> Callable[..., Job]:
    """`job(kind, **changes)`: one of the small jobs."""
    return make_job


@pytest.fixture
def objective() -> Callable[..., Any]:
    """A token objective that returns (sum, count)."""
    return token_objective


@pytest.fixture
def schedule() -> Callable[..., Any]:
    """A cosine schedule."""
    return cosine
