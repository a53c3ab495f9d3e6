"""Split a model as planned: its parameters become DTensors, and its forward pass works on pieces.

The module tree, the names and the user's code stay as they are. While a forward function runs, torch functions that are
given one of the parameters are shown this rank's piece of it (`SplitTensor`), and the rules take over from there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import isfunction
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.overrides import TorchFunctionMode

from shardwise.dist.collectives import Group
from shardwise.dist.numbers import whole_numbers
from shardwise.errors import PlanError
from shardwise.parallel.tensor.dispatch import METADATA, dispatch, split_arguments
from shardwise.parallel.tensor.part import SplitTensor
from shardwise.parallel.tensor.plan import Share, TensorPlan
from shardwise.parallel.tensor.ring import Cut, Ring

AXIS = "tensor"
"""Name of the mesh's dim over which parameters are split here."""

_UNTOUCHED = METADATA | {
    "__get__",
    "__set__",
    "detach",
    "requires_grad_",
    "register_hook",
    "to_local",
    "full_tensor",
    "redistribute",
    "_make_subclass",
}
"""Functions that are given a parameter itself, because they compute nothing from it."""


def apply_split(
    model: nn.Module, plan: TensorPlan, group: Group, mesh: DeviceMesh, *, sharded_next: bool = False
) -> Callable[..., Any]:
    """Make every rank keep its share of the split parameters, and compute with it, in place.

    Every rank must hold the same whole model. Optimizers are made afterwards, over the new parameters.

    Args:
        model: with whole parameters.
        plan: from `find_split`, the same on all ranks.
        group: the ranks along the tensor axis.
        mesh: the same ranks as torch's DeviceMesh, with one dim.
        sharded_next: FSDP2 will shard the parameters further. It keeps the order of elements only along a dim that is not
            split in blocks: fused weights are then sharded along their other dim by `shard_model`, and fused biases, which
            have no other, stay whole on the tensor axis.

    Returns:
        `call(function, *args)`: runs what calls the model, for those who look at its torch functions with a mode of their own:
        theirs then sees the user's calls and not those on pieces.

    Raises:
        PlanError: the plan is for another number of ranks.
    """
    if plan.ranks != group.size or mesh.size() != group.size:
        raise PlanError(f"a split for {plan.ranks} ranks was given to a tensor axis of {group.size}")
    whole_numbers()
    ring = Ring.of(group)
    replaced: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if name in plan.shares and not (sharded_next and parameter.dim() == 1 and plan.shares[name].outer > 1):
            replaced[id(parameter)] = _split_parameter(parameter, plan.shares[name], ring, mesh)
    wires = _Wires(ring)
    made = {id(parameter) for parameter in replaced.values()}
    around = [module for module in model.modules() if any(id(p) in replaced for p in module.parameters())]
    for module in model.modules():
        for key, whole in module._parameters.items():
            if whole is not None and id(whole) in replaced:
                module._parameters[key] = replaced[id(whole)]
    for module in dict.fromkeys([model, *around]):
        own = any(id(p) in made for p in module._parameters.values())
        wires.connect(module, forward_only=not own and module is not model)
    return wires.call


def _split_parameter(parameter: nn.Parameter, share: Share, ring: Ring, mesh: DeviceMesh) -> nn.Parameter:
    cut = Cut(share.dim, share.outer, parameter.shape[share.dim] // share.outer, ring.size)
    piece = cut.piece(parameter.detach(), ring.members[0]).clone(memory_format=torch.contiguous_format)
    placement = Shard(share.dim) if share.outer == 1 else _StridedShard(share.dim, split_factor=share.outer)
    split = DTensor.from_local(
        piece, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.contiguous().stride()
    )
    made = nn.Parameter(split, requires_grad=parameter.requires_grad)
    made.__dict__.update({key: value for key, value in parameter.__dict__.items() if key not in made.__dict__})
    return made


def piece_of(parameter: DTensor, ring: Ring) -> Tensor:
    """A parameter as the rules see it: split, or plain where it is whole."""
    placement = parameter.placements[0]
    if placement.is_replicate():
        return _own(parameter)
    if isinstance(placement, _StridedShard):
        dim, outer = placement.dim, int(placement.split_factor)
    else:
        assert isinstance(placement, Shard)
        dim, outer = placement.dim, 1
    cut = Cut(dim, outer, parameter.shape[dim] // outer, ring.size)
    return SplitTensor((_own(parameter),), cut, ring, parameter=True)


def _own(parameter: DTensor) -> Tensor:
    """What this rank holds, also where no gradient is asked for: a parameter, which nobody takes for a kind of input."""
    own: Tensor = parameter.to_local()
    return own if own.requires_grad else nn.Parameter(own, requires_grad=False)


@final
class _Wires:
    """Runs forward functions with the mode switched on.

    The model's own forward switches it on for everything below. Modules around split parameters switch it on too, for calls
    from elsewhere: an objective that calls a method of the model, or recomputation in the backward pass.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._active = 0

    def connect(self, module: nn.Module, *, forward_only: bool = False) -> None:
        """Let the module's forward, and the other functions that its author wrote, run with the mode."""
        names = {"forward"}
        for kind in type(module).__mro__:
            if forward_only or kind.__module__.startswith("torch.") or kind is object:
                break
            names |= {name for name, value in vars(kind).items() if isfunction(value) and not name.startswith("__")}
        for name in names:
            function = getattr(module, name)
            wired: Any = functools.partial(self.call, function)
            wired.__signature__ = inspect.signature(function)  # some code counts the arguments of what it is given
            setattr(module, name, wired)

    def call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a bound function of a module."""
        if self._active:
            return forward(*args, **kwargs)
        self._active += 1
        try:
            with _PieceMode(self._ring):
                return forward(*args, **kwargs)
        finally:
            self._active -= 1
            self._ring.entered.clear()


@final
class _PieceMode(TorchFunctionMode):
    """Shows the rules every call that involves a split parameter."""

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self._ring = ring

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        if not any(_is_split(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func.__name__ in _UNTOUCHED and not isinstance(args[0], SplitTensor):
            return func(*args, **kwargs)
        args = tuple(self._shown(value) for value in args)
        kwargs = {name: self._shown(value) for name, value in kwargs.items()}
        return dispatch(func, args, kwargs) if split_arguments(args, kwargs) else func(*args, **kwargs)

    def _shown(self, value: Any) -> Any:
        if _is_parameter(value):
            return piece_of(value, self._ring)
        if type(value) in (list, tuple):
            return type(value)(self._shown(item) for item in value)
        return value


def _is_split(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, SplitTensor) or _is_parameter(item) for item in value)
    return isinstance(value, SplitTensor) or _is_parameter(value)


def _is_parameter(value: Any) -> bool:
    """A parameter of the tensor axis; DTensors of other axes (experts) are none of its business."""
    return isinstance(value, DTensor) and value.device_mesh.mesh_dim_names == (AXIS,)
