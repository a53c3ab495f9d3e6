"""Which optimizers can step on split parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardwise.errors import PlanError
from shardwise.parallel.several import optimizers_in

UNABLE = ("Adafactor", "Rprop", "SparseAdam", "LBFGS")
"""Optimizers whose step torch (2.13) cannot do on DTensors, or that need the loss several times; by name, because Adafactor
comes in several libraries and fails in the same way in all."""


def check_step(optimizer: Optimizer, axis: str) -> None:
    """Refuse an optimizer whose step does not work on parts of parameters.

    Raises:
        PlanError: torch does not do this optimizer's step on DTensors.
    """
    for kind in [kind for one in optimizers_in(optimizer) for kind in type(one).__mro__]:
        if kind.__name__ in UNABLE:
            raise PlanError(
                f"{kind.__name__} cannot step on parameters that are split by the {axis} axis: use SGD, Adam, AdamW or another "
                f"optimizer that works element by element, or a layout without {axis}"
            )


def check_optimizer(optimizer: Optimizer, is_split: Callable[[Tensor], bool], axis: str = "tensor") -> tuple[str, ...]:
    """Refuse an optimizer that cannot step on split parameters, before the first step.

    Args:
        optimizer: over the parameters, which may still be whole.
        is_split: tells of a parameter whether it is or will be split.
        axis: by which.

    Returns:
        What will not equal the serial run, one sentence each.

    Raises:
        PlanError: torch does not do this optimizer's step on DTensors, or not with `foreach=True` or `fused=True` where
            whole and split parameters are in one group.
    """
    splitting = [
        one
        for one in optimizers_in(optimizer)
        if any(is_split(p) for group in one.param_groups for p in group["params"])
    ]
    for one in splitting:
        check_step(one, axis)
    name = type(optimizer).__name__
    for index, group in enumerate(optimizer.param_groups):
        together = [option for option in ("foreach", "fused") if group.get(option)]
        kinds = {is_split(parameter) for parameter in group["params"] if parameter.dim()}
        if together and len(kinds) == 2:
            raise PlanError(
                f"parameter group {index} of {name} has {together[0]}=True and holds whole and split parameters, which torch "
                f"cannot step together: leave out {together[0]}, or give split and whole parameters in groups of their own"
            )
    if any(isinstance(one, torch.optim.Muon) for one in splitting):
        return (
            "Muon orthogonalises its updates in bfloat16: with split parameters they agree with a serial run to that",
        )
    return ()


def check_apart(build: Callable[[], Optimizer], parameters: list[nn.Parameter]) -> None:
    """Refuse an optimizer that steps on one parameter by what another one's gradient is: pipeline stages hold only their own.

    It takes three steps from the same start twice, the second time with other gradients of half of the parameters, and what
    it does to the other half is compared. Optimizers of torch step on each parameter by itself, so only others are tried.

    Args:
        build: makes the optimizer anew over `parameters`.
        parameters: whole, with values, on the CPU; they are as they were afterwards.

    Raises:
        PlanError: the steps differ.
    """
    optimizer = build()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if len(trained) < 2 or all(_is_known(one) for one in optimizers_in(optimizer)):
        return
    watched, other = trained[: len(trained) // 2], trained[len(trained) // 2 :]
    try:
        same = all(map(torch.equal, _stepped(build, watched, other, 1.0), _stepped(build, watched, other, 7.0)))
    except Exception:  # noqa: BLE001  # it needs what only a training has: nothing is said about it
        return
    if not same:
        raise PlanError(
            f"{type(optimizer).__name__} steps on a parameter by what the gradients of others are (a norm or a sum over all of "
            "them); a pipeline stage holds its own parameters only and would take another step: use a layout without pipeline, "
            "or Job.clip_norm where clipping is what it does"
        )


def _is_known(optimizer: Any) -> bool:
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return type(optimizer).__module__.startswith("torch.optim.") and not hooks


def _stepped(
    build: Callable[[], Optimizer], watched: list[nn.Parameter], other: list[nn.Parameter], scale: float
) -> list[Tensor]:
    """What three steps make of the parameters that are watched, where the gradients of the others have this scale."""
    kept = [parameter.detach().clone() for parameter in [*watched, *other]]
    generator = torch.Generator().manual_seed(0)
    try:
        torch.manual_seed(0)
        optimizer = build()
        for _ in range(3):
            for factor, parameters in ((1.0, watched), (scale, other)):
                for parameter in parameters:
                    parameter.grad = factor * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            optimizer.step()
        return [parameter.detach().clone() for parameter in watched]
    finally:
        with torch.no_grad():
            for parameter, values in zip([*watched, *other], kept, strict=True):
                parameter.copy_(values)
                parameter.grad = None
