"""Does a loss couple samples? Then it is no mean over parts of a batch, and no plan that splits batches can train with it.

Contrastive losses and rankings compare samples with each other. A mean over something else than samples (tokens, unignored
targets, class weights) without `Job.weight` looks the same from here: its parts do not add up to the whole.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.data.batch import Batch, Tree
from shardwise.data.source import as_splits
from shardwise.errors import PlanError
from shardwise.run.outputs import map_output
from shardwise.run.tryout import call_model
from shardwise.run.weigh import advice, weight_function
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan

TOLERANCE = 1e-4
"""Relative difference in float32 that is no rounding: sums over a few samples agree to 1e-6."""

MOST_BYTES = 1 << 28
"""Larger models are not tried out: the trial builds and runs the whole model on the CPU before the workers start. Chosen."""


def is_cheap(job: Job, model: nn.Module) -> bool:
    """Whether a model can be tried out on a few samples at little cost. Of data without a length, nothing is read before it
    must be."""
    small = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) <= MOST_BYTES
    return small and job.data is not None and as_splits(job.data).train.length is not None


def divides_batches(job: Job, plan: Plan) -> bool:
    """Whether losses are computed over parts of a global batch."""
    share = -(-job.batch_size // plan.layout.replicas)
    return plan.layout.replicas > 1 or (plan.micro_batch is not None and plan.micro_batch < share)


def check_loss(job: Job, plan: Plan, model: nn.Module, batch: Batch) -> None:
    """Refuse a plan that splits batches for a loss that couples samples.

    Args:
        model: whole, on the CPU; as it was afterwards: it may be the user's own.
        batch: a few samples. A loss that fails on them says so itself when the training comes to it.

    Raises:
        PlanError: the loss of these samples is not the mean of its parts.
    """
    bounds = [(0, 1), (1, batch.count)]
    if batch.count < 2 or batch.phantom:
        return
    try:
        with modes_kept(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of a deviation of one sample
            model.eval()
            found = coupling(job, model, batch, bounds, tolerance=TOLERANCE)
            if found is None:
                return
            # As text, because no number equals none; one that draws random numbers gives another.
            if job.objective and repr(coupling(job, model, batch, bounds, tolerance=TOLERANCE)) != repr(found):
                return
    except Exception:  # noqa: BLE001  # anything can go wrong in it, and will again where it is told better
        return
    if found.is_sum:
        raise PlanError(
            f"the loss is a sum over the samples and not their mean: for {batch.count} samples of the data it is "
            f"{found.whole:.6g}, which is what its parts add up to. Give the mean (reduction='mean'), Job.weight, which counts "
            "what a mean is over, or an objective that returns (sum, count)"
        )
    split = (
        "samples between workers"
        if plan.layout.replicas > 1
        else f"a batch into pieces (micro_batch={plan.micro_batch})"
    )
    raise PlanError(
        f"plan {plan.layout} splits {split}, but the loss couples samples: for {batch.count} samples of the data it is "
        f"{found.whole:.6g}, the mean over parts of them is {found.mean:.6g}. {advice(job, batch.targets)}"
    )


def check_writing(job: Job, plan: Plan, model: nn.Module, batch: Batch) -> None:
    """Refuse a plan for a model whose forward pass writes into its buffers or weights in a way that the plan does not keep.

    Statistics that differ between workers would end the run at the first comparison of copies; counts of samples would not,
    where all workers have as many. What is written into weights that are gathered for a pass, or split, is lost.

    Args:
        model: whole, on the CPU; as it was afterwards.
        batch: a few samples. A model that fails on them, or draws what it keeps, says so itself.

    Raises:
        PlanError: a weight is written that workers hold a part of, or something is another after half of the samples.
    """
    layout = plan.layout
    parts = layout.shard * layout.tensor > 1
    if batch.phantom or not (parts or (layout.replicas > 1 and batch.count >= 4)):
        return  # a part of two samples, because BatchNorm takes no fewer
    part = rows_of(batch, 0, batch.count // 2) if batch.count >= 4 else batch
    try:
        with modes_kept(model), state_kept(model), torch.no_grad():
            model.train()
            _set_apart(model)
            before = _weights(model)
            whole, again = _written(job, model, batch), _written(job, model, batch)
            fewer = _written(job, model, part)
    except Exception:  # noqa: BLE001  # as above
        return
    for name, value in before.items() if parts else ():
        if not torch.equal(value, whole[name]):
            raise PlanError(
                f"plan {layout} leaves each worker a part of the weights, but the model writes into its weight {name!r} in the "
                "forward pass, where it is put together for a moment: that would be lost. Use data= or pipeline=, or with "
                "shard= keep it as a buffer (register_buffer)"
            )
    steady = [name for name, value in whole.items() if name in again and torch.equal(value, again[name])]
    for name in steady if layout.replicas > 1 else ():
        if name not in fewer or not torch.equal(whole[name], fewer[name]):
            what = f"writes into its weight {name!r} by" if name in before else f"fills the buffer {name!r} from"
            raise PlanError(
                f"plan {layout} divides samples between workers, but the model {what} its samples: "
                f"after {batch.count} samples it is another than after {part.count} of them, and each worker would have its own. "
                "torch's BatchNorm is computed over all workers; for a layer of your own use --plan serial, or tensor= or "
                "pipeline=, or keep what is counted outside the model"
            )


def _set_apart(model: nn.Module) -> None:
    """Change what is trained a little, each in another way: an average that starts as a copy would show no writing."""
    for index, parameter in enumerate(parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.mul_(1 + 0.01 / (1 + index))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _written(job: Job, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Copies of weights and buffers after a forward pass in training mode, without those of BatchNorm; they are reset."""
    known = {id(buffer) for module in model.modules() if isinstance(module, _BatchNorm) for buffer in module.buffers()}
    torch.manual_seed(job.seed)
    with state_kept(model):
        objective = job.sole_objective
        if objective is None:
            call_model(model, batch.inputs)
        else:
            objective(model, (batch.inputs, batch.targets))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if id(buffer) not in known}
        return {**_weights(model), **buffers}


class Coupling(NamedTuple):
    """A loss whose parts do not add up to the whole.

    Attributes:
        whole: the loss of the whole batch.
        mean: the weighted mean over its parts.
        is_sum: the whole is the sum of the parts: the loss is a sum over samples.
    """

    whole: float
    mean: float
    is_sum: bool


def coupling(
    job: Job, model: nn.Module, batch: Batch, bounds: list[tuple[int, int]], *, tolerance: float
) -> Coupling | None:
    """Loss of the whole batch and weighted mean over parts of it, from the same outputs; None where they agree.

    Args:
        model: in the mode in which its outputs for a sample do not depend on the others.
        bounds: (start, stop) of the parts.
        tolerance: relative difference that counts as agreement.
    """
    with torch.no_grad(), state_kept(model):
        loss_sum = weights = plain_sum = 0.0
        if job.objective is None:
            output = call_model(model, batch.inputs)
            assert job.loss is not None
            value_of_all = job.loss(output, batch.targets)
            whole = float(value_of_all)
            for start, stop in bounds:
                part = rows_of(batch, start, stop)
                own = weight_of(job, part) if start < stop else 0.0
                if own:
                    value = float(job.loss(_tree_rows(output, start, stop, batch.count), part.targets))
                    loss_sum, weights, plain_sum = loss_sum + value * own, weights + own, plain_sum + value
        else:
            value_of_all, weight = loss_sum_of(job, model, batch)
            whole = float(value_of_all) / weight
            for start, stop in bounds:
                if start < stop:
                    part_sum, own = loss_sum_of(job, model, rows_of(batch, start, stop))
                    loss_sum, weights = loss_sum + float(part_sum), weights + own
    mean = loss_sum / weights if weights else float("nan")
    if not isfinite(whole):
        return None
    if isinstance(value_of_all, Tensor) and value_of_all.is_floating_point():
        tolerance = max(tolerance, 4 * torch.finfo(value_of_all.dtype).eps)  # one of bfloat16 has three digits
    if abs(mean - whole) <= tolerance * max(abs(whole), abs(mean)):
        return None
    return Coupling(whole, mean, is_sum=abs(plain_sum - whole) <= tolerance * abs(whole))


def loss_sum_of(job: Job, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """Sum of the losses of a part, and what it is a mean over."""
    objective = job.sole_objective
    if objective is None:
        assert job.loss is not None
        weight = weight_of(job, batch)
        if not weight:
            return torch.stack([parameter.sum() * 0 for parameter in model.parameters()]).sum(), 0.0
        return job.loss(call_model(model, batch.inputs), batch.targets) * weight, weight
    value: Any = objective(model, (batch.inputs, batch.targets))
    if isinstance(value, tuple):
        return value[0], float(value[1])
    return value * batch.count, float(batch.count)


def weight_of(job: Job, batch: Batch) -> float:
    """What the loss of a batch is a mean over."""
    weight = weight_function(job)
    return float(batch.count) if weight is None else float(weight(batch.targets))


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch."""
    targets = None if batch.targets is None else _tree_rows(batch.targets, start, stop, batch.count)
    inputs = _tree_rows(batch.inputs, start, stop, batch.count)
    return replace(batch, inputs=inputs, targets=targets, count=stop - start, indices=None)


def _tree_rows(tree: Any, start: int, stop: int, count: int) -> Tree:
    """The rows of some samples of every tensor that has as many rows for each sample: (N, ...), or (N * tokens, ...)."""

    def rows(leaf: Tensor) -> Tensor:
        if not leaf.dim() or leaf.shape[0] % count:
            return leaf
        each = leaf.shape[0] // count
        return leaf[start * each : stop * each]

    result: Tree = map_output(rows, tree)
    return result


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module is after the block in the mode, training or evaluation, that it was in before it."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Weights and buffers have after the block the values that they had before it: some forward passes write into them."""
    before = {name: copy.deepcopy(buffer) for name, buffer in model.named_buffers()}
    weights = _weights(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
