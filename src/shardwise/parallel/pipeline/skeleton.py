"""The skeleton: the user's model with parameters and buffers that have shapes but no memory.

It stands in for the stages that live on other ranks, and forward passes over it say which values exist, in which shapes.
"""

from __future__ import annotations

import copy
import functools
from typing import final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.dist.split import is_dtensor
from shardwise.errors import PlanError


@final
class Fakes:
    """Makes tensors without memory; the same one for the same original, so that tied parameters stay tied."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """A stand-in with the shape, dtype, device and `requires_grad` of `tensor`, a Parameter for a Parameter."""
        known = self._made.get(id(tensor))
        if known is None:
            if is_dtensor(tensor):
                with self.mode:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            else:
                fake = self.mode.from_tensor(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            # The original is kept beside it: an address may only be used again after its tensor is gone.
            known = self._made[id(tensor)] = (tensor, fake)
        return known[1]

    def forget(self) -> None:
        """Let go of the originals."""
        self._made.clear()


def skeleton_of(model: nn.Module, fakes: Fakes) -> nn.Module:
    """A copy of the model whose parameters and buffers are stand-ins.

    Raises:
        PlanError: the model cannot be copied.
    """
    memo: dict[int, object] = {id(tensor): fakes.like(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        skeleton = copy.deepcopy(model, memo)
    except Exception as error:
        raise PlanError(
            f"a pipeline needs a copy of the model's structure, but copy.deepcopy of {type(model).__name__} failed with "
            f"{type(error).__name__}: {error}. Keep locks, files, generators and process groups out of the module, or use "
            "a plan without pipeline"
        ) from error
    for module in skeleton.modules():
        if isinstance(module, _BatchNorm):
            module.forward = functools.partial(_batch_norm, module)  # type: ignore[method-assign]
    return skeleton


def _batch_norm(module: _BatchNorm, x_NC: Tensor) -> Tensor:
    """What `_BatchNorm.forward` takes, makes and changes, also for one sample: the others may be on other ranks."""
    module._check_input_dim(x_NC)
    if module.training and module.track_running_stats:
        for buffer in (module.running_mean, module.running_var, module.num_batches_tracked):
            if buffer is not None:
                buffer.mul_(1)
    statistic_C = module.running_mean if module.running_mean is not None else x_NC.new_zeros(x_NC.shape[1])
    y_NC: Tensor = nn.functional.batch_norm(x_NC, statistic_C, statistic_C, module.weight, module.bias)
    return y_NC
