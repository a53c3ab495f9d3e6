"""Seconds of one collective by size, group and placement.

Bus bandwidth B is what every link of a ring carries; S is the size of the whole result (all-gather), of the whole
input (reduce-scatter) or of the vector (all-reduce); n is the number of ranks. Ring: all-gather and reduce-scatter take
(n-1)/n S/B, all-reduce twice that (Thakur et al. 2005, section 4).
"""

import math
from dataclasses import dataclass

from shardwise.planner.case import Case
from shardwise.planner.constants import Constants
from shardwise.spec.machine import Machine

SMALL_MESSAGE_SHARE = 0.22
"""Bandwidth of the low-latency protocols over that of the bulk protocol: all-reduce on 2 to 8 A100, NetX-lab Echo logs (2025)."""

BULK_SETUP_SECONDS = 4.5e-5
"""What the bulk protocol costs before its bandwidth counts, same logs."""


@dataclass(frozen=True)
class Group:
    """Ranks of one collective: how many, and how many of them share a node."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes the group touches."""
        return math.ceil(self.size / self.per_node)


@dataclass(frozen=True)
class Network:
    """The links of a machine with the constants applied; see `network`."""

    machine: Machine
    intra_bytes: float
    inter_bytes: float
    hop_seconds: float


def network(machine: Machine, constants: Constants) -> Network:
    """Achieved bandwidths of the links of `machine`."""
    return Network(
        machine,
        machine.intra.bytes_per_second.value * constants.link_rate,
        machine.inter.bytes_per_second.value * constants.network_rate,
        constants.hop_seconds,
    )


def group(case: Case, axis: str) -> Group:
    """Ranks of one axis, tensor innermost, then context, data, pipeline (the order of Megatron-LM)."""
    strides = {
        "tensor": (case.tensor, 1),
        "context": (case.context, case.tensor),
        "expert": (case.expert, case.tensor * case.context),
        "data": (case.data, case.tensor * case.context),
        "shard": (case.data * case.context, case.tensor),
        "pipeline": (case.pipeline, case.tensor * case.context * case.data),
    }
    size, stride = strides[axis]
    return Group(size, max(1, min(size, case.machine.gpus_per_node // max(1, stride))))


def bus_bytes(net: Network, ranks: Group, collective: str) -> float:
    """Bus bandwidth of `collective` over `ranks`, bytes per second.

    Across nodes every rank brings its share of the network. Measured rates of whole nodes replace the estimate and are
    scaled by the part of a node that takes part.
    """
    if ranks.nodes <= 1:
        measured = _measured(net.machine, collective, 1)
        return measured if measured else net.intra_bytes
    share = ranks.per_node / net.machine.gpus_per_node
    measured = _measured(net.machine, collective, ranks.nodes)
    across = measured * share if measured else net.inter_bytes * ranks.per_node
    return min(across, net.intra_bytes) if ranks.per_node > 1 else across


def all_reduce(size_bytes: float, ranks: Group, net: Network) -> float:
    """Seconds to sum a vector of `size_bytes` over `ranks`."""
    if ranks.size <= 1 or size_bytes <= 0:
        return 0.0
    moved = 2.0 * (ranks.size - 1) / ranks.size * size_bytes
    bandwidth = bus_bytes(net, ranks, "all_reduce")
    start = net.machine.intra.latency_seconds.value * ranks.per_node
    levels = math.log2(ranks.nodes) if ranks.nodes > 1 else 0.0
    start += net.machine.inter.latency_seconds.value * levels
    bulk = BULK_SETUP_SECONDS * (1.0 + 0.5 * levels) + moved / bandwidth
    return start + min(moved / (bandwidth * SMALL_MESSAGE_SHARE), bulk)


def all_gather(size_bytes: float, ranks: Group, net: Network, collective: str = "all_gather") -> float:
    """Seconds to collect `size_bytes` in all from `ranks`; a reduce-scatter of the same size takes as long."""
    if ranks.size <= 1 or size_bytes <= 0:
        return 0.0
    moved = (ranks.size - 1) / ranks.size * size_bytes
    start = net.machine.intra.latency_seconds.value * ranks.per_node
    if ranks.nodes > 1:
        start += net.hop_seconds * (ranks.size - 1)
    return start + moved / bus_bytes(net, ranks, collective)


def reduce_scatter(size_bytes: float, ranks: Group, net: Network) -> float:
    """Seconds to sum `size_bytes` over `ranks` and leave every rank its part."""
    return all_gather(size_bytes, ranks, net, "reduce_scatter")


def all_to_all(size_bytes: float, ranks: Group, net: Network) -> float:
    """Seconds for every rank to spread its `size_bytes` over `ranks`: the part that leaves the node uses the rank's own network."""
    if ranks.size <= 1 or size_bytes <= 0:
        return 0.0
    inside = (ranks.per_node - 1) / ranks.size * size_bytes / net.intra_bytes
    if ranks.nodes <= 1:
        return BULK_SETUP_SECONDS + inside
    outside = (ranks.size - ranks.per_node) / ranks.size * size_bytes / net.inter_bytes
    return BULK_SETUP_SECONDS + net.machine.inter.latency_seconds.value + max(inside, outside)


def send(size_bytes: float, across_nodes: bool, net: Network) -> float:
    """Seconds to hand `size_bytes` to the next rank."""
    if across_nodes:
        return net.machine.inter.latency_seconds.value + size_bytes / net.inter_bytes
    return 2.0 * net.machine.intra.latency_seconds.value + size_bytes / net.intra_bytes


def _measured(machine: Machine, collective: str, nodes: int) -> float | None:
    """Measured bus bandwidth over `nodes` whole nodes, interpolated over log2(nodes); None where nothing was measured."""
    points = sorted((rate.nodes, rate.bus_bytes_per_second.value) for rate in machine.rates if rate.collective == collective)
    if not points:
        return None
    if nodes <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if nodes <= right:
            part = (math.log2(nodes) - math.log2(left)) / (math.log2(right) - math.log2(left))
            return float(low * (high / low) ** part)
    return points[-1][1]
