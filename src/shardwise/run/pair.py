"""What a metric or an objective answers, as a (sum, count) pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwise.errors import JobError


def as_pair(value: Any, count: float, name: str) -> Tensor:
    """(sum, count) of a metric's answer: a pair as it is, a scalar as the mean over `count` items.

    Raises:
        JobError: it is neither.
    """
    if isinstance(value, tuple) and len(value) == 2:
        return torch.stack([_number(part, name) for part in value])
    return torch.stack([_number(value, name) * count, torch.tensor(float(count), dtype=torch.float64)])


def _number(value: Any, name: str) -> Tensor:
    given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    try:
        number = torch.as_tensor(value, dtype=torch.float64)
        if number.numel() == 1:
            return number.reshape(()).cpu()
    except (TypeError, ValueError, RuntimeError):
        pass
    raise JobError(f"metric {name!r} returned {given}: return a scalar mean over the samples, or a (sum, count) pair")
