"""One optimizer step of a job under a plan: seconds by part, and bytes of one rank by part.

Letters: B samples of a global batch, b those of one rank, m those of one forward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwise.planner.closedform import Timeline
from shardwise.planner.confidence import counted_words
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.joblinks import Links
from shardwise.planner.jobmessages import MESSAGE_SECONDS, message_seconds
from shardwise.planner.jobstages import Stages, stages_of
from shardwise.planner.memory import CONTEXT_BYTES, SLACK
from shardwise.planner.operations import (
    NO_SIDES,
    PhaseSeconds,
    Sharing,
    Sides,
    block_seconds,
    correction,
    divided_norms,
    gradient_sums,
    joined,
    turns,
)
from shardwise.planner.schedule import simulate
from shardwise.planner.step import UNCERTAIN
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan
from shardwise.spec.schedule import rank_of
from shardwise.spec.work import JobFacts

STEP_SECONDS = 1.5e-4
"""The loop around a step: batch, clock, ledger (measured on one core, 2026-11-26)."""

PASS_SECONDS = 7e-5
"""What Python does around one pass of a stage, messages packed and unpacked with it (thread time of passes of a tiny model, less
that of serial passes and of the messages' own calls; one core, 2026-11-26)."""

LIBRARY_BYTES = {"data": 70, "context": 75, "shard": 80, "tensor": 80, "pipeline": 75, "expert": 110}
"""MiB that a worker holds more towards the end of a run, because it loads distributed checkpoints, FSDP2 or DTensor, by axis;
one worker holds as much as with data (measured resident memory, 2026-11-26)."""

INLINE_BYTES = 46 * 2**20
"""What one worker holds more, because it is the process of the command itself (measured 2026-11-26)."""

REUSED_BYTES = 38 * 2**20
"""Of the libraries that are loaded towards the end, what finds room in memory that the steps have freed and the allocator kept;
the rest are mapped files and Python's own arenas (fitted to short trainings of eleven models, 2026-11-26)."""

RING_BYTES = 8 * 2**20
"""Shared memory of one rank, of which a message touches what it needs (dist/exchange.py)."""

BUCKET_COPIES = {"fp16": 1.5, "bf16": 1.5, "powersgd": 2.0}
"""Copies of the gradients that summing them takes, by compression: buckets and their 16 bits; sums and what was left out."""

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
        kind: of the plan, a key of `confidence.COUNTED`.
    """

    seconds: dict[str, float]
    memory: dict[str, float]
    room_bytes: float
    measured: bool
    kind: str = "other"

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
        time = counted_words(self.kind) if self.measured else "time not checked on such a machine"
        return f"{time}, {'certain' if self.certain else 'not certain'} to {'fit' if self.fits else 'be too large'}"

    def share(self, names: Sequence[str]) -> float:
        """Part of the step that goes to these parts."""
        return sum(self.seconds.get(name, 0.0) for name in names) / self.step_seconds


@dataclass(frozen=True)
class JobMemo:
    """What is the same for many plans of one job on one machine: found once, by what it depends on beside these."""

    blocks: dict[tuple[object, ...], dict[int, Sides]] = field(default_factory=dict)
    known: dict[tuple[int, int], float] = field(default_factory=dict)


def estimate_job(
    facts: JobFacts,
    machine: Machine,
    plan: Plan,
    constants: Constants = DEFAULT,
    *,
    copies: int = 1,
    nodes: int = 1,
    memo: JobMemo | None = None,
) -> JobEstimate:
    """Predict one optimizer step of `facts` under `plan` on `machine`; the plan's threads must be settled on CPU.

    Args:
        copies: such trainings that compute at once on the measured machine, and share its cores, caches and memory. Their
            messages are priced as if they had the links for themselves.
        nodes: measured machines that the workers are spread over, evenly and in order.
        memo: shared between the plans of one search over one job and machine.
    """
    layout, memo = plan.layout, memo or JobMemo()
    samples = math.ceil(facts.batch_size / layout.replicas)
    micro = min(samples, plan.micro_batch or samples)
    passes = math.ceil(samples / micro)
    local = min(layout.workers, machine.gpus_per_node) if machine.measured is None else layout.workers // nodes
    sharing = Sharing(workers=local * copies, threads=plan.threads or 1)
    links = Links(machine, layout, constants, nodes)
    split = tensor_parts(facts, layout.tensor)
    if (micro, sharing.threads) not in memo.known:
        memo.known[micro, sharing.threads] = correction(facts, machine, micro, sharing.threads)
    known = memo.known[micro, sharing.threads]
    stages = stages_of(facts, plan)
    timeline, work = _pipeline(
        facts, machine, plan, sharing, links, micro, passes, split, stages, known, memo, constants
    )
    seconds = dict.fromkeys(PART_NAMES, 0.0)
    seconds["compute"] = timeline.busiest_seconds
    seconds["bubble"] = timeline.seconds - timeline.busiest_seconds
    seconds["optimizer"] = work.optimizer
    crowd = 1 if machine.measured is None else turns(sharing, machine.measured.cores)
    seconds["data"] = crowd * (facts.batch_size if facts.data_whole else samples) * facts.data_seconds
    seconds["loop"] = crowd * STEP_SECONDS if machine.measured is not None else constants.step_seconds
    last = rank_of(len(stages.parts) - 1, stages.ranks, stages.schedule)
    shared = links.wire(stages.shared_bytes, stages.shared_bytes, 0, last) if last and stages.shared_bytes else None
    seconds |= message_seconds(facts, machine, plan, links, micro, passes, work.backward, sharing, constants)
    if (
        shared is not None
    ):  # gradients of shared parameters go to their first holder and back (parallel/pipeline/shared.py)
        seconds["gradients"] += 2.0 * (shared.latency + MESSAGE_SECONDS) + shared.forward + shared.backward
    memory = _memory(facts, machine, plan, micro, passes, split, stages, timeline)
    return JobEstimate(seconds, memory, room_bytes(machine, plan, nodes) / copies, known != 1.0, _kind(plan, crowd))


def _kind(plan: Plan, crowd: int) -> str:
    layout = plan.layout
    if crowd > 1:
        return "crowded"
    if layout.workers == 1:
        return "one worker"
    return "replicas" if layout.workers == layout.data else "other"


def room_bytes(machine: Machine, plan: Plan, nodes: int = 1) -> float:
    """What one rank may use: a device's memory, or its share of what the ranks of one machine have together."""
    if machine.measured is None:
        return machine.accelerator.memory_bytes.value
    local = plan.layout.workers / nodes
    whole = machine.accelerator.memory_bytes.value * machine.gpus_per_node
    return min(whole, machine.measured.memory_bytes) / local


def tensor_parts(facts: JobFacts, degree: int) -> dict[int, float]:
    """Block -> the part of its work that one tensor rank does: what can be split is, the rest is done by all."""
    if degree == 1:
        return {}
    return {
        index: block.tensor_fraction / degree + 1.0 - block.tensor_fraction
        for index, block in enumerate(facts.model.blocks)
    }


def _pipeline(
    facts: JobFacts,
    machine: Machine,
    plan: Plan,
    sharing: Sharing,
    links: Links,
    micro: int,
    passes: int,
    split: dict[int, float],
    stages: Stages,
    known: float,
    memo: JobMemo,
    constants: Constants,
) -> tuple[Timeline, PhaseSeconds]:
    """Forward and backward passes of all micro-batches, and the work of the busiest stage with its optimizer step."""
    layout = plan.layout
    blocks = _blocks(facts, machine, plan, sharing, micro, split, memo, constants)
    adding = _adding(facts, machine, sharing, memo, constants) * (passes - 1) / passes * _owned(facts, plan)
    held = _held(facts, stages, split)
    if len(stages.parts) == 1:
        whole = joined(blocks.values()).times(known).plus(PhaseSeconds(backward=adding * held[0]))
        return Timeline(passes * whole.passes, passes * whole.passes, (1,)), whole
    works = []
    for parts, share in zip(stages.parts, held, strict=True):
        found = joined(blocks[block] for block, part in parts.items() if part == 1.0 and block in blocks)
        for block, part in parts.items():
            if part < 1.0 and block in blocks:
                found = found.plus(joined((blocks[block],)).times(part))
        works.append(found.times(known).plus(PhaseSeconds(backward=adding * share)))
    meeting = machine.measured is not None
    host = PASS_SECONDS if meeting else 0.0
    forward, backward = ([getattr(one, name) + host for one in works] for name in ("forward", "backward"))
    optimizer = sum(one.optimizer for one in works) / stages.ranks
    wires = []
    for cut, (sent, returned) in enumerate(zip(stages.sent_bytes, stages.returned_bytes, strict=True)):
        sizes = micro * sent / layout.context, micro * returned / layout.context
        ends = [rank_of(stage, stages.ranks, stages.schedule) for stage in (cut, cut + 1)]
        wire = links.wire(*sizes, *ends)
        wires.append(wire._replace(latency=wire.latency + 2 * MESSAGE_SECONDS))
        if ends[0] != ends[1]:  # both ends spend host time on a message
            for stage in (cut, cut + 1):
                forward[stage] += links.host_seconds(sizes[0], *ends)
                backward[stage] += links.host_seconds(sizes[1], *ends)
    timeline = simulate(stages.schedule, passes, tuple(forward), tuple(backward), tuple(wires), stages.ranks, meeting)
    return timeline, PhaseSeconds(max(stages.by_rank(forward)), max(stages.by_rank(backward)), optimizer)


def _blocks(
    facts: JobFacts,
    machine: Machine,
    plan: Plan,
    sharing: Sharing,
    micro: int,
    split: dict[int, float],
    memo: JobMemo,
    constants: Constants,
) -> dict[int, Sides]:
    """Seconds of every block for one micro-batch, and of its optimizer step; each depends on other parts of the plan."""
    layout, owned = plan.layout, _owned(facts, plan)
    crowd = sharing if machine.measured is not None else None  # devices are shared by nobody
    normed = bool(facts.norm_layers) and layout.replicas * layout.context > 1 and machine.measured is not None
    both = []
    for optimizer, key in (
        (False, (micro, crowd, layout.tensor, layout.context, normed)),
        (True, (micro, crowd, layout.tensor, owned)),
    ):
        if key not in memo.blocks:
            every = [item for item in facts.operations if (item.phase == "optimizer") == optimizer]
            memo.blocks[key] = block_seconds(
                divided_norms(every, machine.measured) if normed and machine.measured is not None else every,
                micro,
                machine,
                sharing,
                split=split,
                fraction=1.0 / layout.context,
                owned=owned,
                together=facts.message_parts,
                constants=constants,
            )
        both.append(memo.blocks[key])
    passes, updates = both
    found = dict(passes)
    for block, (_, _, updating, _, _, launching) in updates.items():
        forward, backward, _, ahead, behind, _ = passes.get(block, NO_SIDES)
        found[block] = (forward, backward, updating, ahead, behind, launching)
    return found


def _adding(facts: JobFacts, machine: Machine, sharing: Sharing, memo: JobMemo, constants: Constants) -> float:
    """Seconds in which one rank with all parameters adds the gradients of a pass to those of the passes before."""
    key = ("sums", sharing if machine.measured is not None else None)
    if key not in memo.blocks:
        memo.blocks[key] = block_seconds(gradient_sums(facts), 1, machine, sharing, constants=constants)
    return joined(memo.blocks[key].values()).backward


def _held(facts: JobFacts, stages: Stages, split: dict[int, float]) -> list[float]:
    """The part of all parameters that each stage holds."""
    blocks, count = facts.model.blocks, max(1, facts.model.parameters)
    return [sum(part * blocks[i].parameters * split.get(i, 1.0) for i, part in s.items()) / count for s in stages.parts]


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
    stages: Stages,
    timeline: Timeline,
) -> dict[str, float]:
    """Bytes of the fullest rank. Gradients are part of the counted peak; what is split is taken out of it again."""
    layout = plan.layout
    held = max(stages.by_rank(_held(facts, stages, split))) if facts.model.parameters else 1.0
    experts = facts.expert_bytes / max(1.0, facts.parameter_bytes) if layout.expert > 1 else 0.0
    held *= 1.0 - experts + experts / layout.expert
    parameters = facts.parameter_bytes * held / layout.shard
    gradients = facts.gradient_bytes * held
    activations = max(0.0, facts.peak_fixed_bytes + micro * facts.peak_sample_bytes - facts.gradient_bytes)
    activations /= layout.context
    if layout.tensor > 1:
        kept = sum(block.saved_bytes for block in facts.model.blocks) or 1.0
        activations *= sum(b.saved_bytes * split.get(i, 1.0) for i, b in enumerate(facts.model.blocks)) / kept
    if len(stages.parts) > 1:
        activations *= max(timeline.in_flight) / len(stages.parts)
    found = {
        "parameters": parameters,
        "optimizer": facts.optimizer_bytes * held / layout.shard,
        "gradients": gradients / layout.shard if layout.shard > 1 else gradients,
        "activations": activations,
    }
    summed = layout.data * layout.context * layout.expert
    if layout.shard > 1:
        unit = facts.gradient_bytes * held / (facts.shard_units + 1)
        found["gathered"] = 3.0 * unit if plan.zero_stage != 2 else facts.parameter_bytes * held + 2.0 * unit
    elif summed > 1:
        found["buckets"] = BUCKET_COPIES.get(plan.compression, 1.0) * gradients
    if machine.measured is not None:
        found["process"] = facts.base_bytes or machine.measured.worker_bytes
        found |= _settled(plan, found, machine.measured.worker_bytes)
        if layout.workers > 1:
            message = min(RING_BYTES, 2.0 * gradients)
            found["shared memory"] = layout.workers * message if summed > 1 else 0.0
    else:
        found["slack"] = SLACK * sum(found.values())
        found["context"] = CONTEXT_BYTES
    return found


def _settled(plan: Plan, found: dict[str, float], bare_bytes: float) -> dict[str, float]:
    """Buckets and libraries of a worker, as far as they need memory that it does not hold anyway.

    What a process holds beyond a bare one and its tensors is memory that was freed and kept: what the initial weights were made
    in, temporaries of operators, blocks of another size. Buckets are made before the steps and take their room there; the
    libraries of checkpoints are loaded after the steps and find that of the activations, too.
    """
    degrees = plan.layout.degrees
    loaded = [size for axis, size in LIBRARY_BYTES.items() if degrees[axis] > 1]
    libraries = max(loaded, default=LIBRARY_BYTES["data"]) * 2.0**20
    if plan.layout.workers == 1:
        libraries += INLINE_BYTES
    slack = max(0.0, found["process"] - bare_bytes)
    buckets = found.get("buckets", 0.0)
    if plan.layout.workers == degrees["data"] * degrees["context"]:  # others load theirs before the steps
        libraries -= min(REUSED_BYTES, max(0.0, slack - buckets) + found["activations"])
    settled = {"libraries": libraries}
    if buckets:
        settled["buckets"] = max(0.0, buckets - slack)
    return settled
