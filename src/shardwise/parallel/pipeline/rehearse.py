"""Rehearsal: running a call on zeros where its shapes cannot be told without values, as in a router that picks rows.

Only the shapes of what comes out are kept. Where they depend on values after all, the real run finds out and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwise.dist.split import is_stand_in
from shardwise.parallel.pipeline.skeleton import Fakes
from shardwise.parallel.pipeline.watch import storage_key


@final
@dataclass(frozen=True)
class Rehearsal:
    """What came of it.

    Attributes:
        answer: of the call, with stand-ins for its tensors.
        originals: storage of a tensor of zeros -> storage of the stand-in whose place it took.
    """

    answer: Any
    originals: dict[int, int]


def rehearse(
    run: Callable[..., Any],
    module: nn.Module | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fakes: Fakes,
    samples: dict[int, Tensor],
) -> Rehearsal:
    """Call `run(*args, **kwargs)`, which calls the module if there is one, with zeros for all stand-ins.

    Args:
        samples: id of a stand-in that came out of a rehearsal -> the tensor it stands for, used in place of zeros; what
            comes out of this one is added.
    """
    made: dict[int, Tensor] = {}
    back: dict[int, Tensor] = {}
    originals: dict[int, int] = {}

    def real(tensor: Tensor) -> Tensor:
        if not is_stand_in(tensor):
            return tensor
        if id(tensor) not in made:
            sample = samples.get(id(tensor))
            if sample is None:
                zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            else:
                originals[storage_key(sample)] = storage_key(tensor)
                zeros = sample.clone()
            if tensor.requires_grad:
                zeros.requires_grad_()
                # autograd refuses to change a leaf in place
                zeros = zeros if isinstance(tensor, nn.Parameter) else zeros.clone()
            made[id(tensor)] = zeros
            back[id(zeros)] = tensor
            originals[storage_key(zeros)] = storage_key(tensor)
        return made[id(tensor)]

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) in back:
            return back[id(tensor)]
        if is_stand_in(tensor):
            return tensor
        stand_in: Tensor = fakes.mode.from_tensor(tensor.detach())
        if tensor.requires_grad:
            stand_in = stand_in.requires_grad_().clone()
        samples[id(stand_in)] = tensor.detach()
        return stand_in

    real_args, real_kwargs = pytree.tree_map_only(Tensor, real, (args, kwargs))
    if module is None:
        answer = run(*real_args, **real_kwargs)
    else:
        state = {name: real(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        answer = torch.func.functional_call(_Calls(module, run), named, real_args, real_kwargs)
    return Rehearsal(pytree.tree_map_only(Tensor, fake, answer), originals)


@final
class _Calls(nn.Module):
    """Runs what calls a module."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)
