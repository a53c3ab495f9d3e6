"""What communication of a layer hides behind its compute, by the software that runs it."""

from shardwise.planner.case import Case
from shardwise.planner.collectives import group
from shardwise.planner.constants import Constants
from shardwise.planner.layers import LayerWork


def hidden(compute: float, communication: float, case: Case, constants: Constants) -> float:
    """Time of compute and communication side by side; classic software does one after the other."""
    if case.classic:
        return compute + communication
    return max(compute, communication) + constants.overlap_cost * min(compute, communication)


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
