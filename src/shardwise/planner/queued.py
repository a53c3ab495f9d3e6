"""Buffers of tokens x hidden that tensor ranks hold beside their split activations.

Every rank makes the outputs of its products whole before it sums or scatters them; with sequence parallelism it gathers their
inputs as well. A few of these buffers are needed at any time. Others are free for the program and not for the allocator: PyTorch
marks what a collective reads or writes as used by the collective's stream (`record_stream` in its NCCL process group), so a
block returns when the device has passed the collective, and the host, which runs ahead, takes a new one for the next layer
meanwhile (torchtitan, docs/composability.md, on TORCH_NCCL_AVOID_RECORD_STREAMS; PyTorch's pull requests 111431 of 2023 and
148590 of 2025 ended it, for calls that wait and for all). The same allocator waits for the device before it gives up, so these
blocks show in what is reported and decide nothing about what fits.
"""

from shardwise.planner.activations import on_tpu
from shardwise.planner.case import Case

STANDING = 4.0
"""Buffers of tokens x hidden that one layer at a time needs: gathered input, output before the scatter, and their gradients."""

LAUNCHES = 1024
"""Operations that a CUDA stream takes before the host waits for the device."""

LAYER_LAUNCHES = 46
"""Operations of one layer's forward pass of eager software: some 30 kernels, and four collectives with four events each.

Counted in nanotron's llama.py: norm 2, products 7, gather and scatter 4, layout of query, key and value 3, rotary 2, lengths of
the sequences 6, attention 1, activation 2, residuals 2, copies 1.
"""

PER_LAYER = 2
"""Outputs of a layer that tensor ranks sum: of attention and of the feed-forward part."""


def standing_bytes(case: Case) -> float:
    """Bytes of whole buffers that one layer needs at a time."""
    return 2.0 * STANDING * case.tokens * case.model.hidden if case.sequence_parallel else 0.0


def queued_bytes(case: Case, layers: float, in_flight: int) -> float:
    """Bytes of outputs that the program has summed or scattered and the device has not, at most.

    The host queues all forward passes that wait for nobody: without a pipeline those of the layers, and of the embedding, of
    one micro-batch; on the ranks of a pipeline the passes of the warm-up behind the one that the device is at, because every
    later pass waits for a message of the next rank. Tensor ranks of several nodes send through the same network threads as the
    pipeline, whose messages hold their host up.

    Args:
        layers: layers of the rank, of one chunk.
        in_flight: chunks in flight at its peak.
    """
    if not case.eager_parallel or case.tensor == 1 or case.machine.measured is not None or on_tpu(case):
        return 0.0  # on CPUs a collective ends before the program goes on
    passes = 1 if case.pipeline == 1 else max(0, in_flight - 2)
    if case.pipeline > 1 and case.tensor > case.machine.gpus_per_node:
        passes = 0
    most = PER_LAYER * LAUNCHES / LAYER_LAUNCHES
    outputs = min(most, passes * (PER_LAYER * layers + 1.0))
    return 2.0 * outputs * case.tokens * case.model.hidden
