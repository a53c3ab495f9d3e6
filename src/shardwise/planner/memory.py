"""Bytes of one rank at the peak of a step, part by part.

Letters: h hidden, f inner feed-forward width, t tensor ranks, D ranks that share states. "In flight" are micro-batches
whose forward pass ran and whose backward pass did not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardwise.planner.activations import kept_bytes, on_tpu, spare_activations, spare_of_experts
from shardwise.planner.case import PURE, Case
from shardwise.planner.queued import queued_bytes, standing_bytes
from shardwise.spec.plan import V_SHAPED
from shardwise.spec.schedule import rank_of

CONTEXT_BYTES = 1.6 * 2**30
"""Device memory outside the allocator: driver context, library workspaces, communication buffers of a few groups."""

SLACK = 0.03
"""Allocator: reserved over allocated bytes less one, of everything that changes during the step."""

OLD_SLACK = 0.3
"""The same of Megatron-DeepSpeed: before segments could grow (PyTorch 2.1), what is freed between the activations of a
pipeline stays cut up.

Over the 51 fp16 runs of the BigScience tables least squares give 4.3 GiB + 4.4 N + 18.3 N / D + 1.5 A, where N are a
rank's parameters and A its layer inputs in flight; the code says 4 N + 18 N / D, and 1.1 to 1.2 A with the stage's output.
"""

EAGER_SLACK = 0.1
"""The same of eager software that leaves PyTorch's allocator at its default, where segments cannot grow."""

WORKSPACE_BYTES = 0.4 * 2**30
"""Buffers of matrix libraries that the allocator counts."""

UPDATE_BYTES = 12.0
"""Temporary bytes per value of an Adam step that works on all tensors at once but is not fused (PyTorch's default).

The gradient in fp32, the square root of the second moment, and the quotient: 4 each. Software that keeps replicated states
beside a gradient summed in fp32 updates in one fused kernel, without temporaries (Megatron-LM: apex FusedAdam; nanotron:
fused AdamW in its default configuration).
"""

PURE_UPDATE_BYTES = 4.0
"""The same where all is in bf16: the square root of the second moment and the quotient, 2 each; the gradient is taken as it is
(PyTorch, `torch/optim/adam.py`, `_multi_tensor_adam`: its tensors have the type of the parameters)."""

HALF_GRADIENT_BYTES = 2.0
"""Bytes per value of the gradient in the working precision, which stays beside its sum in fp32 where gradients are whole."""

FLAT_STEP_BYTES = 6.0
"""Bytes per value of its shard that an optimizer for fp16 with sharded states makes in the update.

The gradients of the shard as one flat tensor of 2, and its fp32 copy of 4 (DeepSpeed, `stage_1_and_2.py`, `step`: flatten,
then `.to(dtype)`); the kernel itself (FusedAdam) needs none.
"""

BUCKET_VALUES = 5e8
"""Gradients reduced by one call while the backward pass goes on (reduce_bucket_size of DeepSpeed, default)."""

LOGIT_BYTES = 14.0
"""Bytes per logit at the peak: the product in 2, its fp32 copy 4, the log-softmax 4, its gradient 4."""

IN_PLACE_LOGIT_BYTES = 8.0
"""The same of the loss of tensor ranks: the fp32 copy 4, and 4 less their maximum, which become softmax and gradient in place.

(nanotron, `_ShardedCrossEntropy`, from Megatron-LM.)
"""

FUSED_LOGIT_BYTES = 6.0
"""The same with a fused cross entropy that writes the gradient in 2 bytes: what the best software needs."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of the fullest rank of a layout.

    `update` is what the optimizer step needs beyond what the activations, gone by then, leave free; `queued` is free for the
    program and not yet for the device; `fused` is what a fused loss would save, `spare` what gradients kept once and in 2 bytes
    and an update without temporaries would save, where the software is not known; `moved` is what some software keeps off the
    chip; `rare` what only some software of its kind spares: a stated layout may have run with it, but
    nobody counts on it who chooses a layout. `first` is what the first pipeline rank holds: most software prints the memory of
    rank 0, and with fewer micro-batches than stages the last rank can be fuller.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathered: float
    update: float
    slack: float
    spare: float = 0.0
    moved: float = 0.0
    first: float = 0.0
    rare: float = 0.0
    queued: float = 0.0
    fused: float = 0.0

    @property
    def least(self) -> float:
        """The same with the best software: fused loss and update, no allocator slack, replicated gradients in 2 bytes."""
        return self.total - self.slack - self.fused - self.spare - self.moved - self.rare

    @property
    def total(self) -> float:
        """What the framework's allocator needs at its peak; without driver context."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.gathered + self.update + self.slack

    @property
    def held(self) -> float:
        """What it reports: an allocator that gets no more memory waits for the device, so `queued` is never what is missing."""
        return self.total + self.queued

    def by_part(self) -> dict[str, float]:
        """Part -> bytes."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
            "gathered": self.gathered,
            "update": self.update,
            "slack": self.slack,
        }


def context_bytes(case: Case) -> float:
    """Device memory that the allocator cannot have; none on a TPU, whose compiler plans all that the chip says it has."""
    return 0.0 if on_tpu(case) else CONTEXT_BYTES


def layer_parameters(case: Case) -> tuple[float, float]:
    """(dense, expert) parameters of one layer on one rank."""
    model = case.model
    split = model.attention_parameters + (0 if model.experts else model.expert_parameters)
    dense = split / case.tensor + (model.dense_layer_parameters - split)
    experts = model.experts * model.expert_parameters / (case.tensor * case.expert) if model.experts else 0.0
    return dense, experts


@dataclass(frozen=True)
class RankShare:
    """What one pipeline rank holds: layers over all its chunks, dense and expert parameters."""

    layers: int
    dense: float
    experts: float


def rank_shares(case: Case) -> tuple[RankShare, ...]:
    """The share of every pipeline rank."""
    dense, experts = layer_parameters(case)
    matrix = case.model.embedding_parameters / case.tensor
    last = case.pipeline * case.virtual_stages - 1
    if case.pipeline == 1:
        layers = [case.model.layers]
    elif case.schedule in V_SHAPED:
        counts = case.layers_per_stage
        layers = [counts[rank] + counts[last - rank] for rank in range(case.pipeline)]
    else:
        layers = [sum(case.layers_per_stage[rank :: case.pipeline]) for rank in range(case.pipeline)]
    shares = [RankShare(own, own * dense, own * experts) for own in layers]
    ends = {0: 1}
    if last or not case.model.tied_embeddings:
        holder = rank_of(last, case.pipeline, case.schedule)
        ends[holder] = ends.get(holder, 0) + 1
    for rank, number in ends.items():
        shares[rank] = replace(shares[rank], dense=shares[rank].dense + number * matrix)
    return tuple(shares)


def state_bytes(case: Case, dense: float, experts: float) -> tuple[float, float, float]:
    """(parameters, gradients, optimizer) bytes of one rank for these parameters (ZeRO, arXiv:1910.02054, section 5).

    Mixed precision: working copy 2, gradient (`gradient_bytes`), master and two Adam moments 12 bytes a parameter. With
    everything sharded (stage 3) the master is the parameter: 4 + 4 + 8. fp32: 4 + 4 + 8. Pure bf16: 2 + 2 + 4. In a pipeline
    the gradients of stage 2 are summed over the micro-batches before they are reduced, so they stay whole (`whole_gradients`).
    """
    shards = case.data * case.context
    expert_shards = max(1, shards // case.expert)
    if case.precision == "fp32":
        sizes = (4.0, 4.0, 8.0)
    elif case.precision == PURE:
        sizes = (2.0, gradient_bytes(case), optimizer_bytes(case))
    else:
        sizes = (4.0, 4.0, 8.0) if case.zero_stage == 3 else (2.0, gradient_bytes(case), 12.0)
    from_stage = (3, 2, 1)
    totals = [0.0, 0.0, 0.0]
    for parameters, ways in ((dense, shards), (experts, expert_shards)):
        for index, (size, stage) in enumerate(zip(sizes, from_stage, strict=True)):
            split = case.zero_stage >= stage and not (index == 1 and whole_gradients(case))
            totals[index] += parameters * size / (ways if split else 1)
    return totals[0], totals[1], totals[2]


def whole_gradients(case: Case) -> bool:
    """Whether every rank keeps all gradients of its stage until the last micro-batch."""
    return case.zero_stage < 2 or (case.zero_stage == 2 and case.pipeline > 1 and case.micro_batches > 1)


def gradient_bytes(case: Case) -> float:
    """Bytes of a gradient before the step: summed in fp32, but in fp16 where sharded states belong to fp16 parameters.

    Both optimizers of that kind make fp32 copies of the shard's gradients in the step (DeepSpeed, `stage_1_and_2.py`;
    Megatron-LM, docs of the distributed optimizer: 4 + 16 / d bytes a parameter with fp16 gradients, 6 + 12 / d in bf16).
    """
    return 2.0 if flat_shards(case) or case.precision == PURE else 4.0


def flat_shards(case: Case) -> bool:
    """Whether an optimizer for 16 bits holds the states as flat shards beside whole parameters.

    At stage 2 DeepSpeed's is the same one for fp16 and bf16 (`stage_1_and_2.py`); a row that says whether it was compiled, or
    whose software is known, is other software's.
    """
    if case.precision == "bf16" and case.zero_stage == 2 and case.compile is None and not case.engine:
        return True
    return case.precision == "fp16" and case.zero_stage in (1, 2)


def optimizer_bytes(case: Case) -> float:
    """Bytes of optimizer states per value: two moments, and the master weight where the working copy is shorter."""
    if case.precision == PURE:
        return 4.0
    return 8.0 if case.precision == "fp32" or case.zero_stage == 3 else 12.0


def gathered_bytes(case: Case) -> float:
    """Whole parameters and gradients that sharded data parallelism holds for a moment.

    Two blocks are gathered at a time (the one in use and the one ahead), and the gradient of one is waiting to be
    reduced. Classic software holds one block and its gradient, 2 bytes each; with parameters whole, the bucket of
    gradients that DeepSpeed reduces.
    """
    if case.data * case.context == 1:
        return 0.0
    if case.zero_stage != 3:
        return 2.0 * BUCKET_VALUES if flat_shards(case) else 0.0
    dense, experts = layer_parameters(case)
    if case.classic:
        return (dense + experts) * 4.0
    if on_tpu(case):  # XLA gathers in front of every product, not a block at once
        matrices = max(1.0, case.model.experts / case.expert)
        dense, experts = 0.0, matrices * case.model.hidden * case.model.ffn_hidden / case.tensor
    block = max(dense + experts, case.model.embedding_parameters / case.tensor)
    size = 4.0 if case.precision == "fp32" else 2.0
    return block * (2.0 * size + (2.0 if case.precision == PURE else 4.0))


def _update_bytes(case: Case) -> float:
    """Temporary bytes per value of the update; none if it is one fused kernel. See `UPDATE_BYTES`, `FLAT_STEP_BYTES`."""
    if flat_shards(case):
        return FLAT_STEP_BYTES
    if case.deepspeed:
        return 0.0
    if case.precision == PURE:
        return PURE_UPDATE_BYTES
    return UPDATE_BYTES if not case.classic and (case.zero_stage > 0 or case.precision == "fp32") else 0.0


def _slack(case: Case) -> float:
    """Share of what changes during the step that the allocator holds beyond what is asked for."""
    if case.deepspeed and case.pipeline > 1:
        return OLD_SLACK
    return EAGER_SLACK if case.eager_parallel else SLACK


def _handed_on(case: Case) -> float:
    """Bytes of the output of a stage, which waits for its backward pass with the micro-batch in flight.

    (DeepSpeed, `PipelineEngine`, `pipe_buffers["outputs"]`; PyTorch, `PipelineStage.fwd_cache`.) Megatron-LM frees it once it
    is sent (Korthikanti et al. 2022, appendix B; `deallocate_pipeline_outputs`).
    """
    if case.pipeline == 1 or case.engine or (case.classic and not case.deepspeed):
        return 0.0
    size = 2.0 * case.tokens * case.model.hidden * (2.0 if case.precision == "fp32" else 1.0)
    return size / (case.tensor if case.sequence_parallel else 1)


def _reusable(case: Case, activations: float, logits: float) -> float:
    """Bytes left free by the backward pass in which the temporaries of the update find room.

    A caching allocator serves a request from a freed block at least as large, of the same stream (PyTorch, notes on CUDA
    semantics, memory management). A temporary is as large as what the optimizer holds as one tensor: the shard of a whole
    block (stage 3), or the largest matrix. Gathered parameters live on the stream of their collective and free nothing.
    """
    model, shards = case.model, case.data * case.context
    wide = model.ffn_hidden * (2 if model.gated_ffn else 1) / case.tensor
    if case.zero_stage == 3:
        tensor = 4.0 * sum(layer_parameters(case)) / shards
    else:
        tensor = 4.0 * model.hidden * wide / (shards if case.zero_stage else 1)
    element = 4.0 if case.precision == "fp32" else 2.0
    block = element * case.tokens * max(wide, model.hidden)
    scores = 4.0 * case.tokens * math.ceil(model.vocab / case.tensor)
    return (activations if block >= tensor else 0.0) + (logits if scores >= tensor else 0.0)


def _off_chip(case: Case, logits: float, kept: float, optimizer: float) -> float:
    """Bytes that some software need not hold: the inputs of layers wait in the memory of the host.

    For TPUs (MaxText: remat policies with `offload`, `optimizer_memory_host_offload`), where logits are made in tiles as well
    (`num_vocab_tiling`; what is left is an eighth); and DeepSpeed's checkpoints where tensor ranks hold a part each
    (`partition_activations`, `cpu_checkpointing`).
    """
    if on_tpu(case):
        tiled = (FUSED_LOGIT_BYTES / LOGIT_BYTES) * logits * 7.0 / 8.0
        return tiled + optimizer + (kept if case.recompute == "full" else 0.0)
    return kept if case.deepspeed and case.zero_stage == 3 and case.tensor > 1 and case.recompute == "full" else 0.0


def _shards_anyway(case: Case) -> float:
    """Share of the optimizer's states that software for bf16 may spread over replicas, though the row says stage 0.

    DeepSpeed's optimizer for bf16 does so at any stage that it serves (`bf16_optimizer.py`: every data rank holds its partition
    of the fp32 weights and of their moments).
    """
    ways = case.data * case.context
    if case.zero_stage or case.precision != "bf16" or case.engine or case.compile or on_tpu(case):
        return 0.0
    return 1.0 - 1.0 / ways


def rank_memory(case: Case, in_flight: Sequence[int], shares: Sequence[RankShare]) -> MemoryParts:
    """Peak of the fullest pipeline rank.

    Args:
        in_flight: chunks in flight at the peak, one entry a pipeline rank (one chunk is one stage of the model).
        shares: what every rank holds, from `rank_shares`.
    """
    best: MemoryParts | None = None
    kept, working = kept_bytes(case)
    in_place = case.eager_parallel and case.tensor > 1
    loss = IN_PLACE_LOGIT_BYTES if in_place else LOGIT_BYTES
    logits = loss * case.tokens * math.ceil(case.model.vocab / case.tensor)
    gathered, handed_on, whole = gathered_bytes(case), _handed_on(case), standing_bytes(case)
    end = rank_of(case.pipeline * case.virtual_stages - 1, case.pipeline, case.schedule)
    most, first, known = -1, 0.0, flat_shards(case) or (case.deepspeed and case.precision == "fp16")
    fused_loss = 0.0 if in_place else 1.0 - FUSED_LOGIT_BYTES / loss
    leaves = spare_activations(case, kept)
    for rank, share in enumerate(shares):
        if rank not in (0, end) and share.layers <= most and in_flight[rank] <= in_flight[rank - 1]:
            continue  # an earlier rank holds as many layers and as many micro-batches
        most = max(most, share.layers)
        parameters, gradients, optimizer = state_bytes(case, share.dense, share.experts)
        copies = 0.0
        if (
            not case.classic
            and not case.engine
            and not known
            and case.zero_stage < 3
            and case.precision not in ("fp32", PURE)
        ):
            values = share.dense + share.experts  # gradients that are sharded are reduced and freed bucket by bucket
            copies = HALF_GRADIENT_BYTES * (values if whole_gradients(case) else min(values, BUCKET_VALUES))
        layers = share.layers / case.virtual_stages
        head = logits if rank == end else 0.0
        activations = in_flight[rank] * (layers * kept + handed_on) + whole
        activations += max(0.0, working - head) if layers else 0.0
        temporary = _update_bytes(case) * optimizer / optimizer_bytes(case)
        update = max(0.0, temporary - _reusable(case, activations, head))
        slack = _slack(case) * (activations + head + gathered + update) + WORKSPACE_BYTES
        spare = in_flight[rank] * layers * leaves + (0.0 if known else copies + update)
        if not known and case.precision not in ("fp32", PURE) and (case.zero_stage in (1, 2) or on_tpu(case)):
            spare += 0.5 * gradients
        rare = _shards_anyway(case) * optimizer + in_flight[rank] * layers * spare_of_experts(case)
        moved = _off_chip(case, head, in_flight[rank] * layers * kept, optimizer)
        found = MemoryParts(
            parameters,
            gradients + copies,
            optimizer,
            activations,
            head,
            gathered,
            update,
            slack,
            spare,
            moved,
            rare=rare,
            queued=queued_bytes(case, layers, in_flight[rank]),
            fused=fused_loss * head,
        )
        first = found.held if rank == 0 else first
        if best is None or found.total > best.total:
            best = found
    assert best is not None, "a case has at least one pipeline rank"
    return replace(best, first=first)
