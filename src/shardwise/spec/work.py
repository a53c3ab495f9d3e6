"""What a training step consists of, operation by operation, and what else of a job costs time or memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shardwise.errors import UserError
from shardwise.spec.facts import ModelFacts

Phase = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class OperationFacts:
    """Equal operations of one block. For a batch of b samples one call takes fixed + b * sample of everything.

    Attributes:
        block: index of the block in `ModelFacts.blocks`.
        phase: forward pass, backward pass or optimizer step.
        kind: as `shardwise probe` names them; `view` moves nothing.
        precision: of its operands.
        calls: how many equal ones a step makes.
        weighted: it reads a parameter, or makes the gradient of one.
    """

    block: int
    phase: Phase
    kind: str
    precision: str
    calls: int
    fixed_flops: float
    sample_flops: float
    fixed_bytes: float
    sample_bytes: float
    weighted: bool = False

    def flops(self, samples: float) -> float:
        """FLOPs of one call."""
        return self.fixed_flops + samples * self.sample_flops

    def moved_bytes(self, samples: float) -> float:
        """Bytes read and written by one call."""
        return self.fixed_bytes + samples * self.sample_bytes


@dataclass(frozen=True, kw_only=True)
class StepSeen:
    """A real step in a process apart: what prediction can be held against, on that machine."""

    samples: int
    seconds: float
    threads: int


@dataclass(frozen=True, kw_only=True)
class CutFacts:
    """A place where a pipeline may cut the model, as training sees it (parallel/pipeline/cuts.py).

    Attributes:
        name: of the module that would start a stage.
        work: part of the estimated work of the forward pass that is done before.
        block: index in `ModelFacts.blocks` of the block that it lies in or starts.
        inside: the part of that block's work that is done before.
        sent_bytes: what crosses it forward for one sample: everything made before that is needed after.
        returned_bytes: gradients of one sample that come back.
        shared_bytes: parameters that are used on both sides, whose gradients are summed over the stages.
    """

    name: str
    work: float
    block: int
    inside: float
    sent_bytes: float
    returned_bytes: float
    shared_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GradientFacts:
    """Gradients of one shape, as PowerSGD takes them: a matrix of the first dim and of all others.

    Attributes:
        rows, columns: of the matrix.
        value_bytes: of one of its numbers.
        count: trained tensors of that shape.
    """

    rows: int
    columns: int
    value_bytes: int
    count: int = 1

    @property
    def bytes(self) -> int:
        """Size of one gradient."""
        return self.rows * self.columns * self.value_bytes

    def factor_rank(self, rank: int) -> int:
        """Columns of the two factors that are sent in its place; 0 where they would not be smaller (parallel/compress.py)."""
        least = min(rank, self.rows, self.columns)
        smaller = least * (self.rows + self.columns) < self.rows * self.columns
        return least if smaller and self.value_bytes >= 4 else 0


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """A job as the planner sees it: the model, its operations, its memory, its data.

    Attributes:
        model: the model block by block.
        operations: everything one step calls, forward, backward and optimizer.
        batch_size: samples per step, over all workers.
        steps: steps of the whole training, None where the data does not tell.
        peak_fixed_bytes, peak_sample_bytes: most bytes of tensors alive beside parameters and optimizer states, as a
            linear function of the samples of a forward pass; gradients are in it.
        optimizer_bytes: optimizer states.
        gradient_bytes: gradients of all trained parameters.
        parameter_bytes: parameters and buffers.
        expert_bytes: of the parameters, those that the expert axis deals out.
        shard_units: parts whose parameters sharded data parallelism gathers one after the other, beside the rest.
        expert_layers: layers with experts, and expert_token_bytes: what one sample sends to experts in all of them.
        message_parts: trained tensors; their gradients travel together in buckets.
        gradients: shapes of the trained tensors; empty where they were not counted.
        cuts: places where a pipeline may cut it, in order; empty where they were not looked for or there are none.
        norm_layers: layers that need statistics of the whole batch, a message in each direction each.
        attention_bytes: keys and values of one sample over all attention layers, which the context axis passes around.
        data_seconds: reading one sample, on one core.
        data_whole: every rank reads all samples of a global batch, and keeps its own.
        data_bytes: resident data set, shared by forked workers.
        base_bytes: resident memory of a process beside all tensors of the training; 0 where nothing ran.
        seen: real steps on this machine, one thread; empty where nothing ran.
        place: where `seen` and `base_bytes` come from, as `Measured.place`; empty where nothing ran.
        clip: gradients are clipped by their global norm.
    """

    model: ModelFacts
    operations: tuple[OperationFacts, ...]
    batch_size: int
    steps: int | None
    peak_fixed_bytes: float
    peak_sample_bytes: float
    optimizer_bytes: float
    gradient_bytes: float
    parameter_bytes: float
    expert_bytes: float = 0.0
    shard_units: int = 0
    expert_layers: int = 0
    expert_token_bytes: float = 0.0
    message_parts: int = 1
    gradients: tuple[GradientFacts, ...] = field(default=())
    cuts: tuple[CutFacts, ...] = field(default=())
    norm_layers: int = 0
    attention_bytes: float = 0.0
    data_seconds: float = 0.0
    data_whole: bool = False
    data_bytes: float = 0.0
    base_bytes: float = 0.0
    seen: tuple[StepSeen, ...] = field(default=())
    place: Mapping[str, str] = field(default_factory=dict)
    clip: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {**asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "JobFacts":
        """Build from plain data.

        Raises:
            UserError: a part is missing or unknown.
        """
        try:
            values = dict(record)
            values["model"] = ModelFacts.from_dict(values["model"])
            values["operations"] = tuple(OperationFacts(**item) for item in values["operations"])
            values["cuts"] = tuple(CutFacts(**item) for item in values.get("cuts", ()))
            values["gradients"] = tuple(GradientFacts(**item) for item in values.get("gradients", ()))
            values["seen"] = tuple(StepSeen(**item) for item in values.get("seen", ()))
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise UserError(f"job facts: {error}; they are counted again when the file is removed") from error
