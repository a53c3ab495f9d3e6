"""The rule for `nn.MultiheadAttention`, and with it for torch's transformer layers.

The module hands all its weights to one function of torch, which checks their sizes; so the rule computes the same from the
same arguments, with tensors that are split by heads.

Shapes: L positions of the queries, S of the keys, N samples, E features, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardwise.parallel.tensor.part import SplitTensor, WholeNeeded, beside, like
from shardwise.parallel.tensor.products import attention
from shardwise.parallel.tensor.shapes import take

NAME = "multi_head_attention_forward"

_NAMES = (
    "query",
    "key",
    "value",
    "embed_dim_to_check",
    "num_heads",
    "in_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
    "add_zero_attn",
    "dropout_p",
    "out_proj_weight",
    "out_proj_bias",
    "training",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "use_separate_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "static_k",
    "static_v",
    "average_attn_weights",
    "is_causal",
)


def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name; those not given are absent."""
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


def obstacle(given: dict[str, Any], ranks: int) -> str | None:
    """Why a call cannot be split by heads; None where it can."""
    if given.get("use_separate_proj_weight") or not isinstance(given.get("in_proj_weight"), Tensor):
        return "attention with separate projection weights (kdim, vdim)"
    if given["num_heads"] % ranks:
        return f"{given['num_heads']} heads cannot be shared equally by {ranks} ranks"
    if given.get("need_weights", True):
        return "the attention weights are asked for: call it with need_weights=False if they are not used"
    if any(given.get(name) is not None for name in ("bias_k", "bias_v", "static_k", "static_v")):
        return "attention with bias_k, bias_v or static keys"
    if given.get("add_zero_attn"):
        return "attention with add_zero_attn"
    if given["query"].dim() != 3:
        return "attention without a batch dim"
    return None


def multi_head_attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`multi_head_attention_forward` of (L, N, E) queries by heads; returns (output, None)."""
    given = named(args, kwargs)
    weight = given["in_proj_weight"]
    if not isinstance(weight, SplitTensor) or any(isinstance(given[name], SplitTensor) for name in _NAMES[:3]):
        raise WholeNeeded("attention of split inputs")
    reason = obstacle(given, weight.ring.size)
    if reason is not None or weight.cut.outer % 3:
        raise WholeNeeded(reason or "fused projections that are not split in three blocks")
    width, heads = given["embed_dim_to_check"], given["num_heads"]
    bias = given.get("in_proj_bias")
    if bias is not None:
        bias = like(weight, beside(weight, bias, 0), weight.cut.at(0))
    q_LNE, k_SNE, v_SNE = (
        F.linear(
            given[name],
            take(weight, index * width, width),
            None if bias is None else take(bias, index * width, width),
        )
        for index, name in enumerate(("query", "key", "value"))
    )

    def by_heads(x_TNE: Tensor) -> Tensor:
        x_NHTE: Tensor = x_TNE.view(x_TNE.shape[0], x_TNE.shape[1], heads, -1).permute(1, 2, 0, 3)
        return x_NHTE

    causal = bool(given.get("is_causal"))
    mask = _mask(given, q_LNE.shape[1], heads)
    if causal and given.get("key_padding_mask") is None:
        mask = None
    dropout = given["dropout_p"] if given.get("training", True) else 0.0
    heads_NHTE = (by_heads(q_LNE), by_heads(k_SNE), by_heads(v_SNE))
    # Not by a call of torch's function: a context axis would see it before the pieces, and it must see the pieces.
    mixed_NHLE = attention(F.scaled_dot_product_attention, (*heads_NHTE, mask, dropout, causal and mask is None), {})
    mixed_LNE = mixed_NHLE.permute(2, 0, 1, 3).reshape(q_LNE.shape)
    return F.linear(mixed_LNE, given["out_proj_weight"], given.get("out_proj_bias")), None


def _mask(given: dict[str, Any], samples: int, heads: int) -> Tensor | None:
    """What is added to the scores, broadcastable to (N, H, L, S). True in the module's masks means: do not look."""
    attention, padding = given.get("attn_mask"), given.get("key_padding_mask")
    dtype = given["query"].dtype
    mask = None
    if attention is not None:
        mask = _additive(attention, dtype)
        mask = mask.unflatten(0, (samples, heads)) if mask.dim() == 3 else mask[None, None]
    if padding is not None:
        padded = _additive(padding, dtype)[:, None, None, :]
        mask = padded if mask is None else mask + padded
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
