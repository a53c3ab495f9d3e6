"""Small models of many kinds, with data and jobs, for the parity matrix.

Activations are smooth, so that rounding tips nothing over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.nn import MoE, with_auxiliary_loss
from shardwise.spec.job import Job


class Mlp(nn.Sequential):
    """Sizes that nothing divides."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 3))


class ConvNet(nn.Module):
    """BatchNorm and residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.stem(x)))
        x = F.silu(x + self.norm2(self.conv(x)))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class UNet(nn.Module):
    """Skip connections across everything; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)])
        self.middle = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.up = nn.ModuleList([nn.ConvTranspose2d(6, 6, 2, stride=2), nn.ConvTranspose2d(12, 4, 2, stride=2)])
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.down[0](x))
        b = F.silu(self.down[1](a))
        c = F.silu(self.middle(b))
        c = torch.cat([self.up[0](c), b], 1)
        y: Tensor = self.head(torch.cat([self.up[1](c), a], 1))
        return y


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.pair = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        k, v = self.pair(memory).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(x), k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention if there is a memory, and an MLP or another inner part."""

    def __init__(self, width: int, *, causal: bool, cross: bool = False, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, 2, causal=causal)
        if cross:
            self.norm2, self.cross = nn.LayerNorm(width), Attention(width, 2, causal=False)
        self.norm3 = nn.LayerNorm(width)
        self.inner = inner or nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        if memory is not None:
            x = x + self.cross(self.norm2(x), memory)
        out: Tensor = x + self.inner(self.norm3(x))
        return out


class Gpt(nn.Module):
    """Tied embedding and head; with `experts`, their mixture in place of the MLPs."""

    def __init__(self, *, experts: bool = False, vocabulary: int = 12, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        make = functools.partial(MoE, width, 12, 4, balance=0.1) if experts else (lambda: None)
        self.blocks = nn.ModuleList(Block(width, causal=True, inner=make()) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x))
        return y


class EncoderDecoder(nn.Module):
    """Cross-attention to the encoder's output in every block of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(11, 8), nn.Embedding(12, 8)
        self.encoder = nn.ModuleList([Block(8, causal=False)])
        self.decoder = nn.ModuleList([Block(8, causal=True, cross=True) for _ in range(2)])
        self.head = nn.Linear(8, 12)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source(source)
        for block in self.encoder:
            memory = block(memory)
        x = self.target(target)
        for block in self.decoder:
            x = block(x, memory)
        y: Tensor = self.head(x)
        return y


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(12, 7), nn.LSTM(7, 9, num_layers=2, batch_first=True)
        self.head = nn.Linear(9, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return y


class Recommender(nn.Module):
    """Bags of items as sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(29, 6, sparse=True, mode="sum")
        self.hidden, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, items: Tensor) -> Tensor:
        y: Tensor = self.head(F.gelu(self.hidden(self.bag(items))))
        return y


class Towers(nn.Module):
    """Two encoders, compared over all pairs of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
        self.right = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.left(x), dim=1), F.normalize(self.right(x.flip(1)), dim=1)


def contrastive(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    left, right = output
    return F.cross_entropy(5 * left @ right.T, torch.arange(len(left)))


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _data(kind: str) -> Splits:
    """31 samples: two batches of 13 and one of 5."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 11, (31, 6), generator=g)
    classes = torch.randint(0, 3, (31,), generator=g)
    inputs: dict[str, tuple[Any, Any]] = {
        "vectors": (torch.randn(31, 7, generator=g), classes),
        "images": (torch.randn(31, 3, 8, 8, generator=g), classes),
        "pairs": (torch.randn(31, 3, 8, 8, generator=g), torch.randn(31, 3, 8, 8, generator=g)),
        "texts": (tokens, tokens.roll(-1, 1)),
        "translations": ((tokens, tokens.roll(1, 1)), tokens),
        "bags": (torch.randint(0, 29, (31, 4), generator=g), classes),
    }
    return Splits(Arrays(inputs[kind]))


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Any, Any], Tensor]]] = {
    "MLP of awkward sizes": (Mlp, "vectors", F.cross_entropy),
    "conv net, BatchNorm, residuals": (ConvNet, "images", F.cross_entropy),
    "U-Net": (UNet, "pairs", F.mse_loss),
    "GPT, tied embedding": (Gpt, "texts", token_loss),
    "encoder-decoder": (EncoderDecoder, "translations", token_loss),
    "LSTM": (Lstm, "texts", token_loss),
    "mixture of experts": (functools.partial(Gpt, experts=True), "texts", token_loss),
    "recommender, sparse gradients": (Recommender, "bags", F.cross_entropy),
    "two towers, coupled loss": (Towers, "vectors", contrastive),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"clip_norm": 0.1},
    "accumulation": {"micro_batch": 2},
    "recompute": {},  # of the plan
}
"""What is varied; every run's last step is on the short batch that ends the epoch."""


def make_job(model: str, settings: Sequence[str]) -> Job:
    build, data, loss = MODELS[model]
    values: dict[str, Any] = {}
    for name in settings:
        values |= SETTINGS[name]
    values |= {"objective": with_auxiliary_loss(loss)} if "experts" in model else {"loss": loss}
    if "sparse" in model:
        optimizer: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    else:
        optimizer = lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3)  # noqa: E731
    return Job(name=model, model=build, data=_data(data), optimizer=optimizer, batch_size=13, epochs=1, **values)
