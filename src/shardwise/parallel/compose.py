"""The one order in which the kinds of parallelism are applied to a model, and what each of them refuses.

1. What is found out about the model as its user built it: a pipeline's cuts (`cut_model`), the tensor axis' split (`find_split`).
2. What the user attached to parameters is noted, because later steps put others in their places. BatchNorm is made global,
   because every later step must see the final forward functions.
3. Replicas get equal weights, while every rank still holds all of them.
4. The tensor axis cuts single weights, which must be whole for that; then context and experts, whose functions must see its
   pieces. A rank keeps its pipeline stages, before anything is sharded inside of them.
5. Recomputation wraps forward functions, which are final now; what FSDP2 does around a call must not be done again.
6. Parameters are sharded: from here on a rank holds a part of each. Weights that were left without memory so far get their
   values here, those of one unit at a time.
7. The gradient reduction is planned over what is not reduced yet.
8. Compilation wraps what is left, so that it sees the model as it will run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.dist.split import is_elsewhere
from shardwise.errors import PlanError
from shardwise.parallel.attached import Attached, take_off
from shardwise.parallel.compiled import check_compiled
from shardwise.parallel.compress import CompressedSum, LowRankSum, check_compression, compressed_sum
from shardwise.parallel.context.split import Checked, ContextSplit
from shardwise.parallel.data import GradientSum, GradientSums, sparse_parameters
from shardwise.parallel.expert import check_experts, expert_parameters, forward_meets_others, split_experts
from shardwise.parallel.local import LocalSteps, check_local_steps
from shardwise.parallel.norm import BatchState, OwnStatistics, batch_norms, globalize_batch_norm
from shardwise.parallel.replicas import broadcast_state
from shardwise.spec.plan import HALVED, Plan
from shardwise.spec.runnable import check_plan, unhalved
from shardwise.spec.shares import share_bounds

if TYPE_CHECKING:
    from shardwise.parallel.deferred.build import Deferred
    from shardwise.parallel.pipeline.stages import Cut, StageGradients, Stages
    from shardwise.parallel.recompute import Recomputed
    from shardwise.parallel.shard import Sharded
    from shardwise.parallel.tensor.plan import TensorPlan

READY_AXES = ("data", "shard", "tensor", "pipeline", "context", "expert")
"""Axes that this version can run; the others are planned for and refused."""

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _always(_: nn.Parameter) -> bool:
    return True


@final
@dataclass
class Composed:
    """A model ready to train under a plan.

    Attributes:
        model: the user's module, changed in place.
        gradients: sums the gradients over the ranks.
        state: tells layers that look at the whole batch about the forward pass under way.
        forward_communicates: the forward pass holds collectives, so every rank must walk through it in every step.
        remarks: what will not equal the serial run, one sentence each.
        context: splits batches over the context axis, where there is one.
        split: how the tensor axis splits the parameters, where there is one.
        recomputed: what is computed again in the backward pass, where the plan says so.
        stages: this rank's part of the pipeline, where the plan has one.
        apart: groups of ranks with different parameters, for clipping.
        counted: whether this rank is the one that counts a parameter in a norm over `apart`.
        attached: what users attached to parameters: their hooks are called when the gradients are summed.
        sharded: what FSDP2 holds, where the plan shards.
        statistics: of BatchNorm layers that see their own rank's samples alone, where there are several ranks.
        frozen: parameters that were not trained when the model was composed, where that cannot change any more.
    """

    model: nn.Module
    gradients: GradientSum | GradientSums | StageGradients | CompressedSum | LocalSteps
    state: BatchState
    forward_communicates: bool
    remarks: tuple[str, ...]
    context: ContextSplit | None = None
    stages: Stages | None = None
    apart: tuple[Group, ...] = ()
    counted: Callable[[nn.Parameter], bool] = _always
    split: TensorPlan | None = None
    recomputed: Recomputed | None = None
    attached: Attached = field(default_factory=Attached)
    frozen: tuple[tuple[str, nn.Parameter], ...] = ()
    sharded: Sharded | None = None
    statistics: OwnStatistics | None = None

    def check_frozen(self) -> None:
        """Refuse what would not be trained without a word.

        Raises:
            PlanError: a parameter was thawed that the plan took for frozen.
        """
        for name, parameter in self.frozen:
            if parameter.requires_grad:
                raise PlanError(
                    f"parameter {name} was frozen when the run began and is to be trained now: pipeline stages, compression and "
                    "local_steps are planned for those trained at the start; stop and go on (resume) with a model that is built "
                    "with it trained, or use data=, shard= or tensor="
                )

    def keep_plans(self, count: int) -> None:
        """Steps train so many sets of parameters in turn: keep the buckets of each."""
        if isinstance(self.gradients, GradientSum | GradientSums):
            self.gradients.keep_plans(count)

    def forward_only(self) -> AbstractContextManager[None]:
        """Around a forward pass with its loss: refuses gradients that are taken in it, where they would go wrong."""
        return nullcontext() if self.sharded is None else self.sharded.forward_only()

    def settle_parameters(self) -> None:
        """After the passes of a step: what a forward pass gathered that no backward pass followed (a teacher, a generator that
        rests) is split again, or later writes to it would be lost."""
        if self.sharded is not None:
            from shardwise.parallel.shard import split_again

            split_again(self.model)

    @property
    def compressed(self) -> LowRankSum | None:
        """The sum that carries what it left out to the next step, where the plan says so."""
        return self.gradients if isinstance(self.gradients, LowRankSum) else None

    @property
    def local(self) -> LocalSteps | None:
        """Averages the replicas, where the plan lets them take steps of their own."""
        return self.gradients if isinstance(self.gradients, LocalSteps) else None


def check_layout(plan: Plan) -> None:
    """Refuse axes and settings that cannot run: none is ignored.

    Raises:
        PlanError: the layout has a degree above 1 on such an axis, or a setting that would have no effect.
    """
    layout = plan.layout
    for axis, degree in layout.degrees.items():
        if degree > 1 and axis not in READY_AXES:
            raise PlanError(
                f"plan {layout}: this version splits over {', '.join(READY_AXES)} only, not yet over {axis}; "
                f"use --plan data={layout.workers} or serial"
            )
    check_plan(plan)


def check_model(model: nn.Module, plan: Plan, *, batch_size: int, batch_norm: str) -> None:
    """Refuse what the plan cannot do for this model, before any worker starts.

    Raises:
        PlanError: names the module or setting, the rule, and what to do.
    """
    check_layout(plan)
    replicas = plan.layout.replicas
    if batch_size < replicas:
        raise PlanError(
            f"plan {plan.layout} with batch_size={batch_size}: {replicas - batch_size} of {replicas} workers would have "
            f"no sample in any step; use at most {batch_size} workers or a larger batch_size"
        )
    check_compression(model, plan)
    check_local_steps(model, plan, meets_others=forward_meets_others(model, plan.layout))
    sizes = [stop - start for start, stop in share_bounds(batch_size, replicas, plan.shares or None)]
    if min(sizes) < 1:
        raise PlanError(
            f"plan {plan} with batch_size={batch_size} gives its workers {', '.join(map(str, sizes))} samples of a global batch: "
            "each needs at least 1; raise the smallest of the shares"
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise PlanError(
            f"parameter {lazy[0]} has no shape yet (a Lazy module): give the layer its sizes, or run one batch through the "
            "model inside the job's model function"
        )
    if plan.layout.shard > 1:
        from shardwise.parallel.shard import check_shard  # FSDP2 takes a second to import: only where it is used

        check_shard(model, whole=plan.layout.pipeline == 1)
    if plan.recompute != "none":
        from shardwise.parallel.recompute import recomputed_modules

        recomputed_modules(model, plan)
    share = max(sizes)
    splits = plan.micro_batch is not None and plan.micro_batch < share
    check_experts(model, plan.layout, splits_share=splits)
    if plan.schedule in HALVED and forward_meets_others(model, plan.layout):
        raise PlanError(
            f"plan {plan.layout} with schedule={plan.schedule!r}: its backward passes are in two halves, in which layers with "
            f"experts cannot keep in step with other workers; use schedule={unhalved(plan)!r}"
        )
    check_compiled(model, plan)
    norms = batch_norms(model)
    if norms and splits and batch_norm == "global":
        raise PlanError(
            f"micro_batch={plan.micro_batch} would split a worker's {share} samples, but BatchNorm layer {norms[0][0]!r} needs "
            "statistics of the whole global batch at once; leave micro_batch out, use GroupNorm, or accept each "
            "forward pass's own statistics with Job.batch_norm='local'"
        )
    for name, module in model.named_modules():
        if isinstance(module, _InstanceNorm) and module.track_running_stats and (replicas > 1 or splits):
            raise PlanError(
                f"InstanceNorm layer {name!r} keeps running statistics, which would come from a part of the batch only; "
                "build it with track_running_stats=False, or train with --plan serial without micro_batch"
            )


def compose(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh,
    *,
    batch_norm: str,
    checked: Checked | None = None,
    cut: Cut | None = None,
    split: TensorPlan | None = None,
    deferred: Deferred | None = None,
) -> Composed:
    """Apply the plan to the model, in place and in the order stated above.

    Args:
        model: the user's module, built from the job's seed, on its device.
        plan: already accepted by `check_model`.
        mesh: all ranks of the run, arranged by the plan's layout.
        batch_norm: `global` or `local`, as in `Job.batch_norm`.
        checked: how sequences are split, where the plan splits them.
        cut: where the model is cut, where the plan has a pipeline.
        split: how the tensor axis splits the parameters, where the plan has one.
        deferred: gives `model` those weights that it lacks still, where it was built without.
    """
    state, attached = BatchState(), take_off(model)
    tokens = mesh.group("data", "shard", "context", "expert")
    communicates = batch_norm == "global" and tokens.size > 1 and globalize_batch_norm(model, tokens, state) > 0
    broadcast_state(model, mesh.world)
    on_pieces: Callable[..., Any] | None = None
    if split is not None:
        from shardwise.parallel.tensor.apply import apply_split

        axis = mesh.group("tensor"), mesh.device_mesh("tensor")
        on_pieces = apply_split(model, split, *axis, sharded_next=plan.layout.shard > 1)
    sparse = sparse_parameters(model)
    context: ContextSplit | None = None
    if checked is not None:
        context = ContextSplit(mesh.group("context"), checked)
        context.wire(model)
    experts = split_experts(model, mesh, state)
    communicates = communicates or context is not None or forward_meets_others(model, plan.layout)
    stages: Stages | None = None
    if cut is not None:
        from shardwise.parallel.pipeline.stages import StageGradients, take_stages

        around = on_pieces
        if context is not None:
            around = context.around if on_pieces is None else functools.partial(context.around, on_pieces)
        stages = take_stages(cut, model, mesh.group("pipeline"), plan, next(model.parameters()).device, around)
        if context is not None:
            stages.part.tracing = context.tracing
    recomputed = _recompute(model, plan, stages)
    sharded: Sharded | None = None
    if plan.layout.shard > 1:
        from shardwise.parallel.shard import shard_model

        dealt = {p for name, p in model.named_parameters() if name in experts}
        whole = None if stages is None else [name for name, _ in stages.part.units()]
        inside = () if split is None else split.inside
        keep = plan.zero_stage == 2
        sharded = shard_model(model, mesh, ignored=dealt, stage=whole, no_units=inside, deferred=deferred, keep=keep)
        communicates = True
    attached.put_back(model)
    named = [(name, p) for name, p in model.named_parameters() if not is_elsewhere(p)]
    summed = _plan_sums(named, plan, mesh, experts, sparse, sharded)
    gradients: GradientSum | GradientSums | StageGradients | CompressedSum | LocalSteps = summed
    apart: tuple[Group, ...] = ()
    counted: Callable[[nn.Parameter], bool] = _always
    if stages is not None:
        assert isinstance(summed, GradientSum | GradientSums)  # compression beside a pipeline is refused
        gradients, apart = StageGradients(summed, stages), (stages.group,)
        counted = frozenset(p for name, p in named if stages.part.owns(name)).__contains__
    remarks = _remarks(model, plan, batch_norm) + (() if split is None else split.remarks)
    if plan.compile and stages is not None:
        stages.part.compile()
    elif plan.compile:
        model.compile()
    frozen = _still_frozen(named) if cut is not None or not isinstance(summed, GradientSum | GradientSums) else ()
    statistics = OwnStatistics(model, tokens) if batch_norm == "local" and tokens.size > 1 else None
    done = context, stages, apart, counted, split, recomputed, attached, frozen, sharded, statistics
    return Composed(model, gradients, state, communicates, remarks, *done)


def _still_frozen(named: list[tuple[str, nn.Parameter]]) -> tuple[tuple[str, nn.Parameter], ...]:
    return tuple((name, p) for name, p in named if not p.requires_grad)


def _plan_sums(
    named: list[tuple[str, nn.Parameter]],
    plan: Plan,
    mesh: Mesh,
    experts: Collection[str],
    sparse: set[str],
    sharded: Sharded | None,
) -> GradientSum | GradientSums | CompressedSum | LocalSteps:
    tokens = mesh.group("data", "shard", "context", "expert")
    if plan.local_steps > 1:
        return LocalSteps(named, tokens, every=plan.local_steps)
    if plan.compression != "none":
        return compressed_sum(named, tokens, plan)
    dense = GradientSum(
        [(name, p) for name, p in named if name not in experts],
        tokens,  # what is sharded is left out, whatever its group
        sparse=sparse,
        sharded=sharded,
    )
    if not experts:
        return dense
    dealt_out = [(name, p) for name, p in named if name in experts]
    return GradientSums(dense, GradientSum(dealt_out, mesh.group("data", "shard", "context")))


def _recompute(model: nn.Module, plan: Plan, stages: Stages | None) -> Recomputed | None:
    if plan.recompute == "none":
        return None
    from shardwise.parallel.recompute import recompute, recompute_stages

    # Tokens may leave a rank without any for an expert, whose recomputation would then end earlier than on other ranks.
    early_stop = not expert_parameters(model)
    if stages is not None:
        return recompute_stages(stages.part, plan, early_stop=early_stop)
    return recompute(model, plan, early_stop=early_stop)


def _draws_masks(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1  # it drops between layers
    if isinstance(module, nn.RReLU):
        return module.lower < module.upper
    return isinstance(module, _DROPOUTS) and module.p > 0


def _remarks(model: nn.Module, plan: Plan, batch_norm: str) -> tuple[str, ...]:
    remarks = []
    split = plan.layout.replicas > 1 or plan.micro_batch is not None
    stochastic = [name for name, module in model.named_modules() if _draws_masks(module)]
    if stochastic and split:
        remarks.append(
            f"dropout ({stochastic[0]}) draws other masks than a serial run: equal in distribution, not in value"
        )
    if batch_norm == "local" and batch_norms(model) and split:
        remarks.append("BatchNorm uses each worker's own samples (batch_norm='local'): not the serial run")
    if plan.layout.pipeline > 1 and plan.micro_batch is None:
        remarks.append(
            "the pipeline has one micro-batch a step, so that its stages work one after the other: give micro_batch for them "
            f"to overlap, best {2 * plan.layout.pipeline} or more micro-batches in a worker's share of the batch"
        )
    if plan.compression != "none":
        rank = f" of rank {plan.compression_rank}" if plan.compression == "powersgd" else ""
        remarks.append(
            f"gradients are compressed ({plan.compression}{rank}) on their way between workers: not the serial run, by choice of "
            "the plan; `shardwise prove` measures how far it is away"
        )
    if plan.local_steps > 1:
        remarks.append(
            f"workers take {plan.local_steps} steps alone before their weights are averaged, and clip by their own norms: "
            "not the serial run, by choice of the plan; `shardwise prove` measures how far it is away"
        )
    if plan.precision == "bf16":
        remarks.append("bf16 autocast rounds to 8 bits: equal to a serial bf16 run up to that rounding")
    return tuple(remarks)
