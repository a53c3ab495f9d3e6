"""Models and modules that their author gave to `torch.compile`, and the axes that cannot look into them."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import torch
from torch import nn

from shardwise.dist.collectives import Group, Work
from shardwise.errors import PlanError
from shardwise.spec.plan import Plan

_BLIND = {"context": "does not ask for whole sequences", "tensor": "does not ask how split weights are used"}
"""Axes that follow a model's calls from outside, and what compiled code does not do for them."""


def check_compiled(model: nn.Module, plan: Plan) -> None:
    """Refuse axes that compiled code does not work under, whoever compiles it.

    Raises:
        PlanError: names the axis and the module.
    """
    for axis, reason in _BLIND.items():
        if plan.layout.degrees[axis] == 1:
            continue
        if plan.compile:
            raise PlanError(f"plan {plan.layout} with compile: compiled code {reason}; leave one of them out")
        for name in _compiled(model):
            raise PlanError(
                f"plan {plan.layout}: {_called(name)} was given to torch.compile, and compiled code {reason}; leave "
                f"torch.compile out of the model's function, or plan without {axis}"
            )


def check_compiled_cut(model: nn.Module, opened: Collection[str]) -> None:
    """Refuse compiled modules that a pipeline cuts; those that lie in one stage run as they are.

    Args:
        model: whose modules.
        opened: names of the modules whose own forward function runs on several stages, beside the model's own.

    Raises:
        PlanError: names the module.
    """
    for name in _compiled(model):
        if name in ("", *opened):
            raise PlanError(
                f"{_called(name)} was given to torch.compile, and a pipeline cuts it, so that it never runs as a whole; leave "
                "torch.compile out of the model's function and set Job.compile (--compile) instead, which compiles the parts "
                "of every stage"
            )


def keep_from_messages(model: nn.Module, plan: Plan) -> None:
    """Where something is compiled, let the compiler not look into collectives: it takes numpy's views of shared memory for
    tensors of its own, and what it writes does not get there."""
    if plan.compile or _compiled(model):
        _keep_from_messages()


@cache
def _keep_from_messages() -> None:
    for kind, names in ((Group, ("sum_", "start_sum_", "gather", "exchange")), (Work, ("wait",))):
        for name in names:
            setattr(kind, name, torch.compiler.disable(getattr(kind, name)))


def _compiled(model: nn.Module) -> list[str]:
    """Names of what went through `torch.compile(module)`, whose class lives in a module that is slow to import, or
    `module.compile()`."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
    ]


def _called(name: str) -> str:
    return f"module {name!r}" if name else "the model"
