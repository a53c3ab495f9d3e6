"""Seconds that the ranks of each axis talk for one layer and pass, before any of it hides behind compute."""

from shardwise.planner.case import PURE, Case
from shardwise.planner.collectives import Network, all_gather, all_reduce, all_to_all, group, reduce_scatter

GATHERS_PER_LAYER = 12
"""Tensors of a transformer layer; sharded training of the classic kind gathers each by itself."""


def crosses_nodes(case: Case) -> bool:
    """Whether neighbours in the pipeline are on different nodes."""
    return case.pipeline > 1 and case.workers > case.machine.gpus_per_node and group(case, "pipeline").nodes > 1


def tensor_seconds(case: Case, net: Network) -> float:
    """Two all-reduces a layer and pass, or as many gathers and scatters (Megatron-LM, arXiv:1909.08053, figure 4)."""
    if case.tensor == 1:
        return 0.0
    ranks = group(case, "tensor")
    size = 2.0 * case.tokens * case.model.hidden
    if case.sequence_parallel:
        return 2.0 * (all_gather(size, ranks, net) + reduce_scatter(size, ranks, net))
    return 2.0 * all_reduce(size, ranks, net)


def exchange_seconds(case: Case, net: Network) -> float:
    """Tokens to their experts and back: two all-to-alls a layer and pass.

    Kernels that know the nodes send a token once to every node with an expert it visits, and copy it there (DeepSeek-V3,
    arXiv:2412.19437, section 3.2.2): of n nodes k random experts touch n (1 - (1 - 1/n)^k).
    """
    if not case.model.experts or case.expert == 1:
        return 0.0
    copy = 2.0 * case.tokens * case.model.hidden
    if case.sequence_parallel:
        copy /= case.tensor
    ranks = group(case, "expert")
    visits = case.model.experts_per_token
    sent = ranks.nodes * (1.0 - (1.0 - 1.0 / ranks.nodes) ** visits) if case.engine else visits
    return 2.0 * all_to_all(copy * visits, ranks, net, copy * min(sent, visits))


def ring_seconds(case: Case, net: Network) -> float:
    """Keys and values once around the context ranks."""
    if case.context == 1:
        return 0.0
    size = 4.0 * case.tokens * case.model.kv_hidden / case.tensor
    return all_gather(size * case.context, group(case, "context"), net)


def shard_seconds(case: Case, net: Network, parameters: float) -> tuple[float, float]:
    """(forward, backward) communication of sharded parameters: gather ahead, gather again and reduce-scatter behind."""
    if case.zero_stage != 3 or case.data * case.context == 1:
        return 0.0, 0.0
    ranks = group(case, "shard")
    calls = GATHERS_PER_LAYER if case.classic else 1
    gather = calls * all_gather(shard_bytes(case) * parameters / calls, ranks, net)
    scatter = calls * reduce_scatter(gradient_bytes(case) * parameters / calls, ranks, net)
    return gather, gather + scatter


def shard_bytes(case: Case) -> float:
    """Bytes of one gathered parameter."""
    return 4.0 if case.precision == "fp32" else 2.0


def gradient_bytes(case: Case) -> float:
    """Bytes of one reduced gradient.

    fp16 software reduces in fp16. Fully sharded training reduces in the precision of its products unless told otherwise
    (PyTorch, `fully_shard`, MixedPrecisionPolicy: without `reduce_dtype` that of the parameters), and so does stage 2, whose
    gradients are reduced as they leave the backward pass (DeepSpeed, `communication_data_type`, default); replicas of bf16
    software sum in fp32, but where there is nothing in fp32.
    """
    sharded = case.zero_stage == 3 or (case.zero_stage == 2 and case.pipeline == 1)
    half = case.precision in ("fp16", PURE) or (sharded and case.precision != "fp32")
    return 2.0 if half else 4.0
