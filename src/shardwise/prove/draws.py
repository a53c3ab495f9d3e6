"""Random functions that give their least or greatest value, to see whether what is drawn matters.

A branch that one step in a hundred takes shows in no three steps; if every draw is the least or the greatest, it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

MOST = 1000
"""Draws of a step that are extreme. What draws again until it likes the number comes to an end after them."""

_UNIT = frozenset({torch.rand, torch.rand_like})
_WHOLE = frozenset({torch.randint, torch.randint_like})
_COINS = frozenset({torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_})
_NORMAL = frozenset({torch.randn, torch.randn_like, torch.normal, Tensor.normal_})

EXTREMES = frozenset({*_UNIT, *_WHOLE, *_COINS, *_NORMAL, Tensor.uniform_})
"""Functions whose extremes are known."""


@torch.no_grad()
def extreme(func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any], *, greatest: bool) -> Tensor:
    """What `func`, one of `EXTREMES`, could give at least or at most; of normal numbers, those it gives with one sign."""
    coins = _probability(func, args, named) if func in _COINS else None
    result: Tensor = func(*args, **named)
    if func in _UNIT:
        return result.fill_(1.0 - torch.finfo(result.dtype).eps if greatest else 0.0)
    if func in _WHOLE:
        bounds = [item for item in args if isinstance(item, int)]
        low, high = (
            named.get("low", bounds[0] if len(bounds) > 1 else 0),
            named.get("high", bounds[-1] if bounds else 1),
        )
        return result.fill_(high - 1 if greatest else low)
    if coins is not None:
        return result.copy_(coins > 0 if greatest else coins >= 1)
    if func in _NORMAL:
        return result.abs_() if greatest else result.abs_().neg_()
    if greatest:
        return result.fill_(named.get("to", args[2] if len(args) > 2 else 1.0))
    return result.fill_(named.get("from", args[1] if len(args) > 1 else 0.0))


def _probability(func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    given = named.get("p", args[1] if len(args) > 1 else None)
    if given is None:
        given = 0.5 if func is Tensor.bernoulli_ else args[0] if args else named["input"]
    return torch.as_tensor(given).clone()
