"""What a training needs of a pipeline: the cut, found before anything is changed, and this rank's part, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeAlias, final

import torch
from torch import nn

from shardwise.dist.collectives import Group
from shardwise.errors import PlanError
from shardwise.parallel.blocks import repeated_blocks
from shardwise.parallel.data import GradientSum, GradientSums
from shardwise.parallel.pipeline.cuts import places, shared_names
from shardwise.parallel.pipeline.part import PipelinePart, Split, call_model, split, take_part
from shardwise.parallel.pipeline.program import Forward, Program, search_trace
from shardwise.parallel.pipeline.runner import PipelineRunner
from shardwise.parallel.pipeline.shared import SharedGradientSum
from shardwise.spec.plan import Plan, in_runs
from shardwise.spec.schedule import placement_of, stages_for
from shardwise.spec.work import CutFacts

OwnLoss: TypeAlias = Callable[[nn.Module, Any], Any]
"""`(model, (inputs, targets))` -> what the job's objective returns."""


@final
@dataclass(frozen=True)
class Cut:
    """A model and where it is cut; nothing is given away yet.

    Attributes:
        outputs: the forward pass of the model alone, where that of `split` computes the loss as well.
    """

    split: Split
    outputs: Program | None


@final
@dataclass(frozen=True)
class Stages:
    """This rank's part of a pipeline.

    Attributes:
        runner: takes steps, and evaluates; its inputs are `(inputs, targets)` pairs where the job computes its own loss.
        outputs: gives outputs of the model; the same as `runner` where that does.
        group: the ranks of this pipeline, in the order of their stages.
    """

    part: PipelinePart
    runner: PipelineRunner
    outputs: PipelineRunner
    group: Group

    @property
    def own_loss(self) -> bool:
        """Whether what runs through the pipeline includes the loss."""
        return self.outputs is not self.runner


def cut_model(
    model: nn.Module, plan: Plan, inputs: Any, targets: Any, own_loss: OwnLoss | None, *, device: torch.device
) -> Cut:
    """Find where to cut the model for a plan with a pipeline. Changes nothing; all ranks come to the same cuts.

    Args:
        model: the user's module on `device`, before any other kind of parallelism changed it.
        inputs: of a few samples, on `device`.
        targets: of the same.
        own_loss: the job's objective, None where it has a loss of outputs and targets.

    Raises:
        PlanError: the model cannot be cut so, or the schedule does not fit.
    """
    cuts = plan.cuts or _first_blocks(model, plan)
    stages = stages_for(plan.schedule, plan.layout.pipeline, cuts, plan.virtual_stages)
    outputs = _in_precision(call_model, plan, device)
    if own_loss is None:
        made = split(model, inputs, stages, cuts, forward=outputs)
        _check_parts(model, made, plan)
        return Cut(made, None)
    made = split(model, (inputs, targets), stages, cuts, forward=_in_precision(own_loss, plan, device))
    _check_parts(model, made, plan)
    return Cut(made, Program(model, outputs, made.program.cuts))


def _first_blocks(model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """The repeated blocks that start stages 1, 2, ... where the plan counts layers; nothing where it does not.

    Raises:
        PlanError: the model has another number of them.
    """
    if not plan.stage_layers:
        return ()
    blocks = repeated_blocks(model)
    if sum(plan.stage_layers) != len(blocks):
        raise PlanError(
            f"plan stage_layers={in_runs(plan.stage_layers)} is for a model of {sum(plan.stage_layers)} layers, but this one has "
            f"{len(blocks)} repeated blocks: leave stage_layers out to have the stages balanced, or name cuts"
        )
    return tuple(blocks[count] for count in accumulate(plan.stage_layers[:-1]))


def _check_parts(model: nn.Module, made: Split, plan: Plan) -> None:
    """Refuse a cut that leaves every stage with all parameters."""
    held = [len(made.holders[name]) for name, _ in model.named_parameters()]
    if held and min(held) == made.stages:
        raise PlanError(
            f"plan {plan.layout}: every stage would hold all parameters, because they are tied or their layers are called in all "
            f"stages: the pipeline would split nothing; use data={plan.layout.pipeline} in its place, or cut elsewhere with cuts"
        )


def possible_cuts(
    model: nn.Module,
    plan: Plan,
    inputs: Any,
    targets: Any,
    own_loss: OwnLoss | None,
    blocks: Sequence[str],
    *,
    device: torch.device,
) -> tuple[CutFacts, ...]:
    """Every place where a pipeline may cut the model, with what would cross it; bytes are of all samples of `inputs`.

    Args:
        model, inputs, targets, own_loss: as for `cut_model`.
        plan: its precision.
        blocks: names of modules, in the order in which they are called.

    Raises:
        PlanError: the model cannot be cut.
    """
    forward = _in_precision(own_loss or call_model, plan, device)
    trace = search_trace(model, forward, inputs if own_loss is None else (inputs, targets))
    parameters = dict(model.named_parameters())

    def shared(name: str) -> float:
        both = [parameters[used] for used in shared_names(trace, name) if used in parameters]
        return float(sum(p.numel() * p.element_size() for p in both if p.requires_grad))

    return tuple(replace(place, shared_bytes=shared(place.name)) for place in places(trace, blocks))


def take_stages(
    cut: Cut,
    model: nn.Module,
    group: Group,
    plan: Plan,
    device: torch.device,
    around: Callable[..., Any] | None = None,
) -> Stages:
    """Keep this rank's stages of the model, in place.

    Args:
        cut: of this very model.
        group: the ranks of this pipeline.
        around: runs what calls the model, where other axes have split its weights or its inputs.
    """
    placement = placement_of(plan.schedule, group.size, cut.split.stages)
    part = take_part(cut.split, model, group.rank, group.size, placement)
    if around is not None:
        part.around = around
    if plan.layout.tensor > 1:
        from shardwise.parallel.tensor.part import plain

        part.plain = plain
    runner = PipelineRunner(part, group, schedule=plan.schedule, device=device)
    outputs = runner
    if cut.outputs is not None:
        alone = replace(part, program=cut.outputs, _accepted=set())
        outputs = PipelineRunner(alone, group, schedule=plan.schedule, device=device)
    return Stages(part, runner, outputs, group)


@final
class StageGradients:
    """Sums gradients over the ranks that run the same stages, and then over the stages that hold the same parameter."""

    def __init__(self, same_stages: GradientSum | GradientSums, stages: Stages) -> None:
        self._same_stages = same_stages
        self._shared = SharedGradientSum(stages.part, stages.group)

    @property
    def bytes_per_step(self) -> int:
        """Bytes of dense gradients that each rank puts into the sums every step."""
        return self._same_stages.bytes_per_step + self._shared.bytes_per_step

    def expect(self) -> None:
        """The next backward pass is the last of this step."""
        self._same_stages.expect()

    def finish(self, *, scale: float | torch.Tensor | None = None) -> None:
        """As `GradientSum.finish`."""
        self._same_stages.finish(scale=scale)
        self._shared.finish()


def _in_precision(forward: Forward, plan: Plan, device: torch.device) -> Forward:
    """The forward pass under the plan's precision; backward passes, which come between, are not to be under it."""

    def context() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if plan.precision == "bf16" else nullcontext()

    def run(model: nn.Module, inputs: Any) -> Any:
        with context():
            return forward(model, inputs)

    return run
