"""Case: one training configuration of a transformer on a machine, with nothing unknown left."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from shardwise.errors import PlanError
from shardwise.spec.facts import Transformer
from shardwise.spec.layout import Layout
from shardwise.spec.machine import Accelerator, Machine

RECOMPUTES = ("none", "selective", "full")
ATTENTIONS = ("flash", "math")
PURE = "pure-bf16"
"""Weights, gradients and optimizer states in bf16 alone: no fp32 copy of the weights."""

PRECISIONS = ("fp32", "fp16", "bf16", PURE, "fp8", "fp4")
NARROW = ("fp8", "fp4")
"""Precisions of the matrix products alone; everything else stays in bf16."""

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, PURE: 2, "fp8": 2, "fp4": 2}
"""Bytes of one activation."""

BLACKWELL = ("b100", "b200", "b300", "gb200", "gb300")
"""Catalogue names of that generation."""

HOPPER = ("h100", "h200", "h800", "gh200")
"""Catalogue names of the generation before."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is predicted.

    Attributes:
        data: ranks that see different samples, whether their states are sharded or not.
        zero_stage: 0 replicated, 1 optimizer states sharded over `data`, 2 also gradients, 3 also parameters.
        virtual_stages: model chunks per pipeline rank.
        expert: ways the experts are split; these ranks are part of `data`.
        micro_batch: sequences per rank and forward pass.
        sequence_parallel: activations outside the matrix products are split over the tensor ranks too.
        attention: `flash` never writes the score matrix, `math` does.
        compile: the model runs through a compiler that fuses its element-wise kernels; None is unknown.
        stage_layers: layers of every stage, in model order; empty for what software does by itself (`layers_per_stage`).
        schedule: `gpipe`, `1f1b`, `interleaved1f1b`, `zerobubble`, `zbv` or `dualpipev`.
    """

    model: Transformer
    machine: Machine
    seq_len: int
    global_batch: int
    micro_batch: int
    data: int = 1
    zero_stage: int = 0
    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    attention: str = "flash"
    precision: str = "bf16"
    compile: bool | None = False
    schedule: str = "1f1b"
    stage_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "seq_len",
            "global_batch",
            "micro_batch",
            "data",
            "tensor",
            "pipeline",
            "virtual_stages",
            "context",
            "expert",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PlanError(f"{name}={value!r}: it must be a whole number of at least 1")
        for name, allowed in (("recompute", RECOMPUTES), ("attention", ATTENTIONS), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise PlanError(f"{name}={getattr(self, name)!r}: it must be one of {', '.join(allowed)}")
        stages = self.pipeline * self.virtual_stages
        if self.stage_layers and (len(self.stage_layers), sum(self.stage_layers)) != (stages, self.model.layers):
            raise PlanError(
                f"stage_layers={self.stage_layers}: {stages} numbers that sum to {self.model.layers} are needed"
            )
        if self.zero_stage not in (0, 1, 2, 3):
            raise PlanError(f"zero_stage={self.zero_stage!r}: it must be 0, 1, 2 or 3")

    @property
    def workers(self) -> int:
        """Ranks in all."""
        return self.data * self.tensor * self.pipeline * self.context

    @cached_property
    def micro_batches(self) -> int:
        """Forward passes of one rank per optimizer step."""
        return max(1, math.ceil(self.global_batch / (self.data * self.micro_batch)))

    @cached_property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank: sequences x its part of the sequence."""
        return self.micro_batch * math.ceil(self.seq_len / self.context)

    @cached_property
    def classic(self) -> bool:
        """Software of the time before fused attention and bf16 (until 2022).

        A kernel that writes the score matrix in fp16 tells the age of the training stack, and with it what that stack
        could not do yet: hide the gradient reduction of replicas behind the backward pass, gather the shards of a whole
        block at once and ahead of time, or balance the output projection against the layers of a pipeline.
        """
        return self.attention == "math" and self.precision == "fp16"

    @property
    def deepspeed(self) -> bool:
        """Megatron-DeepSpeed: until 2022 nobody else sharded states beside an attention that writes its scores."""
        return (
            self.attention == "math" and self.zero_stage > 0 and self.precision in ("fp16", "bf16") and not self.engine
        )

    @cached_property
    def engine(self) -> bool:
        """Software built on NVIDIA's Transformer Engine (Megatron-LM, NeMo, from 2023 on).

        fp8 without a compiler is theirs, unless the row says that it is PyTorch's fully sharded training run eagerly, which
        takes no more than their linear layers. So are layers or sequences split over ranks of Hopper parts, unless the row
        says otherwise: it is the default of Megatron-LM (--transformer-impl), and other software that splits them there is
        published as eager, compiled or sharded. Blackwell parts are younger than what was used before. They bring fused
        kernels for everything beside the products, the attention kernels of cuDNN, collectives of tensor parallelism cut up
        and hidden behind the products they feed, and token exchanges with one copy a node; they keep the inputs of fp8
        products in fp8 only, let the products add into the fp32 gradient, and gather parameters beside the forward pass.
        """
        if self.compile or self.precision == "fp32":
            return False
        if self.machine.accelerator.name.startswith(BLACKWELL):
            return True
        if self.compile is None and self.precision in NARROW:
            return True
        if self.zero_stage == 3:
            return False
        split = self.tensor * self.pipeline * self.expert * self.context > 1
        hopper = self.compile is None and self.machine.accelerator.name.startswith(HOPPER)
        return self.precision in NARROW or (hopper and split)

    @property
    def loops(self) -> bool:
        """Layers are the rounds of a compiled loop, as `jax.lax.scan` makes them on TPUs (MaxText, scan_layers)."""
        return bool(self.compile) and self.machine.accelerator.name.startswith("tpu")

    @property
    def graphs(self) -> bool:
        """Layers are launched as CUDA graphs: what the recipes of that software do on Blackwell, and not on older parts.

        (NVIDIA NeMo, recommended model configurations, column cuda_graphs, 2025; Megatron Bridge, performance recipes, 2026.)
        Experts are not part of them: how many tokens each one gets is known when the router has run, so that their kernels
        have no fixed shapes (Megatron Bridge, performance guide, "Lowering host overhead": dropless mixtures of experts have
        graphs for their dense modules alone).
        """
        return self.engine and self.machine.accelerator.name.startswith(BLACKWELL)

    @property
    def repeats_core(self) -> bool:
        """What `selective` recomputes: the attention core alone, or (False) every second product and all that is cheap.

        The first is Megatron's (Korthikanti et al. 2022, section 5), the second that of PyTorch's fully sharded training
        (torchtitan, selective activation checkpointing), which is what stage 3 beside fused attention stands for.
        """
        return self.attention == "math" or self.zero_stage < 3

    @property
    def reduces_behind(self) -> bool:
        """Gradients of replicas are reduced when the last backward pass is over.

        Pipelines sum all micro-batches first, in buffers of their own, and reduce those (Megatron-LM, `--overlap-grad-reduce`,
        off unless asked for; DeepSpeed, `PipelineEngine._exec_reduce_grads`); the engine's recipes ask for it. Classic
        software had nothing else.
        """
        return self.classic or (self.pipeline > 1 and self.zero_stage <= 1 and not self.engine)

    @property
    def fusion(self) -> float:
        """How much of the element-wise work runs in fused kernels: 1 compiled or classic, 0 eager, half where unknown.

        Classic stacks brought fused kernels of their own for exactly these parts. Where nobody says so, sharded training that
        splits no layers compiles nothing: it is the default of DeepSpeed and of PyTorch's, around models as they were written.
        """
        if self.classic or self.engine:
            return 1.0
        if self.compile is not None:
            return float(self.compile)
        return 0.0 if self.zero_stage >= 2 and self.tensor * self.pipeline == 1 else 0.5

    @property
    def eager_parallel(self) -> bool:
        """Software that splits layers over ranks around fused attention and runs eagerly: nanotron, after Megatron-LM.

        Its norms are those of the package of its attention, one kernel that keeps its input alone, and the loss of its tensor
        ranks turns the softmax into the gradient in place (nanotron: `TritonRMSNorm`, `sharded_cross_entropy`).
        Replicas alone may be anybody's, fully sharded training is PyTorch's.
        """
        fused = self.attention == "flash" and self.precision in ("bf16", PURE, "fp16")
        return self.compile is False and fused and self.zero_stage < 3 and self.tensor * self.pipeline > 1

    @cached_property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of every stage, in model order; `pipeline * virtual_stages` entries."""
        if self.stage_layers:
            return self.stage_layers
        stages = self.pipeline * self.virtual_stages
        layers = self.model.layers
        if self.classic or stages == 1:
            more = layers % stages
            return (layers // stages + 1,) * more + (layers // stages,) * (stages - more)
        return balanced(layers, stages, self.head_in_layers)

    @property
    def head_in_layers(self) -> float:
        """FLOPs of the output projection over those of one layer."""
        whole = self.model.forward_flops(self.seq_len)
        head = 2.0 * self.seq_len * self.model.embedding_parameters
        return head / ((whole - head) / self.model.layers)

    def layout(self) -> Layout:
        """The same degrees as a mesh layout: sharded ranks on `shard`, experts on `expert`."""
        rest = max(1, self.data // self.expert)
        sharded = self.zero_stage > 0
        return Layout(
            data=1 if sharded else rest,
            shard=rest if sharded else 1,
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            expert=self.expert,
        )


def usual_kernels(accelerator: Accelerator) -> tuple[str, str]:
    """(attention, precision) of the software that a part is used with: the fused kernels and bf16 came with Ampere's units.

    Raises:
        PlanError: no rate is stated for either precision.
    """
    peaks = {name: figure.value for name, figure in accelerator.peak_flops.items() if name in ("bf16", "fp16")}
    if not peaks:
        raise PlanError(
            f"{accelerator.name} states rates for {', '.join(accelerator.peak_flops) or 'nothing'}: --model needs peak_flops and "
            "matmul_fraction for bf16 or fp16"
        )
    return ("flash", "bf16") if peaks.get("bf16", 0.0) >= peaks.get("fp16", 0.0) else ("math", "fp16")


@lru_cache(maxsize=4096)
def balanced(layers: int, stages: int, head: float) -> tuple[int, ...]:
    """Split `layers` equal layers and an output projection worth `head` layers over stages, in model order.

    Of two rules that frameworks follow the one whose largest stage is smaller: as even as possible, or a stage is full as
    soon as the work up to its end exceeds its share of the whole.
    """
    even = (layers // stages + 1,) * (layers % stages) + (layers // stages,) * (stages - layers % stages)
    counts = [0] * stages
    share = (layers + head) / stages
    stage = 0
    for layer in range(1, layers + 1):
        counts[stage] += 1
        if layer > share * (stage + 1) and stage < stages - 1:
            stage += 1
    if max(*even[:-1], even[-1] + head) <= max(*counts[:-1], counts[-1] + head):
        return even
    return tuple(counts)
