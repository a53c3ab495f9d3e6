"""A number of a split tensor is that of the whole tensor, the same on all ranks.

torch (2.13) answers `.item()`, `float()` and `bool()` of a DTensor with what the rank itself holds: of a sum or norm over a
split parameter, that of a part, without a word. An optimizer that scales by such a number (a norm over all parameters, a trust
ratio) would step by another one on each rank.
"""

from __future__ import annotations

from typing import Any

import torch

from shardwise.dist.split import whole_tensor

_NUMBER: Any = torch.ops.aten._local_scalar_dense.default


def whole_numbers() -> None:
    """From here on, numbers of DTensors are those of whole tensors, in this process. Taking one is collective then."""
    from torch.distributed.tensor import DTensor

    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    handlers[_NUMBER] = _number


def _number(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(whole_tensor(args[0]), **kwargs)
