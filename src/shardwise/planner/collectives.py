"""Seconds of one collective by size, group and placement.

Bus bandwidth B is what every link of a ring carries; S is the size of the whole result (all-gather), of the whole
input (reduce-scatter) or of the vector (all-reduce); n is the number of ranks. Ring: all-gather and reduce-scatter take
(n-1)/n S/B, all-reduce twice that (Thakur et al. 2005, section 4).
"""

import itertools
import math
from dataclasses import dataclass, replace

from shardwise.planner.case import Case
from shardwise.planner.constants import Constants
from shardwise.spec.machine import Figure, Link, Machine

SMALL_MESSAGE_SHARE = 0.22
"""Bandwidth of the low-latency protocols over that of the bulk protocol: all-reduce on 2 to 8 A100, NetX-lab Echo logs (2025)."""

BULK_SETUP_SECONDS = 4.5e-5
"""What the bulk protocol costs before its bandwidth counts, same logs."""


MESHES = ("v100", "mi300x", "mi325x", "mi355x", "gaudi", "ascend910b")
"""Parts of nodes without a switch: a link of a device ends at one other device (AMD Instinct MI300X data sheet: seven links to
seven parts; docs.habana.ai, network configuration: three of 21 ports to each; Ascend 910B: HCCS, a full mesh, from memory; V100:
see `CUBE`)."""

CUBE = {2: 1 / 6, 3: 1 / 3, 4: 2 / 3, 5: 2 / 3, 6: 2 / 3, 7: 2 / 3}
"""Share of the six links of a V100 that so many neighbours of eight can use: one link joins two of them, one ring of single
links three, two rings four, and three rings all eight (NVIDIA on DGX-1, reprinted at iitr.ac.in/dgx: hybrid cube mesh, "three
interwoven rings")."""


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
    setup_seconds: float = BULK_SETUP_SECONDS

    def slowed(self, factor: float) -> "Network":
        """The same where every message takes `factor` times as long, whatever its size."""
        machine = self.machine
        slower = replace(
            machine,
            intra=_slowed(machine.intra, factor),
            inter=_slowed(machine.inter, factor),
            rates=tuple(
                replace(rate, bus_bytes_per_second=_times(rate.bus_bytes_per_second, 1.0 / factor))
                for rate in machine.rates
            ),
        )
        return Network(
            slower,
            self.intra_bytes / factor,
            self.inter_bytes / factor,
            self.hop_seconds * factor,
            self.setup_seconds * factor,
        )


def _slowed(link: Link, factor: float) -> Link:
    return Link(
        bytes_per_second=_times(link.bytes_per_second, 1.0 / factor),
        latency_seconds=_times(link.latency_seconds, factor),
    )


def _times(figure: Figure, factor: float) -> Figure:
    return replace(figure, value=figure.value * factor)


def network(machine: Machine, constants: Constants) -> Network:
    """Achieved bandwidths of the links of `machine`."""
    return Network(
        machine,
        machine.intra.bytes_per_second.value * constants.link_rate,
        machine.inter.bytes_per_second.value * constants.network_rate,
        machine.inter.latency_seconds.value * constants.hop_share,
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


def link_share(machine: Machine, devices: int) -> float:
    """Share of the links of a device that lead to the other ones of a group of `devices` in its node; 2 for two neighbours.

    All of them through a switch; in a full mesh of n devices those to k - 1 of n - 1 others.
    """
    name, whole = machine.accelerator.name, machine.gpus_per_node
    if not name.startswith(MESHES) or name.endswith("pcie") or not 1 < devices < whole <= 8:
        return 1.0
    if name.startswith("v100") and whole == 8:
        return CUBE[devices]
    return (devices - 1) / (whole - 1)


def bus_bytes(net: Network, ranks: Group, collective: str = "") -> float:
    """Bus bandwidth of a ring over `ranks`, bytes per second.

    Inside a node the link counts, with its share where there is no switch (`link_share`); across nodes every rank brings its
    share of the network. A ring that uses part of every node has fewer network ports than one over whole nodes, so it is no
    faster than what was measured for those.
    """
    inside = net.intra_bytes * link_share(net.machine, ranks.per_node)
    if ranks.nodes <= 1:
        return inside
    across = net.inter_bytes * ranks.per_node
    nominal = min(across, inside) if ranks.per_node > 1 else across
    found = _measured(net.machine, collective, ranks.nodes)
    return nominal if found is None else min(nominal, found[0])


def measured_seconds(
    size_bytes: float, start_seconds: float, factor: float, ranks: Group, net: Network, collective: str
) -> float | None:
    """Seconds by the rate measured for whole nodes, None if there is none for such a group.

    For smaller messages than the measured one, its time is split into `start_seconds`, which does not depend on the
    size, and the rest, which does; larger ones keep the measured rate. `factor`: bytes a link carries per byte of message.
    """
    if ranks.per_node < net.machine.gpus_per_node:
        return None
    found = _measured(net.machine, collective, ranks.nodes)
    if found is None:
        return None
    rate, message = found
    whole = factor * message / rate
    if size_bytes >= message:
        return whole * size_bytes / message
    start = min(start_seconds, 0.9 * whole)
    return start + (whole - start) * size_bytes / message


def all_reduce(size_bytes: float, ranks: Group, net: Network) -> float:
    """Seconds to sum a vector of `size_bytes` over `ranks`."""
    if ranks.size <= 1 or size_bytes <= 0:
        return 0.0
    factor = 2.0 * (ranks.size - 1) / ranks.size
    moved = factor * size_bytes
    bandwidth = bus_bytes(net, ranks, "all_reduce")
    start = net.machine.intra.latency_seconds.value * ranks.per_node
    levels = math.log2(ranks.nodes) if ranks.nodes > 1 else 0.0
    start += net.machine.inter.latency_seconds.value * levels
    measured = measured_seconds(size_bytes, start, factor, ranks, net, "all_reduce")
    if measured is not None:
        return measured
    bulk = net.setup_seconds * (1.0 + 0.5 * levels) + moved / bandwidth
    return start + min(moved / (bandwidth * SMALL_MESSAGE_SHARE), bulk)


def all_gather(size_bytes: float, ranks: Group, net: Network, collective: str = "all_gather") -> float:
    """Seconds to collect `size_bytes` in all from `ranks`; a reduce-scatter of the same size takes as long."""
    if ranks.size <= 1 or size_bytes <= 0:
        return 0.0
    factor = (ranks.size - 1) / ranks.size
    start = net.machine.intra.latency_seconds.value * ranks.per_node
    if ranks.nodes > 1:
        start += net.hop_seconds * (ranks.size - 1)
    measured = measured_seconds(size_bytes, start, factor, ranks, net, collective)
    return start + factor * size_bytes / bus_bytes(net, ranks, collective) if measured is None else measured


def reduce_scatter(size_bytes: float, ranks: Group, net: Network) -> float:
    """Seconds to sum `size_bytes` over `ranks` and leave every rank its part."""
    return all_gather(size_bytes, ranks, net, "reduce_scatter")


def all_to_all(size_bytes: float, ranks: Group, net: Network, across_bytes: float | None = None) -> float:
    """Seconds for every rank to spread its `size_bytes` over `ranks`; `across_bytes` replaces them between nodes.

    The part that leaves the node uses the rank's own network, at the same time as the part that stays uses the link.
    """
    if ranks.size <= 1 or size_bytes <= 0:
        return 0.0
    links = net.intra_bytes * link_share(net.machine, ranks.per_node)
    inside = (ranks.per_node - 1) / ranks.size * size_bytes / links
    if ranks.nodes <= 1:
        return net.setup_seconds + inside
    across = size_bytes if across_bytes is None else across_bytes
    outside = (ranks.size - ranks.per_node) / ranks.size * across / net.inter_bytes
    return net.setup_seconds + net.machine.inter.latency_seconds.value + max(inside, outside)


def send(size_bytes: float, across_nodes: bool, net: Network) -> float:
    """Seconds to hand `size_bytes` to the next rank."""
    if across_nodes:
        return net.machine.inter.latency_seconds.value + size_bytes / net.inter_bytes
    link = net.intra_bytes * link_share(net.machine, 2)
    return 2.0 * net.machine.intra.latency_seconds.value + size_bytes / link


def _measured(machine: Machine, collective: str, nodes: int) -> tuple[float, float] | None:
    """(bus bandwidth, message bytes) measured over `nodes` whole nodes, interpolated over log2(nodes); None if not measured.

    Of several message sizes the largest one counts.
    """
    mine = [rate for rate in machine.rates if rate.collective == collective]
    if not mine:
        return None
    message = max(rate.message_bytes for rate in mine)
    points = sorted((rate.nodes, rate.bus_bytes_per_second.value) for rate in mine if rate.message_bytes == message)
    if nodes <= points[0][0]:
        return points[0][1], message
    for (left, low), (right, high) in itertools.pairwise(points):
        if nodes <= right:
            part = (math.log2(nodes) - math.log2(left)) / (math.log2(right) - math.log2(left))
            return low * (high / low) ** part, message
    return points[-1][1], message
