"""Put the compiled kernels in the place of torch's, under the operators themselves, for the rest of this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch

from shardwise.kernels import convolution, pooling
from shardwise.kernels.library import Kernel, load, load_convolutions

POOLING: dict[str, Callable[[Kernel], Kernel]] = {pooling.OPERATOR: pooling.max_pooling}
"""Name of an operator of `aten` -> makes its kernel from torch's."""

CONVOLUTIONS: dict[str, Callable[[Kernel], Kernel]] = {
    convolution.FORWARD: convolution.convolution,
    convolution.BACKWARD: convolution.gradients,
}
"""The same, for processors whose vectors are long enough for them to pay."""


@cache
def use_fast_kernels() -> torch.library.Library | None:
    """Let this process compute by the compiled kernels from now on; None where there are none.

    Returns:
        The registration, which lives as long as the process.
    """
    operators = (POOLING if load() is not None else {}) | (CONVOLUTIONS if load_convolutions() is not None else {})
    if not operators:
        return None
    registration = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch warns of every kernel that takes the place of another
        warnings.filterwarnings("ignore", message=r"\s*Warning only once for all operators")
        for name, make in operators.items():
            registration.impl(name, make(_torchs(name)), "CPU", allow_override=True)
    return registration


def _torchs(name: str) -> Kernel:
    native = torch.library.get_kernel(f"aten::{name}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def call(*arguments: object) -> object:
        return native.call_boxed(keys, *arguments)

    return call
