"""Sharded data parallelism: as data parallelism, with parameters, gradients and optimizer states split over the ranks.

Built on torch's FSDP2 (`fully_shard`). Before a unit of the model computes, its parameters are gathered; after its
backward pass, their gradients are reduced and scattered. With a data axis beside it (hybrid sharding), the scattered
gradients are then summed over the replicas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils import _pytree as pytree

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import PART_AXES, PARTS, Mesh
from shardwise.dist.numbers import whole_numbers
from shardwise.dist.split import local_part
from shardwise.errors import PlanError, RunFailed
from shardwise.parallel.blocks import CONTAINERS, has_forward, repeated_blocks
from shardwise.parallel.data import sparse_parameters
from shardwise.parallel.deferred.memory import garbage_found_soon
from shardwise.parallel.metered import Order, meter_collectives

if TYPE_CHECKING:
    from shardwise.parallel.deferred.build import Deferred


def check_shard(model: nn.Module, *, whole: bool = True) -> None:
    """Refuse what cannot be sharded.

    Args:
        model: whole still.
        whole: what lies around the units is split too, as it is without a pipeline.

    Raises:
        PlanError: the model has embeddings with sparse gradients, a unit has trained parameters of several types, or a model
            without a forward pass has parameters outside of its parts, or in two of them.
    """
    seen: set[nn.Parameter] = set()
    if whole:
        _check_parts(model)
    for name in [*unit_names(model), *(part_names(model) if whole else [])]:
        here = model.get_submodule(name).parameters()
        trained = [p for p in here if p.requires_grad and _is_divisible(p) and p not in seen]
        seen.update(trained)
        types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained})
        if len(types) > 1:
            raise PlanError(
                f"{f'module {name!r}' if name else 'the model outside its repeated blocks'} has trained parameters of types "
                f"{' and '.join(types)}, which FSDP2 cannot gather together: give them one type, or use data="
            )
    sparse = sorted(sparse_parameters(model))
    if sparse:
        raise PlanError(
            f"parameter {sparse[0]} has sparse gradients (an embedding with sparse=True), which FSDP2 cannot scatter: build "
            "it with sparse=False, or use data= instead of shard="
        )


@final
class Sharded:
    """The parameters that FSDP2 holds, and which of them took part in the step under way.

    FSDP2 reduces the gradients of a unit in one message, of those parameters that have one. Where ranks take different
    branches (or have no samples), these messages would not match; so every rank fills in zeros, and afterwards a
    parameter that no rank used gets back the missing gradient it would have in a serial run.
    """

    def __init__(
        self, model: nn.Module, units: list[str], samples: Group, held: AbstractSet[nn.Parameter], order: Order
    ) -> None:
        self.units = units
        self._order = order
        self._told: tuple[torch.Tensor, tuple[int, int]] | None = None
        self.held = [p for p in model.parameters() if p in held]
        self._samples = samples
        self._used: set[int] = set()
        self._forward_only = False
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in _parameter_groups(module):
                    self._complete(group)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained now: a loop may freeze and thaw them."""
        return [parameter for parameter in self.held if parameter.requires_grad]

    def finish(self) -> None:
        """After the last backward pass of a step: drop the gradients of parameters that no rank used. Collective.

        Raises:
            RunFailed: ranks did not gather the same units in the same order.
        """
        trained = self.parameters
        if not trained:
            return
        unused = [index for index, parameter in enumerate(trained) if id(parameter) not in self._used]
        device, order = local_part(trained[0]).device, self._order.take()
        flags = torch.tensor([1] * len(trained) + [*order], dtype=torch.int32, device=device)
        flags[unused] = 0
        self._samples.sum_(flags)
        told, self._told = self._told, (flags[len(trained) :], order)
        # Reading what was sent just now waits for the device: there, the order of the step before is looked at.
        if device.type == "cpu":
            told = self._told
        if told is not None:
            self._check_order(told[0].tolist(), told[1])
        if unused:  # reading the flags waits for the device
            for index in (flags[unused] == 0).nonzero().flatten().tolist():
                trained[unused[index]].grad = None
        self._used.clear()

    def _check_order(self, sums: list[int], own: tuple[int, int]) -> None:
        if sums != [self._samples.size * number for number in own]:
            raise RunFailed(
                "the workers did not compute the blocks of the model in the same order, so that gathered weights were those of "
                "other blocks: the forward pass leaves blocks out at random (stochastic depth), or by the values of its samples. "
                "Multiply the block's output by 0 or 1 instead of leaving it out, or use data= in place of shard="
            )

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """While the block runs, gradients through the units are refused.

        FSDP2 takes the first backward pass through a unit for the only one: it reduces what gradients there are and frees the
        gathered weights. A gradient that is taken on the way to the loss would leave wrong ones, without an error.

        Raises:
            PlanError: the block takes one.
        """
        self._forward_only = True
        try:
            yield
        finally:
            self._forward_only = False

    def _complete(self, group: Any) -> None:
        reduce, gather = group.post_backward, group.pre_backward

        def pre_backward(*args: Any, **options: Any) -> None:
            if self._forward_only:
                raise PlanError(
                    "the loss or the model takes a gradient (torch.autograd.grad) on the way to the loss, as a gradient "
                    "penalty does, and FSDP2 takes the first backward pass through its parameters for the only one: use data= in "
                    "place of shard="
                )
            gather(*args, **options)

        group.pre_backward = pre_backward

        def post_backward(*unused: Any) -> None:
            for item in group.fsdp_params:
                # The method is called again at the end of the backward pass, when the parameters are split again.
                if item.sharded_state.name != "UNSHARDED" or not item.sharded_param.requires_grad:
                    continue
                if item.unsharded_param.grad is None and item.unsharded_accumulated_grad is None:
                    item.unsharded_param.grad = torch.zeros_like(item.unsharded_param)
                else:
                    self._used.add(id(item.sharded_param))
            reduce(*unused)

        group.post_backward = post_backward


def shard_model(
    model: nn.Module,
    mesh: Mesh,
    *,
    no_units: Collection[str] = (),
    ignored: set[nn.Parameter] | None = None,
    stage: Sequence[str] | None = None,
    deferred: Deferred | None = None,
    keep: bool = False,
) -> Sharded:
    """Split the model's parameters over the mesh's shard axis (and replicate the shards over its data axis), in place.

    Gradients come out as sums over the samples' ranks: each rank's loss is already its share of the global mean.

    Args:
        model: with parameters that are plain or DTensors over the tensor axis.
        mesh: all ranks.
        ignored: parameters that are split otherwise (experts).
        no_units: names of modules that must not become units, because tensors that only tensor parallelism understands pass
            in or out of them.
        stage: names of modules that run as a whole on this rank's pipeline stages and that no other stage shares: they are
            split, and what lies around them is not. None splits the whole model.
        deferred: gives `model` those weights that it lacks still: those of a unit just before it is split, so that a rank has
            room for its parts and the largest unit.
        keep: what was gathered for the forward pass is kept for the backward pass (ZeRO stage 2), not gathered again (stage 3).
    """
    whole_numbers()
    device_mesh = _mesh(mesh)
    # What cannot be split stays on every rank and is summed with what is not sharded.
    ignored = (ignored or set()) | {parameter for parameter in model.parameters() if not _is_divisible(parameter)}
    modules = dict(model.named_modules())
    names = unit_names(model, no_units) if stage is None else _stage_units(model, stage)

    def split(module: nn.Module, *, again: bool) -> None:
        for parameter in module.parameters():
            if (
                not isinstance(parameter, DTensor) and not parameter.is_contiguous()
            ):  # FSDP2 takes none, as of channels_last
                parameter.data = parameter.detach().contiguous()
        module.register_forward_hook(_owned)  # before FSDP2's own hook, which looks at what is returned
        fully_shard(
            module,
            mesh=device_mesh,
            shard_placement_fn=_other_dim,
            ignored_params=ignored,
            reshard_after_forward=again,
        )

    with garbage_found_soon() if deferred is not None else nullcontext(_nothing) as collect:
        for name in names:
            if deferred is not None:
                deferred.fill(modules[name])
            split(modules[name], again=not keep)
            collect()
        if deferred is not None:
            deferred.fill(model)
        if stage is None:
            # What a root itself holds is needed at the start of the backward pass again: do not send it twice.
            roots = part_names(model)
            for name in roots:
                split(modules[name], again=False)
            names = [*names, *roots]
        collect()
    order = Order()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            meter_collectives(_parameter_groups(module), mesh.meter, mesh.layout.data, order)
    held = dict.fromkeys(parameter for name in names for parameter in model.get_submodule(name).parameters())
    return Sharded(model, names, mesh.group("data", "shard", "context", "expert"), held.keys() - ignored, order)


def _is_divisible(parameter: nn.Parameter) -> bool:
    """FSDP2 takes no single number, and no tensor without numbers."""
    return parameter.dim() > 0 and parameter.numel() > 0


def _owned(module: nn.Module, args: Any, output: Any) -> Any:
    """What a unit returns, with copies in place of views.

    FSDP2 hangs the gathering for the backward pass on the tensors that are returned. A change in place (`x += y`) of a
    view drops that without an error, and gradients may come out wrong; of a tensor of its own it does not.
    """
    return pytree.tree_map_only(torch.Tensor, _copied_view, output)


def _copied_view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.requires_grad and tensor._is_view() else tensor


def _nothing() -> None:
    """Leaves garbage to the collector's own times."""


def split_again(model: nn.Module) -> None:
    """Put the model's parameters back into their split form after forward passes that no backward pass followed.

    FSDP2 does that in the backward pass. Until then `model.parameters()` are the whole ones, whose gradients are others
    than those the optimizer uses: clearing them would leave the last step's gradients to be added to the next step's.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _mesh(mesh: Mesh) -> DeviceMesh:
    """Replicas over data; parts over shard, and over context and expert too, whose ranks need the same sums of gradients."""
    layout = mesh.layout
    if layout.context * layout.expert == 1:
        return mesh.device_mesh("data", "shard")
    flat = mesh.device_mesh(*PART_AXES)._flatten(PARTS)
    if layout.data == 1:
        return flat
    # torch is about to forbid slicing a mesh by a flattened dim, so the two dims are put together anew.
    return DeviceMesh._concatenate([mesh.device_mesh("data"), flat])


def _other_dim(parameter: nn.Parameter) -> Shard | None:
    """Tensor parallelism splits a fused projection in blocks of its first dim, whose order FSDP2 would lose: take the next."""
    if not isinstance(parameter, DTensor) or type(parameter.placements[-1]) is not _StridedShard:
        return None
    return Shard(1) if parameter.placements[-1].dim == 0 else None


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's own record of what it gathers and reduces together; one a unit before torch 2.13, a list since."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def part_names(model: nn.Module) -> list[str]:
    """Names of the modules that are called from outside: the model itself, or the parts of one without a forward pass.

    Such a model (a `ModuleDict` of a generator and a discriminator, say) is never called: its objectives call the parts.
    """
    found, waiting = [], [("", model)]
    while waiting:
        name, module = waiting.pop(0)
        if has_forward(module):
            found.append(name)
        else:
            waiting = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()] + waiting
    return [name for name in found if any(True for _ in model.get_submodule(name).parameters())]


def _check_parts(model: nn.Module) -> None:
    parts = part_names(model)
    seen: dict[nn.Parameter, str] = {}
    for part in parts:
        for name, parameter in model.get_submodule(part).named_parameters():
            if seen.setdefault(parameter, part) != part:
                raise PlanError(
                    f"parameter {part}.{name} is also one of {seen[parameter]}, and the model has no forward pass of its own, so "
                    "that FSDP2 would not know when to gather it: put the parts into a module with a forward pass, or use data="
                )
    for name, parameter in model.named_parameters():
        if parameter not in seen:
            raise PlanError(
                f"parameter {name} lies in no module with a forward pass, so that FSDP2 would not know when to gather it: put it "
                "into the module that uses it, or use data="
            )


def unit_names(model: nn.Module, no_units: Collection[str] = ()) -> list[str]:
    """Names of the modules that become units: repeated blocks, else the children of a sequential model, else none; of a model
    without a forward pass, those of its parts.

    A unit is gathered by all ranks when it is called, so it must be one that every rank calls in every pass. A module that
    shares a parameter with the rest of the model is no unit, because a shared parameter must be gathered with all its users:
    it stays with the root.
    """
    parts = part_names(model)
    if parts != [""]:
        named = [(part, unit) for part in parts for unit in unit_names(model.get_submodule(part))]
        return [name for part, unit in named if (name := f"{part}.{unit}") not in no_units]
    holders = _holders(model)
    chosen = repeated_blocks(model)
    if not chosen and isinstance(model, nn.Sequential):
        chosen = [name for name, _ in model.named_children()]
    modules = dict(model.named_modules())
    return [name for name in chosen if name not in no_units and _can_stand_alone(modules[name], holders)]


def _stage_units(model: nn.Module, stage: Sequence[str]) -> list[str]:
    """The units of a pipeline stage, inner ones first: the modules that run as a whole, and repeated blocks inside them."""
    holders = _holders(model)
    found = []
    for name in stage:
        module = model.get_submodule(name)
        if _can_stand_alone(module, holders):
            found += [*(f"{name}.{inner}" for inner in unit_names(module)), name]
    return found


def _holders(model: nn.Module) -> Counter[int]:
    """Identity of a parameter -> how many modules hold it."""
    holders: Counter[int] = Counter()
    for module in model.modules():
        holders.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    return holders


def _can_stand_alone(module: nn.Module, holders: Counter[int]) -> bool:
    """The module has parameters, and none of them is used outside of it; containers are never called themselves."""
    if isinstance(module, CONTAINERS):
        return False
    inside: Counter[int] = Counter()
    for child in module.modules():
        inside.update(id(parameter) for parameter in child._parameters.values() if parameter is not None)
    return bool(inside) and all(holders[key] == count for key, count in inside.items())
