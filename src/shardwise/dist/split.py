"""Tensors that are split over ranks (torch's DTensor) or live on other ranks, without importing what makes them so.

Importing DTensor takes most of a second, which a run that splits nothing need not pay.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MODULE = "torch.distributed.tensor"
_FAKES = "torch._subclasses.fake_tensor"


def is_dtensor(value: object) -> bool:
    """Whether `value` is a DTensor. Nobody can hold one while its module is not loaded."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(value, module.DTensor)


def is_stand_in(value: object) -> bool:
    """Whether `value` is a tensor without memory, which stands for one that only other ranks hold (pipeline stages)."""
    module = sys.modules.get(_FAKES)
    return module is not None and isinstance(value, module.FakeTensor)


def is_elsewhere(value: object) -> bool:
    """Whether only other ranks hold the tensor that `value` stands for.

    Where a step is counted on fake tensors, all of them are without memory, and this rank's all the same.
    """
    return is_stand_in(value) and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; another tensor as it is."""
    return cast("Tensor", cast("Any", tensor).to_local()) if is_dtensor(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, the same on all ranks; another tensor as it is. Collective where it is split."""
    if not is_dtensor(tensor):
        return tensor
    split = cast("DTensor", tensor)
    if any(type(placement).__name__ == "_StridedShard" for placement in split.placements):
        # Pieces that were split again (shard over tensor) go together in the order in which torch would do it as well, but
        # one mesh dim at a time: asked for both at once, it warns that this is slow.
        from torch.distributed.tensor import Replicate

        for dim in range(split.device_mesh.ndim):
            kept = split.placements[dim + 1 :]
            split = split.redistribute(placements=[Replicate()] * (dim + 1) + list(kept))
    return split.full_tensor()


def split_axes(tensor: Tensor) -> frozenset[str]:
    """Mesh dims along which ranks hold different parts of a DTensor; none of another tensor."""
    if not is_dtensor(tensor):
        return frozenset()
    split = cast("DTensor", tensor)
    names = split.device_mesh.mesh_dim_names or ()
    return frozenset(name for name, place in zip(names, split.placements, strict=True) if not place.is_replicate())
