"""BatchNorm over the global batch: the statistics of all ranks' samples together, on any device.

Each rank computes mean and sum of squared deviations of its own samples; these are gathered and merged by the pairwise
formula of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances",
which does not lose digits the way a sum of squares does. torch's SyncBatchNorm does not run on CPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.dist.collectives import Group
from shardwise.dist.split import is_elsewhere
from shardwise.errors import PlanError


@final
@dataclass
class BatchState:
    """What layers that look at the whole global batch must know about the forward pass under way.

    Attributes:
        phantom: this rank has no sample in the batch and walks through the model only to take part in collectives.
    """

    phantom: bool = False


def batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """(name, module) of every BatchNorm layer."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def globalize_batch_norm(model: nn.Module, group: Group, state: BatchState) -> int:
    """Make every BatchNorm layer of `model` use the statistics of the whole group's samples, in place.

    The modules stay what they are (type, names, parameters, buffers); only their `forward` is replaced. Collective.

    Returns:
        The number of layers changed.
    """
    layers = batch_norms(model)
    if layers:
        group = group.twin()  # what layers send must not depend on when gradients of other layers are ready
    for name, module in layers:
        module.forward = functools.partial(_forward, module, group, state, name)  # type: ignore[method-assign]
    return len(layers)


@final
class OwnStatistics:
    """BatchNorm over each rank's own samples: running statistics differ between ranks until they are averaged.

    They are moving averages, so it does not matter when they are averaged, up to rounding: a model that is evaluated or saved
    has seen the samples of all ranks.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._layers = [module for _, module in batch_norms(model)]
        self._group = group

    @torch.no_grad()
    def average(self) -> None:
        """Make them equal on all ranks. Collective; equal ones (of layers that do not train) keep their bits."""
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for layer in self._layers:
            for tensor in (layer.running_mean, layer.running_var, layer.num_batches_tracked):
                if tensor is not None and not is_elsewhere(tensor):
                    by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for tensors in by_kind.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            every_R = self._group.gather(flat, "the running statistics of BatchNorm")
            if torch.equal(every_R, every_R[:1].expand_as(every_R)):
                continue
            merged = every_R.mean(0) if flat.is_floating_point() else every_R.amax(0)
            for tensor, piece in zip(tensors, merged.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(piece.view(tensor.shape))


def _forward(module: _BatchNorm, group: Group, state: BatchState, name: str, x_NC: Tensor) -> Tensor:
    """As `_BatchNorm.forward`, with statistics over the group. `x_NC` has shape (samples, channels, *any)."""
    if not isinstance(module, nn.SyncBatchNorm):
        module._check_input_dim(x_NC)
    with_batch = module.training or module.running_mean is None
    if not with_batch:
        return nn.functional.batch_norm(
            x_NC, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
        )
    y_NC, mean_C, variance_C, count = cast(
        "tuple[Tensor, Tensor, Tensor, Tensor]",
        _GlobalBatchNorm.apply(  # type: ignore[no-untyped-call]
            x_NC, module.weight, module.bias, module.eps, group, state.phantom, name
        ),
    )
    if module.training and module.track_running_stats and module.running_mean is not None:
        _update_running(module, mean_C, variance_C, count)
    return y_NC


@torch.no_grad()
def _update_running(module: _BatchNorm, mean_C: Tensor, variance_C: Tensor, count: Tensor) -> None:
    running_mean, running_var = module.running_mean, module.running_var
    assert running_mean is not None and running_var is not None
    factor = module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if factor is None:  # cumulative average
            factor = 1.0 / float(module.num_batches_tracked)
    unbiased_C = variance_C * (count / (count - 1))
    running_mean.lerp_(mean_C.to(running_mean.dtype), factor or 0.0)
    running_var.lerp_(unbiased_C.to(running_var.dtype), factor or 0.0)


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalise over samples and positions of all ranks; the backward pass sums its two statistics over them too."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
        group: Group,
        phantom: bool,
        name: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [dim for dim in range(x_NC.dim()) if dim != 1]
        statistic_dtype = torch.promote_types(x_NC.dtype, torch.float32)
        x32_NC = x_NC.to(statistic_dtype)
        mean_C, variance_C, count = _merged_statistics(x32_NC, dims, group, phantom, name)
        weight32_C, bias32_C = (None if part is None else part.to(statistic_dtype) for part in (weight_C, bias_C))
        y_NC = nn.functional.batch_norm(x32_NC, mean_C, variance_C, weight32_C, bias32_C, False, 0.0, eps)
        ctx.save_for_backward(x_NC, weight_C, bias_C, mean_C, variance_C, count)
        ctx.group, ctx.eps, ctx.phantom, ctx.name = group, eps, phantom, name
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return y_NC.to(x_NC.dtype), mean_C, variance_C, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NC: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_C, bias_C, mean_C, variance_C, count = ctx.saved_tensors
        x32_NC, channels = x_NC.to(mean_C.dtype), mean_C.numel()
        weight32_C = None if weight_C is None else weight_C.to(mean_C.dtype)
        # As if the statistics were constants, in one pass; what they add is linear in dy and in x.
        dx32_NC, dweight_C, dbias_C = torch.ops.aten.native_batch_norm_backward(
            dy_NC.to(mean_C.dtype), x32_NC, weight32_C, mean_C, variance_C, None, None, False, ctx.eps,
            [ctx.needs_input_grad[0], True, True],
        )  # fmt: skip
        dx_NC = None
        sums = ctx.group.sum_(torch.cat([dbias_C, dweight_C]), f"BatchNorm {ctx.name} (backward)")
        if ctx.needs_input_grad[0]:
            if not ctx.phantom:  # a phantom's values are no part of the statistics
                mean_dy_C, mean_dy_normalised_C = (sums / count).split(channels)
                inverse_C = torch.rsqrt(variance_C + ctx.eps)
                scale_C = inverse_C if weight32_C is None else inverse_C * weight32_C
                centred_NC = x32_NC - _along_channels(mean_C, x_NC.dim())
                dx32_NC.addcmul_(centred_NC, _along_channels(-scale_C * inverse_C * mean_dy_normalised_C, x_NC.dim()))
                dx32_NC.sub_(_along_channels(scale_C * mean_dy_C, x_NC.dim()))
            dx_NC = dx32_NC.to(x_NC.dtype)
        # Weight and bias gradients stay local sums: the gradient reduction adds them up like all others.
        dweight = dweight_C.to(weight_C.dtype) if weight_C is not None else None
        dbias = dbias_C.to(bias_C.dtype) if bias_C is not None else None
        return dx_NC, dweight, dbias, None, None, None, None


def _merged_statistics(
    x_NC: Tensor, dims: list[int], group: Group, phantom: bool, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over all ranks, and the number of values per channel as a scalar tensor.

    Raises:
        PlanError: the global batch has a single value per channel, for which no variance exists.
    """
    channels = x_NC.shape[1]
    count = 0 if phantom else x_NC.numel() // max(1, channels)
    own = x_NC.new_zeros(2 * channels + 1)
    if count:
        # In two passes: torch.var_mean over these dims takes 15 times as long on a CPU as all of them together.
        mean_C = x_NC.mean(dims)
        deviation_C = (x_NC - _along_channels(mean_C, x_NC.dim())).square_().sum(dims)
        own = torch.cat([mean_C, deviation_C, mean_C.new_tensor([float(count)])])
    every_R = group.gather(own, f"BatchNorm {name}")
    means_RC, deviations_RC, counts_R1 = every_R.split([channels, channels, 1], dim=1)
    total = counts_R1.sum()
    mean_C = (means_RC * counts_R1).sum(0) / total
    deviation_C = (deviations_RC + counts_R1 * (means_RC - mean_C) ** 2).sum(0)
    if x_NC.device.type == "cpu" and total.item() <= 1:
        raise PlanError("BatchNorm saw one value per channel in the whole global batch: use a batch_size of at least 2")
    return mean_C, deviation_C / total, total


def _along_channels(values_C: Tensor, dims: int) -> Tensor:
    return values_C.view(1, -1, *[1] * (dims - 2))
