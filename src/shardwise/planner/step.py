"""One optimizer step of a case: compute, communication after overlap, pipeline bubble, optimizer; and the memory beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwise.planner.case import PURE, Case
from shardwise.planner.closedform import Timeline, Wire, closed_form, even, flight
from shardwise.planner.collectives import (
    Network,
    all_gather,
    all_reduce,
    group,
    network,
    reduce_scatter,
    send,
)
from shardwise.planner.compute import Device, Work, adam_seconds, device_rates
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.exchanges import (
    crosses_nodes,
    exchange_seconds,
    gradient_bytes,
    ring_seconds,
    shard_bytes,
    shard_seconds,
    tensor_seconds,
)
from shardwise.planner.layers import LayerWork, Works, works_of
from shardwise.planner.memory import (
    BUCKET_VALUES,
    MemoryParts,
    RankShare,
    context_bytes,
    layer_parameters,
    optimizer_bytes,
    rank_memory,
    rank_shares,
    state_bytes,
    whole_gradients,
)
from shardwise.planner.overlap import delay, exchange_overlaps, hidden, regather_seconds, shards_in_a_loop
from shardwise.planner.schedule import simulate
from shardwise.planner.software import network_ratio, step_factor, with_software
from shardwise.spec.schedule import rank_of

UNCERTAIN = 1.2
"""Margin of the memory model: a layout is certain to fit, or not to, when it does so with this factor to spare."""

CALLS_PER_REDUCE = 3.0
"""Host calls around one all-reduce or all-to-all: the collective and the events that order it against compute."""

CALLS_PER_PART = 12.0
"""Host calls around one gather or scatter of sequence parallelism, with its buffers, views and autograd function."""


SELECTIVE_REPEAT = 0.4
"""Share of a layer that selective recomputation repeats where it is not the attention core alone."""


@dataclass(frozen=True)
class Estimate:
    """Predicted step: seconds by part (they sum to the step), the pipeline's timeline, bytes by part and whether it fits.

    `fits` asks whether the best software (fused cross entropy, no allocator slack) fits, `likely` the same without what only some
    of it spares, `comfortable` whether the usual software does; `certain` is False near the limit.
    """

    seconds: dict[str, float]
    memory: MemoryParts
    timeline: Timeline
    fits: bool
    likely: bool
    comfortable: bool
    certain: bool

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class _Pass:
    """Seconds of a forward and a backward pass of something."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Memo:
    """What is the same for many cases of one model, machine, length, precision, attention and software: found once, by what it
    depends on beside these."""

    devices: dict[bool, Device] = field(default_factory=dict)
    networks: list[Network] = field(default_factory=list)
    works: dict[tuple[object, ...], Works] = field(default_factory=dict)
    passes: dict[tuple[object, ...], tuple[_Pass, tuple[_Pass, _Pass], dict[str, float]]] = field(default_factory=dict)
    shares: dict[tuple[object, ...], tuple[RankShare, ...]] = field(default_factory=dict)
    timelines: dict[tuple[object, ...], tuple[Timeline, float, float, float]] = field(default_factory=dict)


def estimate(case: Case, constants: Constants = DEFAULT, *, quick: bool = False, memo: Memo | None = None) -> Estimate:
    """Predict one optimizer step of `case`.

    Args:
        quick: take the pipeline's closed form instead of simulating its table.
        memo: times of single layers, shared between the cases of one search over one model, machine and precision.
    """
    memo = Memo() if memo is None else memo
    if case.engine not in memo.devices:
        memo.devices[case.engine] = device_rates(case.machine.accelerator, case.precision, constants, case.engine)
    if not memo.networks:
        ratio = network_ratio(case.machine.software)
        plain = network(case.machine, constants)
        memo.networks.append(plain if ratio == 1.0 else plain.slowed(ratio))
    device, net = memo.devices[case.engine], memo.networks[0]
    key = _layer_key(case)
    if key not in memo.passes:
        done = (case.tensor, case.context, case.expert, case.micro_batch, case.sequence_parallel, case.engine)
        if done not in memo.works:
            memo.works[done] = works_of(case, device, constants)
        memo.passes[key] = _passes(case, device, net, constants, memo.works[done])
    layer, ends, parts = memo.passes[key]
    piped = (*key, case.pipeline, case.virtual_stages, case.schedule, case.micro_batches, quick, case.stage_layers)
    if piped not in memo.timelines:
        memo.timelines[piped] = _timeline(case, net, layer, ends, quick)
    timeline, first, last, waits = memo.timelines[piped]
    shares = _shares(case, memo)
    memory = with_software(rank_memory(case, timeline.in_flight, shares), case.machine.software)
    layers = _busiest_layers(case, shares, layer, ends)
    seconds = _split({name: value * layers * case.micro_batches for name, value in parts.items()}, timeline, waits)
    seconds["gradients"] = _gradient_seconds(case, shares[0], net, first, last, constants)
    heaviest = max(shares, key=lambda share: share.dense + share.experts)
    owned = state_bytes(case, heaviest.dense, heaviest.experts)[2] / optimizer_bytes(case)
    seconds["optimizer"] = adam_seconds(owned, device, case.precision == PURE) + constants.step_seconds
    slower = step_factor(case)
    seconds = {name: slower * value for name, value in seconds.items()}
    room = room_bytes(case)
    fits = memory.least <= room
    sure = UNCERTAIN * memory.total <= room if fits else memory.least > UNCERTAIN * room
    return Estimate(seconds, memory, timeline, fits, memory.least + memory.rare <= room, memory.total <= room, sure)


def quick_memory(case: Case, memo: Memo) -> MemoryParts:
    """The memory that `estimate` with `quick` finds, without the times."""
    flying = flight(case.schedule, case.micro_batches, case.virtual_stages, case.pipeline)
    return with_software(rank_memory(case, flying, _shares(case, memo)), case.machine.software)


def _shares(case: Case, memo: Memo) -> tuple[RankShare, ...]:
    split = (case.tensor, case.expert, case.pipeline, case.virtual_stages, case.schedule, case.stage_layers)
    if split not in memo.shares:
        memo.shares[split] = rank_shares(case)
    return memo.shares[split]


def room_bytes(case: Case) -> float:
    """What a device has for its allocator."""
    return case.machine.accelerator.memory_bytes.value - context_bytes(case)


def _layer_key(case: Case) -> tuple[object, ...]:
    """What the time of one layer depends on beside model, machine and precision."""
    sharded = case.data if case.zero_stage == 3 else 0
    split = (case.tensor, case.context, case.expert, sharded, case.sequence_parallel, crosses_nodes(case))
    return (*split, case.micro_batch, case.micro_batches > 1, case.recompute, case.engine, exchange_overlaps(case))


def _passes(
    case: Case, device: Device, net: Network, constants: Constants, works: Works
) -> tuple[_Pass, tuple[_Pass, _Pass], dict[str, float]]:
    """Seconds of one layer and of both ends (embedding, output projection) for one micro-batch; parts of a layer's time."""
    work = works.layer
    repeat = Work()
    if case.recompute == "full":
        repeat = work.forward
    elif case.recompute == "selective":
        repeat = work.core_forward if case.repeats_core else work.forward.times(SELECTIVE_REPEAT)
    tensor_forward = tensor_seconds(case, net)
    exchange = exchange_seconds(case, net)
    if exchange_overlaps(case):
        room = 0.5 * (work.forward.seconds + work.backward.seconds)  # of a forward and a backward pass side by side
        exchange = max(0.0, exchange - room) + constants.overlap_cost * min(exchange, room)
    ahead, back = work.forward, work.backward + repeat
    if case.micro_batches > 1:
        back = back + Work(_summing_bytes(case) * sum(layer_parameters(case)) / device.memory_bytes)
    rounds = 2 if case.recompute == "full" else 1
    inner_f, inner_b = tensor_forward + exchange, rounds * (tensor_forward + exchange)
    calls = 2.0 * CALLS_PER_REDUCE if case.expert > 1 else 0.0
    if case.tensor > 1 and not case.graphs:
        calls += _tensor_calls(case)
    ahead, back = ahead + Work(0.0, calls), back + Work(0.0, rounds * calls)
    if case.sequence_parallel and not case.classic:
        covered = (case.tensor - 1) / case.tensor if case.engine else constants.tensor_overlap
        inner_f = max((1.0 - covered) * inner_f, inner_f - 0.5 * ahead.seconds)
        inner_b = max((1.0 - covered) * inner_b, inner_b - 0.5 * back.seconds)
    stall = _stall_seconds(case, net)
    compute_f = _forward_seconds(ahead, work, constants, case, inner_f - stall)
    compute_b = _device_or_host(back, constants, case, inner_b - rounds * stall)
    inner_b += regather_seconds(case, net, work, constants)
    ring_f = max(0.0, ring_seconds(case, net) - work.core_forward.seconds)
    parameters = sum(layer_parameters(case))
    shard_f, shard_b = shard_seconds(case, net, parameters)
    cost = delay(shard_bytes(case) * parameters, shard_f, group(case, "shard"), net, constants)
    total_f, total_b = compute_f + inner_f + ring_f, compute_b + inner_b + 2 * ring_f
    if case.loops:
        exposed_f, exposed_b = shards_in_a_loop(case, work, shard_f, shard_b, constants)
        total_f, total_b = total_f + exposed_f, total_b + exposed_b
    else:
        total_f, total_b = hidden(total_f, shard_f, case, cost), hidden(total_b, shard_b, case, cost)
    (embed_f, embed_b), (head_f, head_b) = works.embedding, works.head
    if case.graphs:
        embed_f, embed_b, head_f, head_b = (end.graphed() for end in (embed_f, embed_b, head_f, head_b))
    table = case.model.embedding_parameters / case.tensor
    end_f, end_b = shard_seconds(case, net, table)
    if case.tensor > 1:
        embed_comm = all_reduce(2.0 * case.tokens * case.model.hidden, group(case, "tensor"), net)
    else:
        embed_comm = 0.0
    embed = _Pass(
        _device_or_host(embed_f, constants, case) + embed_comm + end_f,
        _device_or_host(embed_b, constants, case) + end_b,
    )
    shared = 0.0 if case.model.tied_embeddings else 1.0
    head = _Pass(
        hidden(_device_or_host(head_f, constants, case), shared * end_f, case, cost),
        hidden(_device_or_host(head_b, constants, case) + embed_comm, shared * end_b, case, cost),
    )
    parts = {
        "recompute": repeat.seconds,
        "tensor": inner_f + inner_b,
        "context": 3 * ring_f,
        "shards": total_f + total_b - compute_f - compute_b - inner_f - inner_b - 3 * ring_f,
    }
    return _Pass(total_f, total_b), (embed, head), parts


def _stall_seconds(case: Case, net: Network) -> float:
    """Host delay of the tensor collectives of one layer and pass while pipeline transfers between nodes are pending."""
    pending = case.machine.pending_send_seconds
    if pending is None or case.tensor == 1 or not crosses_nodes(case):
        return 0.0
    return (4.0 if case.sequence_parallel else 2.0) * case.tensor * pending.value


def _device_or_host(work: Work, constants: Constants, case: Case, waiting: float = 0.0) -> float:
    """Device work and host launches side by side, less what the device waits for communication meanwhile.

    A rank alone queues its work ahead: the slower of the two counts. Tensor ranks meet at every collective, where all
    wait for the slowest host, so near balance neither hides the other in full: a norm between maximum and sum, nearer to
    the sum the more ranks there are, and the maximum for one. A compiled layer launches in cheaper calls, a graph in one.
    """
    launches = work.kernels * (0.5 if case.compile else 1.0)
    host = max(0.0, launches * constants.launch_seconds - waiting)
    if case.tensor == 1:
        return max(work.seconds, host)
    norm = 1.0 + constants.host_norm / math.log2(case.tensor)
    return float((work.seconds**norm + host**norm) ** (1.0 / norm))


def _tensor_calls(case: Case) -> float:
    """Host calls around the exchanges of tensor ranks in one layer and pass.

    The engine's own modules send the parts between the tiles of their products (Megatron Bridge, performance guide: userbuffers
    of Transformer Engine for sequence-parallel exchanges), so that no function of the framework stands around them.
    """
    if not case.sequence_parallel:
        return 2.0 * CALLS_PER_REDUCE
    return 0.0 if case.engine else 4.0 * CALLS_PER_PART


def _forward_seconds(ahead: Work, work: LayerWork, constants: Constants, case: Case, waiting: float) -> float:
    """As `_device_or_host`, in two parts where the host has to know how many tokens each expert gets.

    The copy of these counts to the host waits for the device, so that nothing of what is `behind` the router can be queued
    while the device works at what comes before. Backward the counts are known.
    """
    behind = work.inner_forward
    if not case.model.experts or case.compile:
        return _device_or_host(ahead, constants, case, waiting)
    return _device_or_host(ahead - behind, constants, case) + _device_or_host(behind, constants, case, waiting)


def _summing_bytes(case: Case) -> float:
    """Bytes through memory per parameter of a layer to add the gradient of one micro-batch to the sum of those before.

    The gradient is read, the sum read and written: in 2 bytes each by fp16 software and in bf16 alone, the sum in 4 by other
    bf16 software, all in 4 in fp32. Sharded gradients are summed as shards, and products of the engine add while they write.
    """
    if case.zero_stage == 3 or case.engine:
        return 0.0
    return 12.0 if case.precision == "fp32" else (6.0 if case.classic or case.precision == PURE else 10.0)


def _timeline(
    case: Case, net: Network, layer: _Pass, ends: tuple[_Pass, _Pass], quick: bool
) -> tuple[Timeline, float, float, float]:
    """The pipeline's timeline, the longest forward pass that is the first one of a rank, the longest backward pass that is the
    last one, and the seconds of a step for which the busiest rank waits until its messages are sent.

    Plain 1f1b computes nothing while it sends: a pass is followed by an exchange with one neighbour, which the next pass waits
    for (Megatron-LM, `send_forward_recv_backward`: its `overlap_p2p_comm` is for interleaved schedules alone; PyTorch,
    `Schedule1F1B`; DeepSpeed, `PipelineEngine`). So what fills the link also fills the rank that sends.
    """
    forward, backward = _stages(case, layer, ends)
    longest = max(forward[: case.pipeline]), max(backward[: case.pipeline])
    find = closed_form if quick else simulate
    wires, waits = _wires(case, net, len(forward)), 0.0
    if case.schedule == "1f1b" and wires:
        ahead = (*(wire.forward for wire in wires), 0.0)
        back = (0.0, *(wire.backward for wire in wires))
        forward = tuple(map(sum, zip(forward, ahead, strict=True)))
        backward = tuple(map(sum, zip(backward, back, strict=True)))
        busiest = max(range(case.pipeline), key=lambda rank: forward[rank] + backward[rank])
        waits = case.micro_batches * (ahead[busiest] + back[busiest])
        wires = tuple(Wire(wire.latency, 0.0, 0.0) for wire in wires)
    timeline = find(case.schedule, case.micro_batches, forward, backward, wires, case.pipeline)
    return timeline, *longest, waits


def _stages(case: Case, layer: _Pass, ends: tuple[_Pass, _Pass]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    layers = case.layers_per_stage
    forward = [count * layer.forward for count in layers]
    backward = [count * layer.backward for count in layers]
    for index, end in ((0, ends[0]), (-1, ends[1])):
        forward[index] += end.forward
        backward[index] += end.backward
    return tuple(forward), tuple(backward)


def _wires(case: Case, net: Network, stages: int) -> tuple[Wire, ...]:
    """An activation, or its gradient, to the next pipeline rank; tensor ranks send a part each."""
    across = crosses_nodes(case)
    latency = send(0.0, across, net)
    whole = send(2.0 * case.tokens * case.model.hidden / case.tensor, across, net)
    return even(stages, latency, whole - latency)


def _gradient_seconds(
    case: Case, share: RankShare, net: Network, first_forward: float, last_backward: float, constants: Constants
) -> float:
    """Exposed reduction of gradients over replicas, and the gather of updated parameters with sharded optimizer states.

    That gather runs beside the first forward pass of the next step in the engine's software (Megatron Bridge, performance
    guide, "Communication overlaps": overlap_param_gather), and by itself elsewhere.
    Experts are reduced over fewer ranks; their bytes are charged at the rate of the whole group, which is close. Where every rank
    keeps its shard of the gradients alone (`whole_gradients`), each micro-batch reduces all of them: there is no place to sum
    them in first (DeepSpeed, `stage_1_and_2.py`: stage 2 reduces in the backward hook of every micro-batch).
    """
    replicas = case.data * case.context
    if case.zero_stage == 3 or replicas == 1:
        return 0.0
    ranks = group(case, "shard")
    count = share.dense + (share.experts if case.expert < replicas else 0.0)
    size = gradient_bytes(case) * count
    calls = 1 if case.classic else math.ceil(count / BUCKET_VALUES)
    if case.zero_stage == 0:
        whole, after = calls * all_reduce(size / calls, ranks, net), 0.0
    else:
        whole, after = (
            calls * reduce_scatter(size / calls, ranks, net),
            calls * all_gather(2.0 * count / calls, ranks, net),
        )
    rounds = 1 if whole_gradients(case) else case.micro_batches
    if case.reduces_behind:
        return rounds * whole + after
    twice = 2.0 if case.zero_stage == 0 else 1.0  # an all-reduce is a scatter and a gather
    cost = delay(twice * size, whole, ranks, net, constants)
    if case.engine:
        gathered = min(constants.gradient_overlap * after, first_forward)
        after -= gathered * (1.0 - cost)
    covered = min(constants.gradient_overlap * whole, last_backward)
    return rounds * (whole - covered * (1.0 - cost)) + after


def _busiest_layers(case: Case, shares: Sequence[RankShare], layer: _Pass, ends: tuple[_Pass, _Pass]) -> int:
    """Layers of the pipeline rank with the most work: one of the ends, or one with the most layers."""
    last = rank_of(case.pipeline * case.virtual_stages - 1, case.pipeline, case.schedule)
    work = {0: 0.0, last: 0.0, max(range(case.pipeline), key=lambda rank: shares[rank].layers): 0.0}
    for rank in work:
        work[rank] = shares[rank].layers * (layer.forward + layer.backward)
    for rank, end in ((0, ends[0]), (last, ends[1])):
        work[rank] += end.forward + end.backward
    return shares[max(work, key=lambda rank: work[rank])].layers


def _split(parts: dict[str, float], timeline: Timeline, waits: float) -> dict[str, float]:
    """Seconds by part: the bubble is the idle time of the busiest rank, compute what the other parts leave of its work."""
    busy = timeline.busiest_seconds - waits
    return {**parts, "compute": busy - sum(parts.values()), "bubble": timeline.seconds - busy}
