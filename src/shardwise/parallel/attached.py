"""What a user attached to parameters: hooks on their gradients, and attributes of their own.

A hook on a parameter sees a gradient in the backward pass. On one worker that is the gradient of the whole batch; on one of
several it would be that of a part, divided by what is counted later, and FSDP2 puts other parameters in the place of those
that have the hook. So hooks are taken off, and called once a step on the whole gradient, before clipping, on every layout.
Attributes (`parameter.lr_scale = 0.1`, read where the optimizer's groups are made) are given to what took the parameter's
place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn

from shardwise.dist.split import is_dtensor, is_elsewhere, whole_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Hook = Callable[[Tensor], Any]


@final
@dataclass
class Attached:
    """What was attached to the parameters of a model, by the names of these.

    Attributes:
        hooks: of `Tensor.register_hook`: gradient -> None or another gradient.
        after: of `Tensor.register_post_accumulate_grad_hook`: called with the parameter.
        attributes: name of the parameter -> its own attributes.
    """

    hooks: dict[str, tuple[Hook, ...]] = field(default_factory=dict)
    after: dict[str, tuple[Hook, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    _to_call: list[tuple[nn.Parameter, tuple[Hook, ...], tuple[Hook, ...]]] = field(default_factory=list)

    def put_back(self, model: nn.Module) -> None:
        """Give attributes to the parameters as they are now, and remember whose gradients hooks look at."""
        seen: set[int] = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if is_elsewhere(parameter):
                continue
            for key, value in self.attributes.get(name, {}).items():
                vars(parameter).setdefault(key, value)
            hooks, after = self.hooks.get(name, ()), self.after.get(name, ())
            if (hooks or after) and id(parameter) not in seen:
                seen.add(id(parameter))
                self._to_call.append((parameter, hooks, after))

    def call_hooks(self) -> None:
        """Let the hooks see and change the gradients of the step. Collective where gradients are split."""
        if self._to_call:
            self._call_hooks()

    @torch.no_grad()
    def _call_hooks(self) -> None:
        for parameter, hooks, after in self._to_call:
            if parameter.grad is None:
                continue
            if hooks:
                parameter.grad = _through(hooks, parameter.grad)
            for hook in after:
                hook(parameter)


def take_off(model: nn.Module) -> Attached:
    """Remove the hooks from the model's parameters, and note their attributes."""
    found = Attached()
    taken: dict[int, tuple[tuple[Hook, ...], tuple[Hook, ...]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in taken:
            taken[id(parameter)] = (
                _cleared(parameter, "_backward_hooks"),
                _cleared(parameter, "_post_accumulate_grad_hooks"),
            )
        hooks, after = taken[id(parameter)]
        if hooks:
            found.hooks[name] = hooks
        if after:
            found.after[name] = after
        if vars(parameter):
            found.attributes[name] = dict(vars(parameter))
    return found


def _cleared(parameter: nn.Parameter, where: str) -> tuple[Hook, ...]:
    """The hooks of a kind, which are removed: torch looks into the same dict at every backward pass."""
    hooks: dict[int, Hook] | None = getattr(parameter, where, None)
    if not hooks:
        return ()
    found = tuple(hooks.values())
    hooks.clear()
    return found


def _through(hooks: tuple[Hook, ...], gradient: Tensor) -> Tensor:
    whole = whole_tensor(gradient)
    for hook in hooks:
        changed = hook(whole)
        whole = whole if changed is None else changed
    return _split_as(whole.detach(), cast("DTensor", gradient)) if is_dtensor(gradient) else whole


def _split_as(whole: Tensor, gradient: DTensor) -> Tensor:
    """A tensor that all ranks have, split as the gradient is; sends nothing."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = gradient.device_mesh, gradient.placements
    split = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # The last mesh dim first: pieces that are split again (shard over tensor) are pieces of these.
    for dim in reversed(range(mesh.ndim)):
        split = split.redistribute(placements=[Replicate()] * dim + list(placements[dim:]))
    return split
