"""Work of one transformer layer, of the embedding and of the output projection, on one rank and for one micro-batch."""

import math
from dataclasses import dataclass

from shardwise.planner.case import Case
from shardwise.planner.compute import Device, Work, attention_core, matmul_seconds, product, traffic
from shardwise.planner.constants import Constants

FUSED_KERNELS = 8.0
"""Element-wise kernels of one layer's forward pass when neighbours are fused."""

HOST_CALLS = 32.0
"""Calls of the host per layer and forward pass beside the products: views, casts, random states, biases, hooks."""

END_CALLS = 20.0
"""The same for the embedding and for the output projection with its loss."""

MOVES = (7.0, 9.0)
"""Times that a copy of a token is read or written on its way to its expert and back, forward and backward: gathered 2,
weighted 2, added up 3 (read, and the sum read and written); backward the gradient gathered 2, weighted 2, the weight's
gradient 2, added up 3 (Megatron-LM, `moe_utils.py`, `permute` and `unpermute`, whose fused kernels are off unless asked for)."""

FUSED_MOVES = (4.0, 5.0)
"""The same in fused kernels: gathered 2, and weighted and added up 2; backward 3 for the latter."""

MASK_MOVES = 4.0
"""The same around products with masks, in either pass: their results written and read by the experts, and the reverse."""

SORTS = 4.0
"""The same for a rank with several experts behind an exchange: what came is in the order of the ranks, and goes into that of the
experts and back (Megatron-LM, `moe_utils.py`, `sort_chunks_by_idxs`), in either pass."""

ROUTER_CALLS = 30.0
"""The same for a router and its exchange: scores, choice, counts, sorting, the copy of the counts to the host, views. Beside
them the host launches the products of every expert on the rank one after the other."""

GROUP_TOKENS = 8192
"""Tokens that choose their experts together at most, where masks move them: a sequence, as in MaxText, unless it is longer."""

EAGER_LOSS_BYTES = 12.0
"""Bytes a logit that the backward pass of an eager cross entropy moves beyond a fused one."""


@dataclass(frozen=True)
class LayerWork:
    """Forward and backward work of one layer, and what selective recomputation repeats.

    `inner_forward` and `inner_backward` are the parts of the feed-forward layer, with the router.
    """

    forward: Work
    backward: Work
    core_forward: Work
    inner_forward: Work
    inner_backward: Work


@dataclass(frozen=True)
class Works:
    """Device work for one micro-batch: of one layer, and forward and backward of both ends."""

    layer: LayerWork
    embedding: tuple[Work, Work]
    head: tuple[Work, Work]


def works_of(case: Case, device: Device, constants: Constants) -> Works:
    """What one rank computes for a micro-batch; recomputation, schedule and, by itself, sharding leave it as it is."""
    return Works(layer_work(case, device, constants), embedding_work(case, device), head_work(case, device))


def layer_work(case: Case, device: Device, constants: Constants) -> LayerWork:
    """One transformer layer. Tensor ranks split heads and feed-forward columns (Megatron-LM, arXiv:1909.08053, section 3)."""
    model, tensor = case.model, case.tensor
    tokens = case.tokens
    heads = math.ceil(model.heads / tensor)
    kv_heads = math.ceil(model.kv_heads / tensor)
    query = heads * model.head_dim
    joint = query + 2 * kv_heads * model.head_dim
    forward = backward = Work()
    for rows, columns, inner in ((tokens, joint, model.hidden), (tokens, model.hidden, query)):
        ahead, back = product(rows, columns, inner, device)
        forward, backward = forward + ahead, backward + back
    core_ahead, core_back = attention_core(case, device)
    ahead, back = _element_wise(case, device, constants)
    calls = 0.0 if case.compile else HOST_CALLS - FUSED_KERNELS
    forward, backward = forward + core_ahead + ahead, backward + core_back + back
    forward, backward = forward + Work(0.0, calls), backward + Work(0.0, 1.5 * calls)
    feed, feed_back = _feed_forward(case, device)
    if case.graphs:
        forward, backward, core_ahead = forward.graphed(), backward.graphed(), core_ahead.graphed()
        if not model.experts:
            feed, feed_back = feed.graphed(), feed_back.graphed()
    return LayerWork(forward + feed, backward + feed_back, core_ahead, feed, feed_back)


def _feed_forward(case: Case, device: Device) -> tuple[Work, Work]:
    model = case.model
    inner = math.ceil(model.ffn_hidden / case.tensor)
    wide = inner * (2 if model.gated_ffn else 1)
    tokens, groups = case.tokens, 1
    router = (Work(), Work())
    if model.experts:
        groups = math.ceil(model.experts / case.expert)
        tokens = math.ceil(case.tokens * model.experts_per_token / groups)
        ahead, back = FUSED_MOVES if case.compile or case.graphs else MOVES
        sorts = SORTS if case.expert > 1 and groups > 1 else 0.0
        if case.loops:
            ahead, back, sorts = MASK_MOVES, MASK_MOVES, 0.0
        copies = case.tokens * model.experts_per_token * model.hidden * device.element
        router = traffic((ahead + sorts) * copies, 8, device), traffic((back + sorts) * copies, 12, device)
        if case.loops:
            masks, masks_back = _masks(case, device)
            router = router[0] + masks, router[1] + masks_back
    # One kernel for all experts, or a product for each, whose last wave of tiles the next one does not fill (Megatron-LM,
    # `SequentialMLP`, the default; Transformer Engine, `GroupedLinear`: a product of cuBLAS for each).
    together, apart = (groups, 1.0) if case.compile else (1, float(groups))
    up, up_back = (work.times(apart) for work in product(tokens, wide, model.hidden, device, together))
    down, down_back = (work.times(apart) for work in product(tokens, model.hidden, inner, device, together))
    if model.experts and not case.compile:
        calls = 0.0 if case.graphs else ROUTER_CALLS
        router = router[0] + Work(0.0, calls), router[1] + Work(0.0, 1.5 * calls)
    return up + down + router[0], up_back + down_back + router[1]


def _masks(case: Case, device: Device) -> tuple[Work, Work]:
    """Tokens to their experts and back on a TPU: products with one-hot masks (GShard, arXiv:2006.16668, algorithm 2).

    A group of G tokens has k G places; the mask (k G x G) times the tokens (G x h) fills them, its transpose brings the results
    back, and the backward pass has a product for each and one more for the weights in the second mask. They stay in 16 bits.
    Software that sorts the tokens instead gathers rows, for which these parts have no fast path either.
    """
    group = min(GROUP_TOKENS, math.ceil(case.seq_len / case.context), case.tokens)
    places, groups = group * case.model.experts_per_token, math.ceil(case.tokens / group)
    once = matmul_seconds(places, case.model.hidden, group, device.unquantized(), groups)
    return Work(2.0 * once, 2), Work(3.0 * once, 3)


def _element_wise(case: Case, device: Device, constants: Constants) -> tuple[Work, Work]:
    """Norms, residual sums, activation, rotary positions, dropout: bytes of fused kernels, or of what runs instead of them.

    In units of one activation of width hidden, fused: two norms read and write 2 each, two residual sums 3 each; the part
    between the products is split over tensor ranks: activation 2 (gated: 3) of the inner width, rotary 2 of query and key.
    Not fused, layers of the GPT kind move `eager_traffic` times as much. Those of the Llama kind are counted, because eager
    PyTorch has no kernel for their parts: a norm (to fp32 3, square 4, mean 2, scale 4, back to 16 bits 3, weight 2), rotary
    positions (times cosine 2, negated half 1, joined 2, times sine 2, sum 3) and the gate (activation 2, product 3), as in
    Hugging Face transformers, `modeling_llama.py`. Half fused is the geometric mean.
    """
    model = case.model
    outside = case.tensor if case.sequence_parallel else 1
    visits = max(1, model.experts_per_token)

    def units(norm: float, gate: float, rotary: float) -> float:
        whole = (2.0 * norm + 6.0) * model.hidden / outside
        return whole + (gate * model.ffn_hidden * visits + rotary * (model.hidden + model.kv_hidden)) / case.tensor

    fused = units(2.0, 3.0, 2.0) if model.gated_ffn else units(2.0, 2.0, 0.0)
    eager = units(18.0, 5.0, 10.0) if model.gated_ffn else constants.eager_traffic * fused
    moved = case.tokens * device.element * fused * (eager / fused) ** (1.0 - case.fusion)
    return traffic(moved, FUSED_KERNELS, device), traffic(2.0 * moved, 2.0 * FUSED_KERNELS, device)


def head_work(case: Case, device: Device) -> tuple[Work, Work]:
    """Output projection and cross entropy over the logits. The projection is never cast to fewer than 16 bits.

    (arXiv:2509.25149, section 4.1: output head and embedding keep their precision; torchtitan and Transformer Engine the same.)
    Fused passes, bytes a logit: copy to fp32 6, maximum 4, sum of exponentials 4, log-softmax 8 forward; backward
    softmax less target 8, back to 2 bytes 6. Not compiled, the gradient of the loss is a tensor of its own: filled with
    zeros 4, and read twice 8 (PyTorch, nll_loss and log_softmax backward).
    """
    columns = vocab_columns(case)
    ahead, back = product(case.tokens, columns, case.model.hidden, device.unquantized())
    logits = float(case.tokens) * columns
    return ahead + traffic(22.0 * logits, END_CALLS, device), back + traffic(
        (14.0 + EAGER_LOSS_BYTES * (1.0 - case.fusion)) * logits, END_CALLS, device
    )


def embedding_work(case: Case, device: Device) -> tuple[Work, Work]:
    """Look-up of the rows, and the scattered sum of their gradients."""
    moved = 2.0 * case.tokens * case.model.hidden * device.element
    table = 4.0 * vocab_columns(case) * case.model.hidden
    return traffic(moved, END_CALLS, device), traffic(3.0 * moved + 2.0 * table, END_CALLS, device)


def vocab_columns(case: Case) -> int:
    """Rows of the embedding on one rank: tensor parallelism pads them to a multiple of 128, one rank keeps them as they are."""
    if case.tensor == 1:
        return case.model.vocab
    return 128 * math.ceil(case.model.vocab / (128 * case.tensor))
