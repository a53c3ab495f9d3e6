"""charlm: a small GPT that learns to continue a text, character by character.

The text is a part of Shakespeare's Coriolanus that comes with shardwise (see files/SOURCES.md), or any other with
`--set data=FILE`. Quality is in bits per character on the last tenth of the text: 6 know nothing, below 3 forms words.

Shapes: N samples, T characters of a window (`block`), D features (`width`), H heads, V characters there are.
"""

import math
from importlib.resources import as_file, files

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from shardwise.data.readers.text import text
from shardwise.data.source import Splits
from shardwise.spec.job import Job


def charlm(
    data: str | None = None,
    lr: float = 5e-3,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    block: int = 64,
    batch_size: int = 32,
    epochs: int = 8,
    seed: int = 0,
) -> Job:
    """Predict the next character.

    Args:
        data: a text file in UTF-8; none for the text that comes with shardwise.
        lr: greatest learning rate of AdamW, reached after a tenth of the steps.
        block: characters of a window; windows start every half block.
    """
    windows = text_windows(data, block)
    return Job(
        name="charlm",
        model=lambda: CharGPT(len(windows.classes), block, width, layers, heads),
        data=windows,
        loss=next_character_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.1),
        schedule=warmup_then_cosine,
        clip_norm=1.0,
        metrics={"bits_per_character": bits_per_character},
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
    )


class CharGPT(nn.Module):
    """Characters (N, T) -> scores of the next character (N, T, V). Embedding and head share one weight."""

    def __init__(self, vocabulary: int, block: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(block, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # as GPT-2 (Radford et al. 2019): residual branches start smaller
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if "out." in name else 0.02)
        self.head.weight = self.characters.weight

    def forward(self, characters_NT: Tensor) -> Tensor:
        places = torch.arange(characters_NT.shape[1], device=characters_NT.device)
        x_NTD = self.characters(characters_NT) + self.positions(places)
        for block in self.blocks:
            x_NTD = block(x_NTD)
        scores_NTV: Tensor = self.head(self.norm(x_NTD))
        return scores_NTV


class Block(nn.Module):
    """Attention to the characters before, then a two-layer network on each; both added to their input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.attention(self.norm1(x_NTD))
        added: Tensor = self.out(nn.functional.gelu(self.up(self.norm2(x_NTD))))
        return x_NTD + added


class Attention(nn.Module):
    """Causal self-attention with H heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        n, t, d = x_NTD.shape
        q, k, v = self.qkv(x_NTD).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (N, H, T, D/H)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(n, t, d))
        return mixed


def next_character_loss(scores_NTV: Tensor, target_NT: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats; windows are equally long, so it is a mean over samples too."""
    return nn.functional.cross_entropy(scores_NTV.flatten(0, 1), target_NT.flatten())


def bits_per_character(scores_NTV: Tensor, target_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the characters and their number; 2 to the power of the mean is the perplexity."""
    nats = nn.functional.cross_entropy(scores_NTV.flatten(0, 1).float(), target_NT.flatten(), reduction="sum")
    return nats / math.log(2), torch.tensor(target_NT.numel(), device=nats.device)


def warmup_then_cosine(optimizer: Optimizer, steps: int | None) -> LambdaLR:
    """The learning rate rises over a tenth of the steps, then falls to a tenth of itself."""
    total = steps or 1
    warmup = max(1, total // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def text_windows(data: str | None, block: int) -> Splits:
    """A text in windows of `block` characters that start every half block; none for the text that comes with shardwise."""
    stride = max(1, block // 2)
    if data is not None:
        return text(data, block=block, stride=stride)
    with as_file(files("shardwise.jobs") / "files" / "shakespeare.txt") as path:
        return text(path, block=block, stride=stride)
