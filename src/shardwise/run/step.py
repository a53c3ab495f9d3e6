"""One exact global step: the gradient of the mean over the global batch, whatever the number of workers.

With W the weight of the whole global batch (its samples, or what `Job.weight` counts), each micro-batch of weight w with
mean loss l adds w * l / W to the objective. These parts sum over micro-batches in `backward`, over ranks in the gradient
reduction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from shardwise.data.batch import Batch
from shardwise.errors import JobError, PlanError
from shardwise.parallel.clip import clip_by_global_norm
from shardwise.run.assemble import CPU, Assembly
from shardwise.run.coupled import divides_batches
from shardwise.run.culprit import note_batch
from shardwise.run.outputs import tensors_of
from shardwise.run.tryout import call_model
from shardwise.run.weigh import check_mean, is_looked_at, weight_function

if TYPE_CHECKING:
    from shardwise.parallel.pipeline.stages import Stages
    from shardwise.run.turns import Turn


_WIDE = (torch.float32, torch.float64)


@final
@dataclass(frozen=True)
class StepResult:
    """This rank's part of a step.

    Attributes:
        loss_sum: sum of the losses of this rank's items, a scalar on the compute device, without gradient.
        weight: items in the whole global batch: the loss of the step is the sum of all ranks' `loss_sum` over this.
        samples: samples in the whole global batch.
        gradient_norm: norm before clipping, where the job clips.
        losses: name of an objective -> this rank's part of its mean; `loss_sum` is their sum. Empty where the job has
            one only.
    """

    loss_sum: Tensor
    weight: float | Tensor
    samples: int
    gradient_norm: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)


def take_step(
    assembly: Assembly, batch: Batch, name: str | None = None, *, on_gradients: Callable[[], None] | None = None
) -> StepResult:
    """Forward, backward, reduce, clip, update: one optimizer step over the global batch of which `batch` is our part.

    A job with several objectives takes one such step with each, in their order; or with the one that is named.
    Collective: all ranks call it with their parts of one global batch.

    Args:
        assembly: what to step.
        batch: this rank's part.
        name: of an objective.
        on_gradients: called when every `parameter.grad` is that of the global batch and none is clipped yet.
    """
    a = assembly
    a.composed.check_frozen()
    turns = list(a.turns.values()) if name is None else [a.turn(name)]
    results = [_take_turn(a, turn, batch, index, on_gradients) for index, turn in enumerate(turns)]
    a.step += 1
    if a.composed.local is not None:
        a.composed.local.after_step(a.optimizer, a.step)
    a.clock.mark("optimizer")
    if not turns[0].name:
        return results[0]
    losses = {turn.name: one.loss_sum / one.weight for turn, one in zip(turns, results, strict=True)}
    norms = [one.gradient_norm for one in results if one.gradient_norm is not None]
    norm = torch.stack(norms).norm() if norms else None
    return StepResult(torch.stack(list(losses.values())).sum(), 1.0, batch.global_count, norm, losses)


def _take_turn(
    a: Assembly, turn: Turn, batch: Batch, index: int, on_gradients: Callable[[], None] | None
) -> StepResult:
    clock = a.clock
    seed_step(a.job.seed, a.step, a.reports.rank, a.device, turn=index)
    for parameter in a.parameters:
        parameter.grad = None
    parts = _micro_batches(a, batch)
    try:
        with turn.alone():
            loss_sum, weight = _passes(a, turn, batch, parts)
    except Exception as error:
        note_batch(error, batch, a.step)
        if (reason := _why_refused(a, turn, str(error))) is not None:
            raise PlanError(reason) from error
        raise
    a.composed.settle_parameters()
    a.composed.attached.call_hooks()
    clock.mark("synchronisation")
    if on_gradients is not None:
        on_gradients()
    norm = None
    if turn.clip_norm is not None:
        clipped = a.parameters if turn.trained is None else turn.trained
        norm = clip_by_global_norm(clipped, turn.clip_norm, apart=a.composed.apart, counted=a.composed.counted)
    turn.update()
    for scheduler in turn.schedules:
        scheduler.step()
    return StepResult(loss_sum, weight, batch.global_count, norm)


def _why_refused(a: Assembly, turn: Turn, error: str) -> str | None:
    """In our words, what torch says of objectives that a plan cannot do; None for other errors."""
    objective = f"objective {turn.name!r}" if turn.name else "objective"
    if a.world.size > 1 and "once_differentiable" in error:
        return (
            f"plan {a.plan.layout}: the {objective} differentiates a gradient again (create_graph=True, as a gradient penalty "
            "does), which the tensor axis and BatchNorm over several workers cannot. Use data=, and GroupNorm or "
            "LayerNorm in what the penalty looks at"
        )
    if a.plan.layout.shard > 1 and turn.objective is not None and "mixed torch.Tensor and DTensor" in error:
        return (
            f"plan {a.plan.layout}: the {objective} computes with parameters that FSDP2 gathers only when the model itself is "
            f"called. Let it call model(...), or give the model ({type(a.model).__name__.removeprefix('FSDP')}) no forward pass, "
            "such as an nn.ModuleDict of its parts, so that each part is gathered when it is called; or use data="
        )
    return None


def _passes(a: Assembly, turn: Turn, batch: Batch, parts: list[Batch]) -> tuple[Tensor, float | Tensor]:
    if a.composed.stages is not None:
        return _stage_passes(a, batch, parts, a.composed.stages)
    if turn.objective is None:
        return _loss_passes(a, batch, parts)
    return _objective_passes(a, turn.name, turn.objective, batch, parts)


def seed_step(seed: int, step: int, rank: int, device: torch.device = CPU, *, turn: int | str = 0) -> None:
    """Set torch's generators from (seed, step, rank, turn), so that resuming needs no saved generator state.

    `torch.manual_seed` does the same for every kind of device there might be, and takes a quarter of a millisecond.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}{f'/{turn}' if turn else ''}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def autocast(assembly: Assembly) -> AbstractContextManager[Any]:
    """The precision of the plan as a context for forward passes."""
    if assembly.plan.precision == "bf16":
        return torch.autocast(assembly.device.type, dtype=torch.bfloat16)
    return nullcontext()


def _micro_batches(a: Assembly, batch: Batch) -> list[Batch]:
    """Pieces to walk through; empty ones only where the forward pass meets other ranks."""
    parts = [batch] if a.plan.micro_batch is None else batch.split(a.plan.micro_batch)
    parts = parts if a.composed.forward_communicates else [part for part in parts if not part.phantom]
    return [own_tokens(a, part) for part in parts]


def own_tokens(a: Assembly, batch: Batch) -> Batch:
    """The batch with this rank's tokens of each sample."""
    if a.composed.context is None:
        return batch
    inputs, targets = a.composed.context.local(batch.inputs, batch.targets)
    return replace(batch, inputs=inputs, targets=targets)


def seeing_whole(a: Assembly, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; with a context axis, what it computes from inputs and targets is that of whole sequences."""
    context = a.composed.context
    return function(*args) if context is None else context.around(function, *args)


def _loss_passes(a: Assembly, batch: Batch, parts: list[Batch]) -> tuple[Tensor, float | Tensor]:
    """All forward and backward passes with `loss(output, target)`; gradients are summed and final afterwards."""
    loss_function = a.job.loss
    assert loss_function is not None
    weights, total = _weigh(a, batch, parts)
    looked_at = next(iter(parts), None) if _is_put_together(a) and is_looked_at(a.step) else None
    loss_sum: Tensor | None = None
    for index, part in enumerate(parts):
        a.clock.mark("other")
        a.composed.state.phantom = part.phantom
        looks = part is looked_at
        part = part.to(a.device)
        with autocast(a), a.composed.forward_only():
            output = call_model(a.model, part.inputs)
            if looks:
                check_mean(a.job, output, part, a.step)
            if weights[index] == 0:
                objective = _zero_of(output)
            else:
                loss = _scalar(seeing_whole(a, loss_function, output, part.targets), "loss")
                objective = loss if weights[index] == total else loss * (weights[index] / total)
                part_sum = _at_least_float32(loss.detach()) * weights[index]
                loss_sum = part_sum if loss_sum is None else loss_sum + part_sum
        a.clock.mark("forward")
        _backward(a, objective, last=index == len(parts) - 1)
    if not parts:
        a.composed.gradients.expect()
    a.composed.gradients.finish()
    return torch.zeros((), device=a.device) if loss_sum is None else loss_sum, total


def _is_put_together(a: Assembly) -> bool:
    """Whether losses of parts of a batch are added up, and all that the loss reads is plain and on this rank."""
    if not a.looks_at_losses:
        return False
    return a.composed.context is None and a.composed.split is None and divides_batches(a.job, a.plan)


def _objective_passes(
    a: Assembly, name: str, objective_function: Callable[..., Any], batch: Batch, parts: list[Batch]
) -> tuple[Tensor, float | Tensor]:
    """As `_loss_passes` for a model that computes its own loss.

    A (sum, count) pair tells its weight only after the forward pass, so sums are back-propagated as they are and the
    summed gradient is divided by the global count at the end.
    """
    loss_sum = torch.zeros((), device=a.device)
    count_sum = torch.zeros((), dtype=torch.float64, device=a.device)
    counted = False
    for index, part in enumerate(parts):
        a.clock.mark("other")
        a.composed.state.phantom = part.phantom
        part = part.to(a.device)
        with autocast(a), a.composed.forward_only():
            value = seeing_whole(a, objective_function, a.model, (part.inputs, part.targets))
            counted = counted or isinstance(value, tuple)
            objective, count = _summed(a, value, part)
            loss_sum = loss_sum + _at_least_float32(objective.detach())
            count_sum = count_sum + count
        a.clock.mark("forward")
        if not objective.requires_grad:
            raise JobError(
                f"{name or 'the objective'} gives a number that does not depend on any parameter that this step trains: compute "
                "it without detach(), item() or no_grad() on the way to them, and let the optimizer have them"
            )
        _backward(a, objective, last=index == len(parts) - 1)
    if not parts:
        a.composed.gradients.expect()
    weight: float | Tensor = float(batch.global_count)
    if counted or a.shares.size > 1:
        weight = _count(a, a.shares.sum_(count_sum))
    a.composed.gradients.finish(scale=1.0 / weight)
    return loss_sum, weight


def _summed(a: Assembly, value: Any, part: Batch) -> tuple[Tensor, Tensor]:
    """An objective's answer as a sum over its items, and their count."""
    if isinstance(value, tuple):
        objective, count = _scalar(value[0], "objective sum"), torch.as_tensor(value[1], device=a.device)
    else:
        share = part.count * a.token_share
        objective = _scalar(value, "objective") * share
        count = torch.tensor(share, dtype=torch.float64, device=a.device)
    return (objective * 0, count * 0) if part.phantom else (objective, count)


def _count(a: Assembly, weight: Tensor) -> Tensor:
    """The count of the whole global batch, which must not be 0."""
    if not weight > 0:
        raise JobError(
            f"step {a.step + 1}: the objective's count over the global batch is 0: there is nothing to average over"
        )
    return weight


def _stage_passes(a: Assembly, batch: Batch, parts: list[Batch], stages: Stages) -> tuple[Tensor, float | Tensor]:
    """As `_loss_passes` and `_objective_passes`, through the stages of a pipeline; losses are known to the last stage."""
    parts = [part.to(a.device) for part in parts]
    weights, total = (None, 0.0) if stages.own_loss else _weigh(a, batch, parts)
    sums = torch.zeros((2,), dtype=torch.float64, device=a.device)  # of losses, and of what they are means over

    def objective(output: Any, index: int) -> Tensor:
        part = parts[index]
        if weights is None:
            value, count = _summed(a, output, part)
            sums.add_(torch.stack([value.detach().double(), count.double()]))
            return value
        if weights[index] == 0:
            return _zero_of(output)
        with autocast(a):
            assert a.job.loss is not None
            loss = _scalar(seeing_whole(a, a.job.loss, output, part.targets), "loss")
        sums[0] += loss.detach().double() * weights[index]
        return loss * (weights[index] / total)

    def walk_into(index: int) -> None:
        a.composed.state.phantom = parts[index].phantom

    inputs = [(part.inputs, part.targets) if stages.own_loss else part.inputs for part in parts]
    expect = a.composed.gradients.expect
    stages.runner.step(inputs, objective, on_last_backward=expect, on_micro_batch=walk_into)
    a.clock.mark("backward")
    if weights is not None:
        a.composed.gradients.finish()
        return sums[0], total
    weight = _count(a, a.reports.sum_(sums[1].clone()))
    a.composed.gradients.finish(scale=1.0 / weight)
    return sums[0], weight


def _weigh(a: Assembly, batch: Batch, parts: list[Batch]) -> tuple[list[float], float]:
    """Weight of each micro-batch of this rank, and of the global batch.

    Samples need no message: every rank knows the global count from the order. Anything else is one small sum.
    """
    weight = weight_function(a.job)
    if weight is None:
        return [0.0 if part.phantom else float(part.count) * a.token_share for part in parts], float(batch.global_count)
    weights = [0.0 if part.phantom else float(seeing_whole(a, weight, part.targets)) for part in parts]
    total = torch.tensor(sum(weights), dtype=torch.float64, device=a.device)
    a.clock.mark("other")
    total = a.shares.sum_(total)
    a.clock.mark("synchronisation")
    if not total.item() > 0:
        raise JobError(
            f"step {a.step + 1}: Job.weight is 0 over the whole global batch: there is nothing to average over"
        )
    return weights, float(total.item())


def _backward(a: Assembly, objective: Tensor, *, last: bool) -> None:
    if last:
        a.composed.gradients.expect()
    objective.backward()
    a.clock.mark("backward")


def _scalar(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise JobError(f"the {name} has {given}: it must be a scalar tensor, the mean over the samples it was given")
    return value.reshape(()) if value.dim() else value  # a view would be one more operation of the backward pass


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype in _WIDE else value.to(torch.promote_types(value.dtype, torch.float32))


def _zero_of(output: Any) -> Tensor:
    """A zero that depends on every tensor of the output, so that its backward pass meets the other ranks'."""
    leaves = [leaf for leaf in tensors_of(output) if leaf.requires_grad]
    if not leaves:
        raise JobError("the model's output holds no tensor with a gradient")
    return torch.stack([(leaf.sum() * 0).float() for leaf in leaves]).sum()


def seed_loop(a: Assembly, place: int) -> None:
    """Set torch's generators at a place of a loop, so that what it draws from there on is drawn again after a resume."""
    seed_step(a.job.seed, a.step, a.reports.rank, a.device, turn=f"loop {place}")
