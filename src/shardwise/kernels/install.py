"""Put the compiled kernels in the place of torch's, under the operators themselves, for the rest of this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from shardwise.kernels import convolution, pending, pooled, pooling
from shardwise.kernels.library import Kernel, load, load_convolutions

OPERATORS: dict[str, dict[str, Callable[[Kernel], Kernel]]] = {
    "pooling": {pooling.OPERATOR: pooling.max_pooling},
    "convolutions": {
        convolution.FORWARD: convolution.convolution,
        convolution.BACKWARD: convolution.gradients,
    },
}
"""Kind -> name of an operator of `aten` -> makes its kernel from torch's."""

TORCHS_FORWARD = nn.Conv2d.forward


def use_fast_kernels(model: nn.Module) -> None:
    """Let this process compute by the compiled kernels from now on, those that this model gains from.

    A kernel of Python in the place of a small convolution costs up to a tenth of a tiny net's step, so the convolutions are
    left alone until a model has a layer that they may pay for.
    """
    if load() is not None:
        replace("pooling")
    pools = any(isinstance(layer, nn.MaxPool2d) for layer in model.modules())
    if load_convolutions() is not None and any(convolution.may_pay(layer, pools) for layer in model.modules()):
        replace("convolutions")
    if load_convolutions() is not None and any(pooled.may_pay(layer) for layer in model.modules()):
        put_off_convolutions()


@cache
def put_off_convolutions() -> None:
    """Let convolutions wait for the pooling behind them, once for the process."""
    nn.Conv2d.forward = pending.putting_off(TORCHS_FORWARD)  # type: ignore


def use_all_kernels() -> None:
    """Let this process compute by all compiled kernels there are, for whoever times what trainings use."""
    if load() is not None:
        replace("pooling")
    if load_convolutions() is not None:
        replace("convolutions")


@cache
def replace(kind: str) -> torch.library.Library:
    """Put the kernels of one kind in place, once; the registration lives as long as the process."""
    registration = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch warns of every kernel that takes the place of another
        warnings.filterwarnings("ignore", message=r"\s*Warning only once for all operators")
        for name, make in OPERATORS[kind].items():
            registration.impl(name, make(_torchs(name)), "CPU", allow_override=True)
    return registration


def _torchs(name: str) -> Kernel:
    native = torch.library.get_kernel(f"aten::{name}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def call(*arguments: object) -> object:
        return native.call_boxed(keys, *arguments)

    return call
