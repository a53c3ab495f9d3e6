"""What a piece of a forward pass does below the surface: the storages it reads, writes and makes, and its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from shardwise.dist.split import is_stand_in

FLOP_PER_BYTE = 10.0
"""Floating-point operations a worker does in the time it moves one byte: a rough machine balance that lets layers
without matrix products count in the estimated cost of a stage. Chosen, not measured."""

_QUIET = {"prim::device", "aten::detach", "aten::view", "aten::t", "aten::transpose", "aten::select", "aten::expand"}


def storage_key(tensor: Tensor) -> int:
    """Identifies the memory behind a tensor while a tensor on it is alive; views of one tensor share it."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)


@final
class Watch(TorchDispatchMode):
    """Follows every operation of a forward pass; `start` begins a new account.

    Attributes:
        read, written, made: storages of tensor arguments, of arguments changed in place, and of results.
        random: an operation drew random numbers.
        made_fake: a result was a stand-in.
        asked: a value was read into Python.
        cost: estimated work, in floating-point operations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: list[Tensor] = []
        self.start()

    def start(self) -> None:
        """Forget what was seen so far. Tensors stay alive, so that no storage's key is given out twice."""
        self.read: set[int] = set()
        self.written: set[int] = set()
        self.made: set[int] = set()
        self.random = False
        self.made_fake = False
        self.asked = False
        self.cost = 0.0

    def rename(self, storages: dict[int, int]) -> None:
        """Account for storages under other keys."""
        self.read = {storages.get(key, key) for key in self.read}
        self.written = {storages.get(key, key) for key in self.written}
        self.made -= set(storages)

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name == "prim::device":
            return out
        self.asked |= name == "aten::_local_scalar_dense"
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        self._note_writes(func, args, kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        self.read.update(storage_key(tensor) for tensor in given)
        fresh = {storage_key(tensor) for tensor in results} - self.read - self.written
        self.made |= fresh
        self.made_fake |= any(is_stand_in(tensor) for tensor in results)
        self._alive.extend(results)
        if name not in _QUIET:
            self.cost += _work(func, args, kwargs, out, given, results)
        return out

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            self.written.update(storage_key(leaf) for leaf in leaves)


def _work(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, given: list[Tensor], results: list[Tensor]
) -> float:
    """Estimated floating-point operations of one operation, bytes included at `FLOP_PER_BYTE`."""
    name = func._schema.name
    flops = 0.0
    counter: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    if counter is not None:
        flops = float(counter(*args, **kwargs, out_val=out))
    elif "scaled_dot_product" in name:
        flops = float(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    elif any(part in name for part in ("rnn", "lstm", "gru")):
        # Every row of the input meets every weight once.
        rows = given[0].numel() // max(1, given[0].shape[-1])
        flops = 2.0 * rows * sum(tensor.numel() for tensor in given[1:] if tensor.dim() == 2)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in results)
    return flops + FLOP_PER_BYTE * moved
