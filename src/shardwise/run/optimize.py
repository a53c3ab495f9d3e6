"""Building and stepping the optimizer without paying for torch's compiler.

The first use of any torch optimizer imports `torch._dynamo`, about a second of work in every worker, only to tell the
compiler not to look inside. A run that compiles nothing can do without: `add_param_group` is called as it is, and a step
calls the optimizer's own step function in the way torch's wrapper would (no gradients recorded, hooks run if there are
any). Wherever the wrappers are not the ones expected here, or the compiler is loaded anyway, torch's own way is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module

_COMPILER = "torch._dynamo"
_MARK = "__dynamo_disable"


@contextmanager
def building_optimizers() -> Iterator[None]:
    """While the block runs, constructing an optimizer does not import the compiler."""
    plain: Any = getattr(Optimizer.add_param_group, "__wrapped__", None)
    if plain is None or _COMPILER in sys.modules or getattr(plain, _MARK, None) is not None:
        yield
        return
    # torch's wrapper calls what it finds under this name, and looks for the compiler only where there is nothing.
    setattr(plain, _MARK, plain)
    try:
        yield
    finally:
        delattr(plain, _MARK)


@final
class OptimizerStep:
    """`optimizer.step()` of one or several, by the short way where that is the same."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self._ways = [(optimizer, _plain_step(optimizer)) for optimizer in optimizers]

    def __call__(self) -> None:
        """Update the parameters once."""
        for optimizer, plain in self._ways:
            _step(optimizer, plain)


def _step(optimizer: Any, plain: Callable[[Any], Any] | None) -> None:
    if plain is None or _COMPILER in sys.modules or _has_hooks(optimizer):
        optimizer.step()
        return
    with torch.no_grad():
        plain(optimizer)
    optimizer._opt_called = True  # learning-rate schedulers warn when they are stepped before the optimizer


def _plain_step(optimizer: Optimizer) -> Callable[[Any], Any] | None:
    """The step function that torch.optim's own class defines, under torch's wrappers; None for any other class."""
    cls = type(optimizer)
    if not f"{cls.__module__}.".startswith("torch.optim.") or optimizer.defaults.get("differentiable", False):
        return None
    step: Any = cls.step
    while (inner := getattr(step, "__wrapped__", None)) is not None:
        step = inner
    code = getattr(step, "__code__", None)
    wrapped = step is not cls.step
    return step if wrapped and code is not None and code.co_name == "step" else None


def _has_hooks(optimizer: Any) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or optimizer_module._global_optimizer_pre_hooks
        or optimizer_module._global_optimizer_post_hooks
    )
