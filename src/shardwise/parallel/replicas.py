"""Replicas must stay equal: the same weights at the start, and proof along the way that they did not drift apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import PART_AXES, PARTS, Mesh
from shardwise.dist.split import is_elsewhere, local_part, split_axes
from shardwise.errors import RunFailed
from shardwise.spec.layout import AXES

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 15


def named_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer that this rank has, shared ones once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if not is_elsewhere(tensor)]


@torch.no_grad()
def broadcast_state(model: nn.Module, group: Group) -> None:
    """Overwrite parameters and buffers with those of the group's first rank, one message per dtype.

    Building from one seed already gives equal weights on equal machines; this makes it so on unequal ones.
    """
    if group.size == 1:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for _, tensor in named_state(model):
        if tensor.is_meta:
            continue  # it has no values yet; those it will get are the same on all ranks
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for tensors in by_kind.values():
        flat = group.broadcast_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view(tensor.shape))


@torch.no_grad()
def check_replicas(model: nn.Module, mesh: Mesh, step: int) -> None:
    """Compare parameters and buffers over the ranks that should hold the same, bit for bit, by a checksum.

    A tensor has replicas along all axes over which it is not split, but the pipeline.

    Raises:
        RunFailed: a tensor differs between ranks; the message names the tensors.
    """
    by_axes: dict[tuple[str, ...], list[tuple[str, Tensor]]] = {}
    for name, tensor in named_state(model):
        by_axes.setdefault(_replicated_over(tensor), []).append((name, local_part(tensor)))
    # Groups are made by all ranks together, and pipeline stages hold different tensors.
    every = sorted(set().union(*mesh.world.gather_objects(set(by_axes))))
    names = [name for axes in every for name in _differing(by_axes.get(axes, []), mesh.group(*axes))]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise RunFailed(
            f"after step {step} the workers' copies of {shown} are no longer equal. Data parallelism needs every update "
            "to be the same on all workers. A buffer that the model fills from its own samples (running statistics of a "
            "home-made layer, a queue, a counter) or a weight changed outside the optimizer does this: compute it from "
            "values that all workers share, or train with --plan serial"
        )


def _replicated_over(tensor: Tensor) -> tuple[str, ...]:
    """The axes along which other ranks hold the same part of a tensor."""
    split = split_axes(tensor)
    split |= frozenset(PART_AXES) if PARTS in split else frozenset()
    return tuple(axis for axis in AXES if axis not in split and axis != "pipeline")


def _differing(named: list[tuple[str, Tensor]], group: Group) -> list[str]:
    if group.size == 1 or not named:
        return []
    own = torch.stack([checksum(tensor) for _, tensor in named])
    every = group.gather(own)
    differs = (every != every[0]).any(dim=0).tolist()
    return [name for (name, _), different in zip(named, differs, strict=True) if different]


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit sum of the tensor's bits, each element weighted by its place so that swaps show."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    flat = tensor.detach().reshape(-1)
    if flat.dtype.is_complex:
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.numel() == 0:
        return total
    bits = flat.contiguous().view(_INTEGERS[flat.element_size()])
    # In pieces, because the 64-bit copies of a large parameter would be several times its own size.
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE].to(torch.int64)
        places = torch.arange(start, start + piece.numel(), device=bits.device)
        total += (piece * (2 * places + 1)).sum()
    return total
