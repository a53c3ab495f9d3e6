"""Pipeline, context and expert parallelism of the small GPT of parallel.py, written by hand with torch's pieces.

| kind | by hand |
|---|---|
| pipeline | two modules as `PipelineStage`s under `Schedule1F1B` |
| context | keys and values by `all_gather_tensor_autograd`, an attention mask for the rank's rows, `DistributedDataParallel` |
| expert | tokens by `all_to_all_single_autograd`, one product an expert, `DistributedDataParallel` of all other parameters |

Shapes: B samples, T tokens of a sequence, L of a rank, D features, H heads, E experts, K of them for a token, R ranks, S rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterator[tuple[Tensor, Tensor]]


class First(nn.Module):
    """The embeddings and the first blocks."""

    def __init__(self, gpt: Any, cut: int) -> None:
        super().__init__()
        self.tokens, self.places, self.blocks = gpt.tokens, gpt.places, gpt.blocks[:cut]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.places(torch.arange(tokens_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return torch.as_tensor(x_BTD)


class Last(nn.Module):
    """The other blocks and the head."""

    def __init__(self, gpt: Any, cut: int) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = gpt.blocks[cut:], gpt.norm, gpt.head

    def forward(self, x_BTD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return torch.as_tensor(self.head(self.norm(x_BTD)))


def stage_of(gpt: Any, cut: int) -> nn.Module:
    """This rank's half of the model."""
    return First(gpt, cut) if c10d.get_rank() == 0 else Last(gpt, cut)


def pipeline_passes(stage: nn.Module, loss: Loss, micro_batches: int, stream: Batches) -> Callable[[], None]:
    """All forward and backward passes of a step."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank = c10d.get_rank()
    made = PipelineStage(stage, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(made, micro_batches, loss_fn=loss)

    def passes() -> None:
        inputs, targets = next(stream)
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=[], return_outputs=False)

    return passes


def split_sequences(gpt: Any, length: int) -> Tensor:
    """Let the model work on this rank's tokens, an early and a late quarter; returns their positions (L,)."""
    rank, ranks = c10d.get_rank(), c10d.get_world_size()
    chunks = torch.arange(length).chunk(2 * ranks)
    own_L = torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])
    order_T = torch.cat([torch.cat([chunks[r], chunks[2 * ranks - 1 - r]]) for r in range(ranks)]).argsort()
    mask_LT = own_L[:, None] >= torch.arange(length)[None]
    group = cast("c10d.ProcessGroup", c10d.group.WORLD)

    def attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        both = torch.cat([k_BHLD, v_BHLD], -1).permute(2, 0, 1, 3).contiguous()
        whole = all_gather_tensor_autograd(both, 0, group).index_select(0, order_T).permute(1, 2, 0, 3)
        k_BHTD, v_BHTD = whole.chunk(2, -1)
        return F.scaled_dot_product_attention(q_BHLD, k_BHTD, v_BHTD, attn_mask=mask_LT)

    for block in gpt.blocks:
        block.attend = attend
    gpt.positions = own_L
    return own_L


def own_tokens(stream: Batches, own_L: Tensor) -> Batches:
    """This rank's tokens of every batch."""
    for inputs, targets in stream:
        yield inputs[:, own_L], targets[:, own_L]


def deal_experts(gpt: Any) -> list[nn.Parameter]:
    """Keep this rank's experts, and send tokens to those of others; returns the parameters of the experts."""
    rank, ranks = c10d.get_rank(), c10d.get_world_size()
    kept: list[nn.Parameter] = []
    names: list[str] = []
    for number, block in enumerate(gpt.blocks):
        layer = block.mixture
        for name in ("w_in", "w_out"):
            own = nn.Parameter(getattr(layer, name).detach().chunk(ranks)[rank].clone())
            setattr(layer, name, own)
            kept.append(own)
            names.append(f"blocks.{number}.mixture.{name}")
        layer.forward = functools.partial(mixture, layer)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(gpt, names)
    return kept


def mixture(layer: Any, x_BTD: Tensor) -> Tensor:
    """Tokens to the ranks of their experts and back."""
    rank, ranks = c10d.get_rank(), c10d.get_world_size()
    group = cast("c10d.ProcessGroup", c10d.group.WORLD)
    x_SD = x_BTD.flatten(0, 1)
    weight_SK, expert_SK = layer.router(x_SD).softmax(-1).topk(layer.top_k)
    weight_SK = weight_SK / weight_SK.sum(-1, keepdim=True)
    chosen = expert_SK.flatten()
    order = chosen.argsort(stable=True)
    count_E = chosen.bincount(minlength=layer.experts)
    count_RE = count_E.new_empty((ranks, layer.experts))
    c10d.all_gather_into_tensor(count_RE.view(-1), count_E)
    each = layer.experts // ranks
    here_RE = count_RE[:, rank * each : (rank + 1) * each]
    send, receive = count_E.view(ranks, each).sum(1).tolist(), here_RE.sum(1).tolist()
    arrived = all_to_all_single_autograd(x_SD[order // layer.top_k], receive, send, group)
    place = torch.arange(each).repeat(ranks).repeat_interleave(here_RE.flatten()).argsort(stable=True)
    groups = arrived[place].split(here_RE.sum(0).tolist())
    pairs = zip(groups, layer.w_in.unbind(), layer.w_out.unbind(), strict=True)
    answers = torch.cat([F.gelu(rows @ w_in) @ w_out for rows, w_in, w_out in pairs])
    back = all_to_all_single_autograd(answers[place.argsort()], send, receive, group)
    y = torch.zeros(len(chosen), x_SD.shape[1]).index_copy(0, order, back)
    return torch.as_tensor((y.view(-1, layer.top_k, x_SD.shape[1]) * weight_SK.unsqueeze(-1)).sum(1).view_as(x_BTD))
