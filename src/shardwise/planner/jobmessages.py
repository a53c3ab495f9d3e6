"""Messages of one optimizer step of a job: what each axis of the layout sends, how often, and what it costs to prepare."""

import math
from collections import Counter
from dataclasses import replace

from shardwise.planner.constants import Constants
from shardwise.planner.joblinks import Links
from shardwise.planner.operations import Sharing, copy_seconds, phase_seconds
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan
from shardwise.spec.work import JobFacts, OperationFacts

SUM_AXES = ("data", "shard", "context", "expert")
"""Axes over which gradients are summed."""

BUCKET_BYTES = 25 * 2**20
"""Gradients that travel together (parallel/data.py)."""

UNIT_SECONDS = 6e-4
"""What FSDP2 does on the host for one unit and step, over all its hooks (measured on one core, 2026-11-26)."""

MESSAGE_SECONDS = 3e-5
"""What Python does around one collective inside of a layer (measured on one core, 2026-11-26)."""

BUCKET_SECONDS, PART_SECONDS = 1e-5, 1.5e-6
"""What Python does to a bucket, and to each gradient on its way into it and out of it (measured on one core, 2026-11-26)."""

SPLIT_CALL_SECONDS = 5.3e-5
"""What the rules for split tensors do on the host for one function of the forward pass, its gradient included; the backward pass
itself runs below them. Median of seven models in benchmarks/results/regret.json, 40 to 107 us, from what compute, messages and
the two figures below leave of their step."""

SPLIT_PARAMETER_SECONDS = 3.9e-5
"""DTensor.to_local of a parameter and the way back of its gradient (one core, torch 2.13, 2026-11-26)."""

SPLIT_UPDATE_SECONDS = 1.2e-5
"""What DTensor does for one operation of the optimizer: 6 us with SGD, 18 with Adam (same date)."""


def message_seconds(
    facts: JobFacts,
    machine: Machine,
    plan: Plan,
    links: Links,
    micro: int,
    passes: int,
    backward_seconds: float,
    sharing: Sharing,
    constants: Constants,
) -> dict[str, float]:
    """Seconds that messages take beside everything else, by the part of the step they belong to.

    Args:
        micro: samples of one forward pass; `passes`: how many there are.
        backward_seconds: of one pass; on devices gradients hide behind the last one.
        sharing: how a worker shares its machine.
    """
    layout = plan.layout
    found: dict[str, float] = {}
    held = 1.0 / (layout.pipeline * layout.tensor)
    experts = facts.expert_bytes / max(1.0, facts.parameter_bytes) if layout.expert > 1 else 0.0
    gradients = facts.gradient_bytes * held
    dense = gradients * (1.0 - experts)
    if layout.shard > 1:
        found["shards"] = _shard_seconds(facts, plan, links, dense, passes)
        axes: tuple[str, ...] = ("data", "context", "expert")
        dense /= layout.shard
    else:
        axes = ("data", "shard", "context", "expert")
    if plan.local_steps > 1:  # what is averaged instead of summed, and how often (parallel/local.py)
        dense = facts.parameter_bytes + facts.optimizer_bytes
    if plan.compression == "powersgd" and facts.gradients:
        found["gradients"] = _low_rank_seconds(facts, machine, plan, links, sharing, constants)
        return found | _norm_seconds(facts, links, passes)
    sums = _sum_seconds(links, dense * _sent_share(plan), axes) / plan.local_steps
    sums += _sum_seconds(links, gradients * experts / layout.expert, ("data", "shard", "context"))
    if machine.measured is None:
        sums -= min(constants.gradient_overlap * sums, backward_seconds) * (1.0 - constants.overlap_cost)
    if sums and machine.measured is not None:
        sums += _bucket_seconds(facts, machine, plan, dense)
    found["gradients"] = sums
    if layout.tensor > 1:
        products: Counter[int] = Counter()
        for item in facts.operations:
            if item.phase == "forward" and item.weighted:
                products[item.block] += item.calls
        found["tensor"] = passes * sum(
            _tensor_calls(products[index])
            * (links.seconds("all_reduce", micro * block.output_bytes, ("tensor",)) + MESSAGE_SECONDS)
            for index, block in enumerate(facts.model.blocks)
            if block.tensor_fraction > 0
        )
        if machine.measured is not None:
            found["tensor"] += _split_seconds(facts, passes)
    if layout.context > 1:
        layers = sum(i.calls for i in facts.operations if i.kind == "attention")
        if layers:
            size = micro * facts.attention_bytes / layers
            each = links.seconds("all_gather", size, ("context",)) + MESSAGE_SECONDS
            found["context"] = 3.0 * passes * layers * each  # forward once, keys and values and their gradients back
    if facts.expert_layers and layout.expert > 1:
        size = micro * facts.expert_token_bytes / facts.expert_layers
        each = links.seconds("all_to_all", size, ("expert",)) + MESSAGE_SECONDS
        found["expert"] = 4.0 * passes * facts.expert_layers * each
    return found | _norm_seconds(facts, links, passes)


def _norm_seconds(facts: JobFacts, links: Links, passes: int) -> dict[str, float]:
    """Statistics of the global batch: a message for each layer and direction."""
    if not facts.norm_layers or links.layout.replicas * links.layout.context == 1:
        return {}
    each = links.seconds("all_reduce", 1024, SUM_AXES) + MESSAGE_SECONDS
    return {"norms": 2.0 * passes * facts.norm_layers * each}


def _sum_seconds(links: Links, size_bytes: float, axes: tuple[str, ...]) -> float:
    """Gradients in buckets, one all-reduce each."""
    if size_bytes <= 0:
        return 0.0
    buckets = max(1, math.ceil(size_bytes / BUCKET_BYTES))
    return buckets * links.seconds("all_reduce", size_bytes / buckets, axes)


def _sent_share(plan: Plan) -> float:
    """Bytes sent over bytes of gradients."""
    return 0.5 if plan.compression in ("fp16", "bf16") else 1.0


def _bucket_seconds(facts: JobFacts, machine: Machine, plan: Plan, size_bytes: float) -> float:
    """Gradients are copied into buckets, and handed out again one by one."""
    copies = 1 if plan.compression == "none" else 3
    host = BUCKET_SECONDS * math.ceil(size_bytes / BUCKET_BYTES) + PART_SECONDS * facts.message_parts
    return (copies * copy_seconds(machine, 2.0 * size_bytes, plan) + host) / plan.local_steps


def _shard_seconds(facts: JobFacts, plan: Plan, links: Links, held_bytes: float, passes: int) -> float:
    """Gathers ahead of the forward and of the backward pass, and the scatter of the gradients, unit by unit.

    Nothing hides them on a CPU, whose cores gloo works on; on devices half of them does (FSDP2 gathers one unit ahead).
    """
    units = facts.shard_units + 1
    each = held_bytes / units
    gather = links.seconds("all_gather", each, ("shard",))
    scatter = links.seconds("reduce_scatter", each, ("shard",))
    gathers = 1.0 if plan.zero_stage == 2 else 2.0
    messages = units * (gathers * gather + scatter) * passes
    if links.machine.measured is None:
        return 0.5 * messages
    return messages + units * UNIT_SECONDS * passes


def _split_seconds(facts: JobFacts, passes: int) -> float:
    """What the host does for split tensors: in the forward pass of the blocks that are split, to hand out parameters, and in the
    optimizer."""
    blocks = facts.model.blocks
    ahead = sum(i.calls for i in facts.operations if i.phase == "forward" and blocks[i.block].tensor_fraction > 0)
    if not any(block.tensor_fraction > 0 for block in blocks):
        return 0.0
    updates = sum(i.calls for i in facts.operations if i.phase == "optimizer")
    each_pass = SPLIT_CALL_SECONDS * ahead + SPLIT_PARAMETER_SECONDS * facts.message_parts
    return passes * each_pass + SPLIT_UPDATE_SECONDS * updates


def _tensor_calls(products: int) -> float:
    """All-reduces of one block over both passes: one for each product with a weight, at most two (Megatron-LM, section 3)."""
    return float(min(2, max(1, products)))


def low_rank_bytes(facts: JobFacts, rank: int) -> tuple[float, float, float]:
    """What PowerSGD sends in a step: exact gradients, left factors with a flag each, and right factors."""
    ranks = [(item, item.factor_rank(rank)) for item in facts.gradients]
    exact = sum(item.count * item.bytes for item, least in ranks if not least)
    left = sum(item.count * (item.rows * least + 1) * item.value_bytes for item, least in ranks if least)
    right = sum(item.count * item.columns * least * item.value_bytes for item, least in ranks if least)
    return float(exact), float(left), float(right)


def _low_rank_seconds(
    facts: JobFacts, machine: Machine, plan: Plan, links: Links, sharing: Sharing, constants: Constants
) -> float:
    """PowerSGD: what factors would not make smaller is summed as it is, the rest in two rounds, of all left and all right factors
    (parallel/compress.py), and arithmetic on every matrix before, between and after them."""
    exact, left, right = low_rank_bytes(facts, plan.compression_rank)
    seconds = _sum_seconds(links, exact, ("data",))
    seconds += links.seconds("all_reduce", left, ("data",)) + links.seconds("all_reduce", right, ("data",))
    if machine.measured is not None and exact:
        seconds += _bucket_seconds(facts, machine, replace(plan, compression="none"), exact)

    def takes(kind: str, calls: int, size_bytes: float, flops: float = 0.0) -> float:
        one = OperationFacts(
            block=0,
            phase="backward",
            kind=kind,
            precision="fp32",
            calls=calls,
            fixed_flops=flops,
            sample_flops=0.0,
            fixed_bytes=size_bytes,
            sample_bytes=0.0,
        )
        return phase_seconds((one,), 1, machine, sharing, constants=constants).backward

    for item in facts.gradients:
        rank = item.factor_rank(plan.compression_rank)
        if rank:
            flops, factors = 2.0 * item.rows * item.columns * rank, (item.rows + item.columns) * rank * item.value_bytes
            # M Q, M^T P, P Q^T twice: thin products, which wait for memory as often as for the multiplier
            product = max(takes("matmul", 1, item.bytes, flops), takes("copy", 1, item.bytes))
            whole = takes("copy", 1, 3.0 * item.bytes)  # scaled and added to what was left out before
            small = takes("matmul", 1, 0.0, 4.0 * item.rows * rank * rank) + takes("copy", 5, factors)
            seconds += item.count * (4.0 * product + whole + small)
    return seconds
