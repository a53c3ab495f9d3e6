"""Building and stepping the optimizer without paying for torch's compiler.

The first use of any torch optimizer imports `torch._dynamo`, about a second of work in every worker, only to tell the
compiler not to look inside. A run that compiles nothing can do without: `add_param_group` is called as it is, and a step
calls the optimizer's own step function in the way torch's wrapper would (no gradients recorded, hooks run if there are
any). Wherever the wrappers are not the ones expected here, or the compiler is loaded anyway, torch's own way is taken.

On a CPU torch steps on one parameter after the other in Python, unless it is told otherwise: 20 us for each in Adam, half of the
step of a model of hundreds of small ones. Small parameters go through the lists of torch's own `foreach`, which are the same
operations in the same order, and so the same bits.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as optimizer_module

_COMPILER = "torch._dynamo"
_MARK = "__dynamo_disable"

SMALL_BYTES, LIST_BYTES = 2**16, 2**20
"""Parameters up to the first are stepped on in lists of up to the second. Chosen: what is computed in between is as large as a
list and should stay in the caches. Adam took 0.4 to 0.8 of its time for lists of 1 MiB, up to 1.6 times it for longer ones."""

FEWEST = 16
"""Small parameters beside large ones that are worth a list: another group costs a step 10 us, and a list saves 1 to 3 us each."""

_PLAIN = ("Parameter", "Tensor", "FakeTensor")
"""Names of classes, because that of tensors without memory takes long to load: what is counted with them is what a step does."""


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
        self._each = [_Step(optimizer) for optimizer in optimizers]

    def __call__(self) -> None:
        """Update the parameters once."""
        for step in self._each:
            step()


@final
class _Step:
    """That of one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._plain = _plain_step(optimizer)
        self._lists: dict[int, tuple[list[nn.Parameter], list[list[nn.Parameter]]]] = {}

    def __call__(self) -> None:
        """Update the parameters once."""
        optimizer: Any = self._optimizer
        if _has_hooks(optimizer) or not _has_own_step(optimizer):
            optimizer.step()
            return
        groups = optimizer.param_groups
        # For the time of the step alone: checkpoints and schedules know the groups that the user made.
        optimizer.param_groups = [part for place, group in enumerate(groups) for part in self._parts(place, group)]
        try:
            if self._plain is None or _COMPILER in sys.modules:
                optimizer.step()
            else:
                with torch.no_grad():
                    self._plain(optimizer)
                optimizer._opt_called = True  # learning-rate schedulers warn when they are stepped before the optimizer
        finally:
            optimizer.param_groups = groups

    def _parts(self, place: int, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The group with its small parameters in lists, where torch's `foreach` does the same to these."""
        if type(self._optimizer) not in (SGD, Adam, AdamW):
            return [group]
        members = group["params"]
        known, (single, *lists) = self._lists.get(place, ([], [[]]))
        if len(known) != len(members) or not all(map(operator.is_, known, members)):
            single, *lists = _in_lists(members)
            self._lists[place] = list(members), [single, *lists]
        if not lists or not _allows_lists(group):
            return [group]
        parts = [{**group, "params": small, "foreach": True} for small in lists]
        return [{**group, "params": single}, *parts] if single else parts


def _in_lists(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that are stepped on one by one, and then lists of the others, where these pay."""
    single: list[nn.Parameter] = []
    lists: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        plain = type(parameter).__name__ in _PLAIN and parameter.device.type == "cpu"
        own = parameter.numel() * parameter.element_size()
        # Of bfloat16, foreach rounds sums that are scaled (SGD with weight decay) otherwise.
        if not plain or own > SMALL_BYTES or parameter.dtype not in (torch.float32, torch.float64):
            single.append(parameter)
            continue
        if not lists or size + own > LIST_BYTES:
            lists.append([])
            size = 0
        lists[-1].append(parameter)
        size += own
    small = len(parameters) - len(single)
    return [single, *lists] if small >= FEWEST or not single else [parameters]


def _allows_lists(group: dict[str, Any]) -> bool:
    if group["foreach"] is not None or group["fused"] or group["differentiable"] or group.get("nesterov"):
        return False  # the user's choice; or torch would add the momentum of Nesterov to the gradients themselves
    if not all(isinstance(number, float | int) for number in (group["lr"], *group.get("betas", ()))):
        return False
    gradients = [parameter.grad for parameter in group["params"]]
    return all(gradient is None or gradient.layout is torch.strided for gradient in gradients)


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


def _has_own_step(optimizer: Optimizer) -> bool:
    """Whether nobody but a schedule, which only notes that there was a step, has put another step function into it."""
    step = vars(optimizer).get("step")
    return step is None or getattr(step, "__wrapped__", None) is type(optimizer).step


def _has_hooks(optimizer: Any) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or optimizer_module._global_optimizer_pre_hooks
        or optimizer_module._global_optimizer_post_hooks
    )
