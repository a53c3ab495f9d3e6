"""What communication of a layer hides behind its compute, by the software that runs it."""

from shardwise.planner.case import Case
from shardwise.planner.collectives import Group, Network, all_gather, group
from shardwise.planner.constants import Constants
from shardwise.planner.layers import LayerWork

INPUT_GRADIENT_SHARE = 0.3
"""Share of a layer's backward products that is the gradient of the inputs of query, key and value and of the first
feed-forward product: half of 3 h^2 + 4 h^2 of 12 h^2."""


def delay(moved_bytes: float, seconds: float, ranks: Group, net: Network, constants: Constants) -> float:
    """Share of a hidden gather or scatter of `moved_bytes` over `ranks`, which takes `seconds`, that still delays compute.

    It takes multiprocessors and memory bandwidth from compute, in proportion to what its links carry at a time: NCCL opens as
    many channels, each of which occupies a multiprocessor, as the slowest link on the way can fill. `overlap_cost` is for the
    link inside a node, so the seconds that a slower network adds cost nothing; latency counts in full.
    """
    if ranks.nodes <= 1 or seconds <= 0:
        return constants.overlap_cost
    part = moved_bytes * (ranks.size - 1) / ranks.size
    added = part * max(0.0, 1.0 / (net.inter_bytes * ranks.per_node) - 1.0 / net.intra_bytes)
    return constants.overlap_cost * max(0.0, 1.0 - added / seconds)


def hidden(compute: float, communication: float, case: Case, cost: float) -> float:
    """Time of compute and communication side by side; classic software does one after the other."""
    if case.classic:
        return compute + communication
    return max(compute, communication) + cost * min(compute, communication)


def exchange_overlaps(case: Case) -> bool:
    """Whether another micro-batch computes while tokens travel to their experts.

    In DualPipe that of the other direction (DeepSeek-V3, arXiv:2412.19437, section 3.2.1). In Megatron-Core the next one, in
    pipelines of several chunks alone (its guide to the overlap of all-to-alls, "combined 1F1B"); what makes it worth having
    is an exchange between nodes, and without it experts are best kept within one (Megatron Bridge, performance guide).
    """
    if case.schedule == "dualpipev":
        return True
    return case.engine and case.virtual_stages > 1 and group(case, "expert").nodes > 1


def shards_in_a_loop(
    case: Case, work: LayerWork, forward: float, backward: float, constants: Constants
) -> tuple[float, float]:
    """Exposed seconds of gathering and scattering the shards of one layer, forward and backward, in a compiled loop.

    The compiler moves collectives within one round of the loop, not across rounds, so a gather starts when its layer does. What
    the layer uses first is exposed: the weights of attention. Those of the feed-forward part, nearly all of a mixture of
    experts, hide behind attention alone; so do their gradients, which attention's backward pass follows.

    Args:
        forward: seconds of one gather of the whole layer.
        backward: seconds of another gather and of the scatter of the gradients.
    """
    model = case.model
    inner = max(1, model.experts) * model.expert_parameters
    late = inner / (inner + model.attention_parameters)
    room_f = (work.forward - work.inner_forward).seconds
    room_b = (work.backward - work.inner_backward).seconds

    def exposed(seconds: float, room: float) -> float:
        covered = min(late * seconds, room)
        return seconds - covered * (1.0 - constants.overlap_cost)

    again = exposed(forward, room_f if case.recompute == "full" else 0.0)
    return exposed(forward, room_f), again + exposed(backward - forward, room_b)


def regather_seconds(case: Case, net: Network, work: LayerWork, constants: Constants) -> float:
    """What the backward pass exposes of gathering the inputs of both split products once more for their weight gradients.

    Sequence-parallel ranks keep their part of the input only, and gather it again beside the gradient of the input
    (Korthikanti et al. 2022, section 4.2.2), which the two products that need it can hide.
    """
    if not case.sequence_parallel:
        return 0.0
    gather = 2.0 * all_gather(2.0 * case.tokens * case.model.hidden, group(case, "tensor"), net)
    room = INPUT_GRADIENT_SHARE * work.backward.seconds
    return max(0.0, gather - room) + constants.overlap_cost * min(gather, room)
