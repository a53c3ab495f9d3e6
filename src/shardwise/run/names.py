"""The user's own names of a model's tensors, whatever torch has wrapped around the model."""

from __future__ import annotations

import sys
from typing import cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardwise.dist.split import is_stand_in

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Modules that torch.compile and activation checkpointing put between a module and its parent."""


def own_name(name: str) -> str:
    """A dotted name without the parts that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def own_model(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel` and `torch.compile`; the model itself where it is in neither."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # its class lives in a module that is slow to import
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its split parameters back in place; after a forward without a backward they are whole."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        for part in model.modules():
            if isinstance(part, module.FSDPModule):
                part.reshard()


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """Every parameter and buffer that this rank has of a model, once.

    Returns:
        tensors by name; for a tensor with several names the first in the order of `named_parameters`;
        the further names of tied tensors, each with its first name;
        which of the names are buffers.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    parameters = [(own_name(name), tensor) for name, tensor in model.named_parameters(remove_duplicate=False)]
    buffers = [(own_name(name), tensor) for name, tensor in model.named_buffers(remove_duplicate=False)]
    for name, tensor in parameters + buffers:
        if is_stand_in(tensor):
            continue
        if id(tensor) in first:
            if name != first[id(tensor)]:
                aliases[name] = first[id(tensor)]
        else:
            assert name not in tensors, f"two tensors are called {name}"
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases, {name for name, _ in buffers if name in tensors}
