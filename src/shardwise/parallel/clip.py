"""Gradient clipping by the norm over all parameters of the whole model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most `clip_norm`; sparse gradients count as well.

    Every rank must hold the complete gradient of each parameter (as data parallelism leaves it).

    Returns:
        The norm before clipping, a scalar tensor.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # The values of an uncoalesced sparse tensor may repeat a row, whose norm is that of the summed row.
    values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(values)
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
    return norm
