"""Tensors that are split over ranks (torch's DTensor) or live on other ranks, without importing what makes them so.

Importing DTensor takes most of a second, which a run that splits nothing need not pay.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor

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


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; another tensor as it is."""
    return cast("Tensor", cast("Any", tensor).to_local()) if is_dtensor(tensor) else tensor
