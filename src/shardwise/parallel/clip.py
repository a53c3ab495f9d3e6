"""Gradient clipping by the norm over all parameters of the whole model, however they are split.

torch's `clip_grad_norm_` cannot stack norms of parameters that live on different meshes (shard x tensor beside plain ones).
Here every rank takes the norm of the pieces it has; their squares are summed over the mesh dims a tensor is split along, and
over no others, so that nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.dist.split import is_dtensor, local_part
from shardwise.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_by_global_norm(
    parameters: Iterable[nn.Parameter],
    clip_norm: float,
    *,
    apart: Sequence[Group] = (),
    counted: Callable[[nn.Parameter], bool] = lambda _: True,
) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most `clip_norm`; sparse gradients count as well.

    A plain gradient is the complete one (as data parallelism leaves it); of a DTensor's, each rank has its piece.
    Collective where there are DTensors or `apart`.

    Args:
        parameters: those of this rank, in the same order on all ranks.
        clip_norm: the bound.
        apart: groups whose ranks hold different parameters (pipeline stages), over which the squares are summed too.
        counted: whether a parameter counts in the norm: one that several ranks of `apart` hold must count on one of them
            only. Its gradient is scaled everywhere.

    Returns:
        The norm before clipping, a scalar tensor, the same on all ranks.

    Raises:
        PlanError: a gradient still holds summands that were not added up.
    """
    every = list(parameters)
    norm = global_norm(every, apart=apart, counted=counted)
    gradients = [parameter.grad for parameter in every if parameter.grad is not None]
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local_part(gradient).mul_(factor.to(gradient.dtype))
    return norm


@torch.no_grad()
def global_norm(
    parameters: Iterable[nn.Parameter],
    *,
    apart: Sequence[Group] = (),
    counted: Callable[[nn.Parameter], bool] = lambda _: True,
) -> Tensor:
    """The joint 2-norm of all gradients, a scalar tensor, the same on all ranks. As `clip_by_global_norm`, which explains
    the arguments, and changes nothing."""
    every = list(parameters)
    norm = _norm([parameter.grad for parameter in every if parameter.grad is not None and counted(parameter)])
    if any(group.size > 1 for group in apart):
        # A rank without a gradient does not know the dtype of the others.
        square = norm.to(every[0].device, torch.float64).square()
        for group in apart:
            group.sum_(square, "the norm of the gradients")
        norm = square.sqrt()
    return norm


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """The joint norm of these gradients."""
    by_split: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}
    groups: dict[tuple[tuple[int, int], ...], list[Group]] = {}
    for gradient in gradients:
        over = _split_over(gradient)
        key = tuple((group.size, id(group.handle)) for group in over)
        groups.setdefault(key, over)
        by_split.setdefault(key, []).append(_values(gradient))
    norms = []
    for key, values in by_split.items():
        norm = torch.nn.utils.get_total_norm(values)
        if key:
            square = norm.to(torch.promote_types(norm.dtype, torch.float32)).square()
            for group in groups[key]:
                group.sum_(square, "the norm of the gradients")
            norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def _values(gradient: Tensor) -> Tensor:
    """The numbers of this rank's part of a gradient."""
    local = local_part(gradient)
    # The values of an uncoalesced sparse tensor may repeat a row, whose norm is that of the summed row.
    return local.coalesce().values() if local.is_sparse else local


def _split_over(gradient: Tensor) -> list[Group]:
    """The groups over which a gradient is split."""
    if not is_dtensor(gradient):
        return []
    split = cast("DTensor", gradient)
    mesh, groups = split.device_mesh, []
    for dim, placement in enumerate(split.placements):
        if placement.is_partial():
            raise PlanError(
                f"a gradient of shape {tuple(gradient.shape)} was not summed over mesh dim {dim} before clipping; this is a "
                "fault of the code that made it a DTensor: redistribute it first"
            )
        if not placement.is_replicate() and mesh.size(dim) > 1:
            groups.append(Group(rank=mesh.get_local_rank(dim), size=mesh.size(dim), handle=mesh.get_group(dim)))
    return groups
