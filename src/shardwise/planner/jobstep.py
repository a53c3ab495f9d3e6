"""One optimizer step of a job under a plan: seconds by part, and bytes of one rank by part.

Letters: B samples of a global batch, b those of one rank, m those of one forward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.joblinks import Links
from shardwise.planner.memory import CONTEXT_BYTES, SLACK
from shardwise.planner.operations import PhaseSeconds, Sharing, correction, phase_seconds
from shardwise.planner.schedule import Timeline, rank_of, simulate, stages_per_rank
from shardwise.planner.step import UNCERTAIN
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

STEP_SECONDS = 1.5e-4
"""The loop around a step: batch, clock, ledger (measured on one core, 2026-11-26)."""

LIBRARY_BYTES = {"data": 70, "context": 75, "shard": 80, "tensor": 80, "pipeline": 75, "expert": 110}
"""MiB that a worker holds more towards the end of a run, because it loads distributed checkpoints, FSDP2 or DTensor, by axis;
one worker holds as much as with data (measured resident memory, 2026-11-26)."""

INLINE_BYTES = 25 * 2**20
"""What one worker holds more, because it is the process of the command itself (measured 2026-11-26)."""

RING_BYTES = 8 * 2**20
"""Shared memory of one rank, of which a message touches what it needs (dist/exchange.py)."""

PART_NAMES = {
    "compute": "computing",
    "optimizer": "updating the weights",
    "data": "reading data",
    "gradients": "summing gradients",
    "shards": "gathering and scattering shards",
    "tensor": "exchanging activations between tensor ranks",
    "context": "passing keys and values around",
    "expert": "sending tokens to experts",
    "norms": "statistics of the global batch",
    "bubble": "waiting in the pipeline",
    "loop": "the loop around the step",
}
"""Part of a step -> what the workers do meanwhile."""

COMMUNICATION = ("gradients", "shards", "tensor", "context", "expert", "norms")


@dataclass(frozen=True)
class JobEstimate:
    """Predicted step of a job under a plan.

    Attributes:
        seconds: by part; they sum to the step.
        memory: bytes of the fullest rank by part.
        room_bytes: what a rank may use.
        measured: compute was corrected by a real step seen on this machine.
    """

    seconds: dict[str, float]
    memory: dict[str, float]
    room_bytes: float
    measured: bool

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> float:
        """Bytes of the fullest rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has the room."""
        return self.memory_bytes <= self.room_bytes

    @property
    def certain(self) -> bool:
        """Whether that is so with a margin to spare."""
        return not self.room_bytes / UNCERTAIN < self.memory_bytes <= self.room_bytes * UNCERTAIN

    @property
    def confidence(self) -> str:
        """How sure time and memory are, in words."""
        time = "time within 15 %" if self.measured else "time within 40 %"
        return f"{time}, {'certain' if self.certain else 'not certain'} to {'fit' if self.fits else 'be too large'}"

    def share(self, names: Sequence[str]) -> float:
        """Part of the step that goes to these parts."""
        return sum(self.seconds.get(name, 0.0) for name in names) / self.step_seconds


def estimate_job(
    facts: JobFacts, machine: Machine, plan: Plan, constants: Constants = DEFAULT, *, copies: int = 1
) -> JobEstimate:
    """Predict one optimizer step of `facts` under `plan` on `machine`; the plan's threads must be settled on CPU.

    Args:
        copies: such trainings that compute at once on the measured machine, and share its cores, caches and memory. Their
            messages are priced as if they had the links for themselves.
    """
    layout = plan.layout
    samples = math.ceil(facts.batch_size / layout.replicas)
    micro = min(samples, plan.micro_batch or samples)
    if layout.pipeline > 1 and plan.micro_batch is None:
        micro = max(1, math.ceil(samples / (2 * layout.pipeline)))
    passes = math.ceil(samples / micro)
    local = min(layout.workers, machine.gpus_per_node) if machine.measured is None else layout.workers
    sharing = Sharing(workers=local * copies, threads=plan.threads or 1)
    links = Links(machine, layout, constants)
    split = tensor_parts(facts, layout.tensor)
    known = correction(facts, machine, micro)
    stages = stages_of(facts, plan)
    timeline, work = _pipeline(facts, machine, plan, sharing, links, micro, passes, split, stages, known, constants)
    seconds = dict.fromkeys(PART_NAMES, 0.0)
    seconds["compute"] = timeline.busiest_seconds
    seconds["bubble"] = timeline.seconds - timeline.busiest_seconds
    seconds["optimizer"] = work.optimizer
    seconds["data"] = samples * facts.data_seconds
    seconds["loop"] = STEP_SECONDS if machine.measured is not None else constants.step_seconds
    seconds |= _messages(facts, machine, plan, links, micro, passes, work.backward, constants)
    memory = _memory(facts, machine, plan, micro, passes, split, stages, timeline)
    return JobEstimate(seconds, memory, room_bytes(machine, plan) / copies, known != 1.0)


def room_bytes(machine: Machine, plan: Plan) -> float:
    """What one rank may use: a device's memory, or its share of what the ranks of one machine have together."""
    if machine.measured is None:
        return machine.accelerator.memory_bytes.value
    return min(
        machine.accelerator.memory_bytes.value * machine.gpus_per_node / plan.layout.workers,
        machine.measured.memory_bytes / plan.layout.workers,
    )


def tensor_parts(facts: JobFacts, degree: int) -> dict[int, float]:
    """Block -> the part of its work that one tensor rank does: what can be split is, the rest is done by all."""
    if degree == 1:
        return {}
    return {
        index: block.tensor_fraction / degree + 1.0 - block.tensor_fraction
        for index, block in enumerate(facts.model.blocks)
    }


def stage_blocks(facts: JobFacts, stages: int) -> list[list[int]]:
    """Blocks of every pipeline stage: consecutive, the busiest stage with the least work (by FLOPs and bytes moved)."""
    blocks = facts.model.blocks
    work = [block.forward_flops + block.forward_bytes for block in blocks]
    stages = min(stages, len(blocks))
    low, high = max(work, default=0.0), sum(work)
    for _ in range(50):
        middle = (low + high) / 2
        if len(_pack(work, middle)) <= stages:
            high = middle
        else:
            low = middle
    packed = _pack(work, high)
    while len(packed) < stages:  # a stage of one block cannot be cut: take the largest of the others
        index = max((i for i, part in enumerate(packed) if len(part) > 1), key=lambda i: len(packed[i]))
        part = packed[index]
        packed[index : index + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return packed


def stages_of(facts: JobFacts, plan: Plan) -> list[list[int]]:
    """Blocks of every stage that the plan's schedule asks for; fewer where the model has fewer blocks."""
    named = (len(plan.cuts) + 1) // plan.layout.pipeline if plan.cuts else 2
    return stage_blocks(facts, plan.layout.pipeline * stages_per_rank(plan.schedule, named))


def _placed(plan: Plan, stages: int) -> tuple[str, int]:
    """The schedule and the number of ranks that so many stages are priced with."""
    least = plan.layout.pipeline * (1 if stages_per_rank(plan.schedule, 2) == 1 else 2)
    if stages < least or stages % plan.layout.pipeline:
        return "1f1b", stages  # the model has too few blocks to say how it would be cut
    return plan.schedule, plan.layout.pipeline


def _by_rank(plan: Plan, values: Sequence[float]) -> list[float]:
    """Sums over the stages of every rank."""
    schedule, ranks = _placed(plan, len(values))
    found = [0.0] * ranks
    for stage, value in enumerate(values):
        found[rank_of(stage, ranks, schedule)] += value
    return found


def _pack(work: Sequence[float], most: float) -> list[list[int]]:
    found: list[list[int]] = [[]]
    filled = 0.0
    for index, each in enumerate(work):
        if found[-1] and filled + each > most:
            found.append([])
            filled = 0.0
        found[-1].append(index)
        filled += each
    return found


def _pipeline(
    facts: JobFacts,
    machine: Machine,
    plan: Plan,
    sharing: Sharing,
    links: Links,
    micro: int,
    passes: int,
    split: dict[int, float],
    stages: list[list[int]],
    known: float,
    constants: Constants,
) -> tuple[Timeline, PhaseSeconds]:
    """Forward and backward passes of all micro-batches, and the work of the busiest stage with its optimizer step."""
    layout = plan.layout
    works = []
    for blocks in stages:
        mine = set(blocks)
        operations = [item for item in facts.operations if item.block in mine or len(stages) == 1]
        found = phase_seconds(
            operations,
            micro,
            machine,
            sharing,
            split=split,
            fraction=1.0 / layout.context,
            owned=_owned(facts, plan),
            together=facts.message_parts,
            constants=constants,
        )
        works.append(PhaseSeconds(found.forward * known, found.backward * known, found.optimizer * known))
    if len(stages) == 1:
        busy = passes * works[0].passes
        return Timeline(busy, busy, (1,)), works[0]
    schedule, ranks = _placed(plan, len(stages))
    forward, backward = ([getattr(one, name) for one in works] for name in ("forward", "backward"))
    whole = sum(one.optimizer for one in works) / ranks
    crossing = max(facts.model.blocks[blocks[-1]].output_bytes for blocks in stages[:-1])
    hop = links.seconds("send", micro * crossing, ("pipeline",)) + 2 * MESSAGE_SECONDS
    timeline = simulate(schedule, passes, tuple(forward), tuple(backward), hop, ranks)
    return timeline, PhaseSeconds(max(_by_rank(plan, forward)), max(_by_rank(plan, backward)), whole)


def _messages(
    facts: JobFacts,
    machine: Machine,
    plan: Plan,
    links: Links,
    micro: int,
    passes: int,
    backward_seconds: float,
    constants: Constants,
) -> dict[str, float]:
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
    sums = _sum_seconds(links, dense, axes) + _sum_seconds(
        links, gradients * experts / layout.expert, ("data", "shard", "context")
    )
    if machine.measured is None:
        sums -= min(constants.gradient_overlap * sums, backward_seconds) * (1.0 - constants.overlap_cost)
    found["gradients"] = sums
    if layout.tensor > 1:
        found["tensor"] = passes * sum(
            _tensor_calls(facts, index)
            * (links.seconds("all_reduce", micro * block.output_bytes, ("tensor",)) + MESSAGE_SECONDS)
            for index, block in enumerate(facts.model.blocks)
            if block.tensor_fraction > 0
        )
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


def _tensor_calls(facts: JobFacts, index: int) -> float:
    """All-reduces of one block over both passes: one for each product with a weight, at most two (Megatron-LM, section 3)."""
    products = sum(i.calls for i in facts.operations if i.block == index and i.phase == "forward" and i.weighted)
    return float(min(2, max(1, products)))


def _owned(facts: JobFacts, plan: Plan) -> float:
    """The part of the parameters of a stage that one rank updates."""
    experts = facts.expert_bytes / max(1.0, facts.parameter_bytes)
    return (1.0 - experts + experts / plan.layout.expert) / plan.layout.shard


def _memory(
    facts: JobFacts,
    machine: Machine,
    plan: Plan,
    micro: int,
    passes: int,
    split: dict[int, float],
    stages: list[list[int]],
    timeline: Timeline,
) -> dict[str, float]:
    """Bytes of the fullest rank. Gradients are part of the counted peak; what is split is taken out of it again."""
    layout = plan.layout
    count = max(1, facts.model.parameters)
    parts = [sum(facts.model.blocks[i].parameters * split.get(i, 1.0) for i in blocks) / count for blocks in stages]
    held = max(_by_rank(plan, parts)) if facts.model.parameters else 1.0
    experts = facts.expert_bytes / max(1.0, facts.parameter_bytes) if layout.expert > 1 else 0.0
    held *= 1.0 - experts + experts / layout.expert
    parameters = facts.parameter_bytes * held / layout.shard
    gradients = facts.gradient_bytes * held
    activations = max(0.0, facts.peak_fixed_bytes + micro * facts.peak_sample_bytes - facts.gradient_bytes)
    activations /= layout.context
    if layout.tensor > 1:
        kept = sum(block.saved_bytes for block in facts.model.blocks) or 1.0
        activations *= sum(b.saved_bytes * split.get(i, 1.0) for i, b in enumerate(facts.model.blocks)) / kept
    if len(stages) > 1:
        activations *= max(timeline.in_flight) / len(stages)
    found = {
        "parameters": parameters,
        "optimizer": facts.optimizer_bytes * held / layout.shard,
        "gradients": gradients / layout.shard if layout.shard > 1 else gradients,
        "activations": activations,
    }
    summed = layout.data * layout.context * layout.expert
    if layout.shard > 1:
        unit = facts.gradient_bytes * held / (facts.shard_units + 1)
        found["gathered"] = 3.0 * unit
    elif summed > 1:
        found["buckets"] = gradients
    if machine.measured is not None:
        found["process"] = facts.base_bytes or machine.measured.worker_bytes
        loaded = [size for axis, size in LIBRARY_BYTES.items() if layout.degrees[axis] > 1]
        found["libraries"] = max(loaded, default=LIBRARY_BYTES["data"]) * 2.0**20
        if layout.workers == 1:
            found["libraries"] += INLINE_BYTES
        if layout.workers > 1:
            message = min(RING_BYTES, 2.0 * gradients)
            found["shared memory"] = layout.workers * message if summed > 1 else 0.0
    else:
        found["slack"] = SLACK * sum(found.values())
        found["context"] = CONTEXT_BYTES
    return found
