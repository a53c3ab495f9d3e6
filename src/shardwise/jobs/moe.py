"""moe: the GPT of charlm with a mixture of experts in every block, on the same text.

Each character goes through `top_k` of `experts` small networks, so the model has more weights than it spends on a
character. Quality is in bits per character, as for charlm.

Shapes: N samples, T characters of a window (`block`), D features (`width`).
"""

import math

import torch
from torch import Tensor, nn

from shardwise.jobs.charlm import (
    Attention,
    CharGPT,
    bits_per_character,
    next_character_loss,
    text_windows,
    warmup_then_cosine,
)
from shardwise.nn.moe import MoE, with_auxiliary_loss
from shardwise.spec.job import Job


def moe(
    data: str | None = None,
    lr: float = 5e-3,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    experts: int = 4,
    top_k: int = 2,
    balance: float = 0.01,
    block: int = 64,
    batch_size: int = 32,
    epochs: int = 8,
    seed: int = 0,
) -> Job:
    """Predict the next character.

    Args:
        data: a text file in UTF-8; none for the text that comes with shardwise.
        lr: greatest learning rate of AdamW, reached after a tenth of the steps.
        experts: networks in each block.
        top_k: of them, how many a character goes through.
        balance: weight of the loss that keeps the experts evenly used.
        block: characters of a window; windows start every half block.
    """
    windows = text_windows(data, block)
    return Job(
        name="moe",
        model=lambda: MixtureGPT(len(windows.classes), block, width, layers, heads, experts, top_k, balance),
        data=windows,
        objective=with_auxiliary_loss(next_character_loss),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.1),
        schedule=warmup_then_cosine,
        clip_norm=1.0,
        metrics={"bits_per_character": bits_per_character},
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
    )


class MixtureGPT(CharGPT):
    """Characters (N, T) -> scores of the next character (N, T, V), through blocks with a mixture of experts."""

    def __init__(
        self,
        vocabulary: int,
        block: int,
        width: int,
        layers: int,
        heads: int,
        experts: int,
        top_k: int,
        balance: float,
    ) -> None:
        super().__init__(vocabulary, block, width, 0, heads)
        residual = 0.02 / math.sqrt(2 * layers)
        self.blocks = nn.ModuleList(
            MixtureBlock(width, heads, experts, top_k, balance, residual) for _ in range(layers)
        )  # fmt: skip


class MixtureBlock(nn.Module):
    """Attention to the characters before, then some of the experts for each; both added to their input."""

    def __init__(self, width: int, heads: int, experts: int, top_k: int, balance: float, residual: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        # Two experts a character, each half as wide as the network of charlm: the same work, on more weights.
        self.mixture = MoE(width, 2 * width, experts, top_k, balance=balance)
        nn.init.normal_(self.attention.qkv.weight, std=0.02)
        nn.init.normal_(self.attention.out.weight, std=residual)
        nn.init.normal_(self.mixture.w_in, std=0.02)
        nn.init.normal_(self.mixture.w_out, std=residual)

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.attention(self.norm1(x_NTD))
        added: Tensor = self.mixture(self.norm2(x_NTD))
        return x_NTD + added
