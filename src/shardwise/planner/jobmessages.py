"""Messages of one optimizer step of a job: what each axis of the layout sends, how often, and what it costs to prepare."""

import math

from shardwise.planner.constants import Constants
from shardwise.planner.joblinks import Links
from shardwise.planner.operations import copy_seconds
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan
from shardwise.spec.work import JobFacts

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

SPLIT_CALL_SECONDS = 4e-5
"""What DTensor does on the host for one operation on tensors that are split, views too (processor time of the main thread of
four models, 25 to 70 us, 2026-11-26)."""


def message_seconds(
    facts: JobFacts,
    machine: Machine,
    plan: Plan,
    links: Links,
    micro: int,
    passes: int,
    backward_seconds: float,
    constants: Constants,
) -> dict[str, float]:
    """Seconds that messages take beside everything else, by the part of the step they belong to.

    Args:
        micro: samples of one forward pass; `passes`: how many there are.
        backward_seconds: of one pass; on devices gradients hide behind the last one.
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
    sums = _sum_seconds(links, dense * _sent_share(plan), axes) / plan.local_steps
    sums += _sum_seconds(links, gradients * experts / layout.expert, ("data", "shard", "context"))
    if machine.measured is None:
        sums -= min(constants.gradient_overlap * sums, backward_seconds) * (1.0 - constants.overlap_cost)
    if sums and machine.measured is not None:
        sums += _bucket_seconds(facts, machine, plan, dense)
    found["gradients"] = sums
    if layout.tensor > 1:
        found["tensor"] = passes * sum(
            _tensor_calls(facts, index)
            * (links.seconds("all_reduce", micro * block.output_bytes, ("tensor",)) + MESSAGE_SECONDS)
            for index, block in enumerate(facts.model.blocks)
            if block.tensor_fraction > 0
        )
        if machine.measured is not None:
            found["tensor"] += SPLIT_CALL_SECONDS * _split_calls(facts, passes)
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
    if facts.norm_layers and layout.replicas * layout.context > 1:
        each = links.seconds("all_reduce", 1024, SUM_AXES) + MESSAGE_SECONDS
        found["norms"] = 2.0 * passes * facts.norm_layers * each
    return found


def _sum_seconds(links: Links, size_bytes: float, axes: tuple[str, ...]) -> float:
    """Gradients in buckets, one all-reduce each."""
    if size_bytes <= 0:
        return 0.0
    buckets = max(1, math.ceil(size_bytes / BUCKET_BYTES))
    return buckets * links.seconds("all_reduce", size_bytes / buckets, axes)


def _sent_share(plan: Plan) -> float:
    """Bytes sent over bytes of gradients; PowerSGD's depend on shapes that are not counted, and are left as they are."""
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
    messages = units * (2.0 * gather + scatter) * passes
    if links.machine.measured is None:
        return 0.5 * messages
    return messages + units * UNIT_SECONDS * passes


def _split_calls(facts: JobFacts, passes: int) -> float:
    """Operations of a step on tensors that the tensor axis splits: in the blocks where it does, and of the optimizer."""
    blocks = facts.model.blocks
    return sum(
        item.calls * (1 if item.phase == "optimizer" else passes)
        for item in facts.operations
        if item.phase == "optimizer" or blocks[item.block].tensor_fraction > 0
    )


def _tensor_calls(facts: JobFacts, index: int) -> float:
    """All-reduces of one block over both passes: one for each product with a weight, at most two (Megatron-LM, section 3)."""
    products = sum(i.calls for i in facts.operations if i.block == index and i.phase == "forward" and i.weighted)
    return float(min(2, max(1, products)))
