"""Which optimizers can step on split parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardwise.errors import PlanError

UNABLE = ("Adafactor", "Rprop", "SparseAdam", "LBFGS")
"""Optimizers whose step torch (2.13) cannot do on DTensors, or that need the loss several times; by name, because Adafactor
comes in several libraries and fails in the same way in all."""


def check_step(optimizer: Optimizer, axis: str) -> None:
    """Refuse an optimizer whose step does not work on parts of parameters.

    Raises:
        PlanError: torch does not do this optimizer's step on DTensors.
    """
    for kind in type(optimizer).__mro__:
        if kind.__name__ in UNABLE:
            raise PlanError(
                f"{kind.__name__} cannot step on parameters that are split by the {axis} axis: use SGD, Adam, AdamW or another "
                f"optimizer that works element by element, or a layout without {axis}"
            )


def check_optimizer(optimizer: Optimizer, is_split: Callable[[Tensor], bool]) -> tuple[str, ...]:
    """Refuse an optimizer that cannot step on split parameters, before the first step.

    Args:
        optimizer: over the parameters, which may still be whole.
        is_split: tells of a parameter whether it is or will be split.

    Returns:
        What will not equal the serial run, one sentence each.

    Raises:
        PlanError: torch does not do this optimizer's step on DTensors, or not with `foreach=True` or `fused=True` where
            whole and split parameters are in one group.
    """
    if not any(is_split(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        return ()
    check_step(optimizer, "tensor")
    name = type(optimizer).__name__
    for index, group in enumerate(optimizer.param_groups):
        together = [option for option in ("foreach", "fused") if group.get(option)]
        kinds = {is_split(parameter) for parameter in group["params"]}
        if together and len(kinds) == 2:
            raise PlanError(
                f"parameter group {index} of {name} has {together[0]}=True and holds whole and split parameters, which torch "
                f"cannot step together: leave out {together[0]}, or give split and whole parameters in groups of their own"
            )
    if isinstance(optimizer, torch.optim.Muon):
        return (
            "Muon orthogonalises its updates in bfloat16: with split parameters they agree with a serial run to that",
        )
    return ()
