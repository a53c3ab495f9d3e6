"""Activations that one layer keeps for its backward pass, without and with recomputation."""

import math
from dataclasses import replace

from shardwise.planner.case import NARROW, Case

SELECTIVE_KEEPS = 0.4
"""Share of a layer's activations that selective recomputation keeps where it is not the attention core alone."""

SELECTIVE_LEAST = 1.0 / 3.0
"""The same where two blocks of three are recomputed as a whole (foundation-model-stack fms-fsdp, `selective_checkpointing`)."""


def on_tpu(case: Case) -> bool:
    """Whether XLA is the compiler."""
    return case.machine.accelerator.name.startswith("tpu")


def layer_activation_bytes(case: Case) -> float:
    """Bytes one layer keeps per micro-batch without recomputation (Korthikanti et al. 2022, equations 1, 2 and 4).

    Outside the tensor-parallel parts, in units of h: inputs of two norms 2 each and of the two products behind them 2
    each, two dropout masks 1 each (only beside materialised attention); sequence parallelism divides them by t. Inside,
    divided by t: query, key, value, output of attention 2 each; gelu in and out 2 f each; gated: gate, up, their
    product 2 f each, and the activated gate 2 f unless compiled. Materialised attention: 5 bytes per score. Not compiled,
    RMS norms keep what their four small kernels need (3 each more), but for software that brings norms of one kernel.
    """
    model = case.model
    unit = case.tokens * (2.0 if case.precision == "fp32" else 1.0)
    outside = (10.0 if case.attention == "math" else 8.0) * model.hidden
    if model.gated_ffn and not case.eager_parallel:
        outside += 6.0 * (1.0 - case.fusion) * model.hidden
    visits = max(1, model.experts_per_token)
    if model.gated_ffn:
        inner = (8.0 - 2.0 * case.fusion) * model.ffn_hidden
    else:
        inner = 4.0 * model.ffn_hidden
    inside = 0.0
    if case.engine and case.precision in NARROW:
        outside -= 2.0 * model.hidden
        inner -= 1.0 * model.ffn_hidden
        inside = 1.0 * model.hidden
    inside += 4.0 * model.hidden + 4.0 * model.kv_hidden + inner * visits
    if model.experts:
        inside += 4.0 * model.hidden * visits * case.tensor
    kept = unit * (outside / (case.tensor if case.sequence_parallel else 1) + inside / case.tensor)
    return kept + score_bytes(case)


def score_bytes(case: Case) -> float:
    """Bytes of materialised scores of one layer: softmax output 2, dropout mask 1, dropout output 2 a score."""
    if case.attention == "flash":
        return 0.0
    heads = math.ceil(case.model.heads / case.tensor)
    return 5.0 * heads * case.tokens * case.seq_len * (2.0 if case.precision == "fp32" else 1.0)


def kept_bytes(case: Case) -> tuple[float, float]:
    """(kept per layer and micro-batch in flight, working set while one layer is computed again)."""
    whole = layer_activation_bytes(case)
    entry = 2.0 * case.tokens * case.model.hidden * (2.0 if case.precision == "fp32" else 1.0)
    if case.sequence_parallel:
        entry /= case.tensor
    if case.recompute == "full":
        return min(entry, whole), whole
    if case.recompute == "selective":
        if case.repeats_core:  # fused attention has nothing to save that its neighbours do not keep
            scores = score_bytes(case)
            return whole - scores, scores
        return SELECTIVE_KEEPS * whole, (1.0 - SELECTIVE_KEEPS) * whole
    return whole, 0.0


def spare_activations(case: Case, kept: float) -> float:
    """Bytes of `kept` of one layer that the row leaves open: whether kernels are fused, and what `selective` keeps.

    On TPUs `none` is the policy that keeps most, the outputs of all products (MaxText, remat policy `minimal`).
    """
    least = kept
    if case.recompute == "none" and on_tpu(case):
        model = case.model
        wide = (4.0 if model.gated_ffn else 2.0) * model.ffn_hidden * max(1, model.experts_per_token)
        outside = 4.0 * model.hidden / (case.tensor if case.sequence_parallel else 1)
        products = case.tokens * (outside + (4.0 * model.hidden + 4.0 * model.kv_hidden + wide) / case.tensor)
        return max(0.0, kept - products)
    if case.compile is None and not case.engine and not case.classic:
        least = kept_bytes(replace(case, compile=True))[0]
    if case.recompute == "selective" and not case.repeats_core:
        least *= SELECTIVE_LEAST / SELECTIVE_KEEPS
    return kept - least


def spare_of_experts(case: Case) -> float:
    """Bytes of one layer that mixtures of experts need not keep.

    The output of an expert, where the router's weight is applied before its last product (Megatron-Core,
    `weighted_bias_swiglu_impl`). In the engine's software also the copies of tokens that other tensor ranks have, where experts
    are whole on their rank and tokens come split along the sequence (expert_tensor_parallel_size 1, as in the recipes of
    Megatron Bridge). Beside fused attention `selective` has no core to repeat; what that software offers instead are norms and
    the activation between the products (Megatron-Core, `recompute_modules`: layernorm, moe_act).
    """
    if not case.model.experts or case.recompute == "full" or on_tpu(case):
        return 0.0
    model = case.model
    visits, split = model.experts_per_token, case.tensor if case.sequence_parallel else 1
    copies = 2.0 * model.hidden * visits  # of the input; the output takes as much
    spare = copies
    if case.engine:
        spare += copies * (1.0 - 1.0 / split)
        if case.recompute == "selective" and case.attention == "flash":
            spare += 4.0 * model.hidden / split + 2.0 * model.ffn_hidden * visits / case.tensor
    return case.tokens * spare
