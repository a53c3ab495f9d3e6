"""What the signature of a torch operator says about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def written_by(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes."""
    found: list[Tensor] = []
    for place, argument in enumerate(call._schema.arguments):
        # The running statistics of BatchNorm are changed without a word of it in the operator's signature.
        unsaid = argument.name in ("running_mean", "running_var")
        if not unsaid and (argument.alias_info is None or not argument.alias_info.is_write):
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += [item for item in pytree.tree_leaves(value) if isinstance(item, Tensor)]
    return found


def takes_device(call: Any) -> bool:
    """Whether an operator is told where to put what it makes."""
    return any(argument.name == "device" for argument in call._schema.arguments)


def is_random(call: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in call.tags


def returns_written(call: Any) -> bool:
    """Whether all that an operator returns is the one tensor that it changed."""
    returns = call._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write


def is_tensor_type(kind: Any) -> bool:
    """Whether a result is a tensor, or tensors, and no number."""
    return str(kind) in ("Tensor", "List[Tensor]", "Tensor[]")


def depends_on_data(call: Any) -> bool:
    """Whether shapes or numbers that an operator returns depend on values."""
    return torch.Tag.data_dependent_output in call.tags or torch.Tag.dynamic_output_shape in call.tags
