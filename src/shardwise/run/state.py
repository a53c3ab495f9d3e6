"""Model and optimizer as one flat mapping of named tensors, and a description of everything else.

Names in the mapping: `model/<name>`, `optimizer/<name>/<key>` for the optimizer's state of a parameter,
`options/<group>/<key>` for options of a parameter group that are tensors, `extra/<module>/...` for the extra state of
modules. `<name>` is the user's own name of the parameter or buffer, so a layout, a wrapper or another order of the
parameters changes nothing. A tied tensor is kept once, under its first name.

Buffers are kept whether persistent or not: one that a forward pass changes is part of where the training stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardwise.dist.split import is_dtensor
from shardwise.errors import CheckpointError
from shardwise.parallel.replicas import checksum
from shardwise.parallel.several import Several
from shardwise.run.encoding import encode
from shardwise.run.names import named_tensors, own_model, own_name, reshard
from shardwise.run.turns import Schedules

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Structure = dict[str, Any]
"""JSON data that describes what the mapping holds; see `collect`."""

HOW_OPTIONS = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options that choose how a step is computed, not what: they stay as the resuming run has them."""


@dataclass(frozen=True)
class Collected:
    """This rank's part of the training's state.

    Attributes:
        tensors: the flat mapping; tensors are the training's own, detached.
        structure: `model` (name -> shape and dtype), `aliases`, `buffers`, `extra` (module -> encoded) and `optimizer`:
            its `class`, `groups` (encoded `options`, names of the `parameters`) and `state` (name -> key -> encoded).
    """

    tensors: dict[str, Tensor]
    structure: Structure


def collect(model: nn.Module, optimizer: Optimizer) -> Collected:
    """Describe where the training stands on this rank. No collective, no copy.

    Raises:
        CheckpointError: a tensor without values, an optimizer with parameters outside the model, or a value of a kind
            that a checkpoint does not keep.
    """
    model = own_model(model)
    reshard(model)
    named, aliases, buffers = named_tensors(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise CheckpointError(f"{name} has no values yet: a model is saved and loaded after its tensors were made")
        tensors[f"model/{name}"] = settled(tensor.detach())
    structure: Structure = {
        "model": {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in named.items()},
        "aliases": aliases,
        "buffers": sorted(buffers),
        "extra": _extra_state(model, tensors),
        "optimizer": _optimizer_structure(optimizer, parameter_names(named), tensors),
    }
    return Collected(tensors, structure)


def parameter_names(named: Mapping[str, Tensor]) -> dict[int, str]:
    """Identity of a tensor -> its name."""
    return {id(tensor): name for name, tensor in named.items()}


def group_names(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """Names of the parameters of each group.

    Raises:
        CheckpointError: a parameter that the model does not hold.
    """
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        unknown = [place for place, parameter in enumerate(group["params"]) if id(parameter) not in names]
        if unknown:
            shape = tuple(group["params"][unknown[0]].shape)
            raise CheckpointError(
                f"parameter {unknown[0]} of optimizer group {index}, of shape {shape}, is none of the model's: "
                "checkpoints name parameters as the model does, so make it a parameter of the model (or make the "
                "optimizer after the model is in its final form)"
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def class_name(thing: object) -> str:
    """Full name of a thing's class, or of those that it stands for. Schedulers patch instances, never classes, so this is
    the user's choice."""
    if isinstance(thing, Several):
        return " and ".join(map(class_name, thing.each))
    if isinstance(thing, Schedules):
        return " and ".join(map(class_name, thing.of.values()))
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def settled(tensor: Tensor) -> Tensor:
    """A split tensor as a checkpoint can put it together: every rank has one block of it. Collective where it is not so."""
    placements = settled_placements(tensor)
    return tensor if placements is None else cast("DTensor", tensor).redistribute(placements=placements)


def settled_placements(tensor: Tensor) -> list[Placement] | None:
    """How a tensor must be split to be settled; None where it is.

    Two kinds are not: summands that are still to be added up, and fused weights of whose every part a rank has a share.
    """
    if not is_dtensor(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    split = cast("DTensor", tensor)
    placements: list[Placement] = []
    for index, placement in enumerate(split.placements):
        if placement.is_partial():
            placements.append(Replicate())
        elif isinstance(placement, _StridedShard):
            # FSDP2 over a tensor axis splits the axis' pieces again, which gives blocks: as many strides as there are pieces.
            later = [
                split.device_mesh.size(other)
                for other in range(index + 1, split.device_mesh.ndim)
                if type(split.placements[other]) is Shard and cast(Shard, split.placements[other]).dim == placement.dim
            ]
            placements.append(placement if prod(later) == placement.split_factor else Shard(placement.dim))
        else:
            placements.append(placement)
    return None if tuple(placements) == tuple(split.placements) else placements


def room_for(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What to load a tensor's values into: itself where it is settled and of that dtype, else an empty one that is. Not
    collective."""
    placements = settled_placements(tensor)
    if placements is None:
        return tensor if dtype is None else torch.empty_like(tensor, dtype=dtype)
    from torch.distributed.tensor import empty

    mesh = cast("DTensor", tensor).device_mesh
    return empty(*tensor.shape, dtype=dtype or tensor.dtype, device_mesh=mesh, placements=placements)


def as_split(room: Tensor, tensor: Tensor) -> Tensor:
    """Values that were loaded into `room_for(tensor)`, split as the tensor is. Collective where it is not settled."""
    if settled_placements(tensor) is None:
        return room
    return cast("DTensor", room).redistribute(placements=cast("DTensor", tensor).placements)


def modules_with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that define `get_extra_state`, by name."""
    return {
        own_name(name): module
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def extra_state_sums(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By the names of modules with extra state, what tells whether another worker has the same."""
    sums: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, module in modules_with_extra_state(own_model(model)).items():
        tensors: dict[str, Tensor] = {}
        plain = json.dumps(encode(module.get_extra_state(), f"extra/{name}", tensors), sort_keys=True)
        sums[name] = plain, tuple(int(checksum(tensor)) for tensor in tensors.values() if not is_dtensor(tensor))
    return sums


def _extra_state(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: encode(module.get_extra_state(), f"extra/{name}", tensors)
        for name, module in modules_with_extra_state(model).items()
    }


def _optimizer_structure(optimizer: Optimizer, names: Mapping[int, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    groups = []
    for index, parameters in enumerate(group_names(optimizer, names)):
        options = {
            key: encode(value, f"options/{index}/{key}", tensors)
            for key, value in optimizer.param_groups[index].items()
            if key not in ("params", "param_names")
        }
        groups.append({"options": options, "parameters": parameters})
    states = {}
    for parameter, state in optimizer.state.items():
        if not state:
            continue
        if id(parameter) not in names:
            raise CheckpointError(
                f"{class_name(optimizer)} keeps state for {type(parameter).__name__} that is none of the model's "
                "parameters: a checkpoint cannot name it"
            )
        name = names[id(parameter)]
        mine: dict[str, Tensor] = {}
        states[name] = encode(dict(state), f"optimizer/{name}", mine)
        tensors.update({key: settled(tensor) for key, tensor in mine.items()})
    return {"class": class_name(optimizer), "groups": groups, "state": states}


def merge(structures: Iterable[Structure]) -> Structure:
    """The structure of the whole training from those of its ranks, which may hold different parts of the model.

    Raises:
        CheckpointError: ranks that disagree about the optimizer.
    """
    whole: Structure = {}
    for part in structures:
        if not whole:
            whole = part
            continue
        if part == whole:
            continue
        a, b = whole["optimizer"], part["optimizer"]
        if a["class"] != b["class"] or len(a["groups"]) != len(b["groups"]):
            raise CheckpointError(
                f"the ranks have different optimizers ({a['class']} with {len(a['groups'])} groups, {b['class']} with "
                f"{len(b['groups'])}): all ranks build the same one"
            )
        whole = {
            "model": {**part["model"], **whole["model"]},
            "aliases": {**part["aliases"], **whole["aliases"]},
            "buffers": sorted({*whole["buffers"], *part["buffers"]}),
            "extra": {**part["extra"], **whole["extra"]},
            "optimizer": {
                "class": a["class"],
                "groups": [
                    {
                        "options": one["options"],
                        "parameters": list(dict.fromkeys([*one["parameters"], *other["parameters"]])),
                    }
                    for one, other in zip(a["groups"], b["groups"], strict=True)
                ],
                "state": {**b["state"], **a["state"]},
            },
        }
    return whole


def empty_state(parameter: Tensor, key: str, shape: torch.Size, dtype: torch.dtype, *, on_device: bool) -> Tensor:
    """A tensor to load one piece of optimizer state into, laid out for this run.

    State of the parameter's shape is split as the parameter is. Other state (the row and column sums of Adafactor) is
    split along those of its dims that have the parameter's length, else whole on every rank. Counters are plain.

    Args:
        parameter: that the state belongs to.
        key: path of the state below the parameter, such as `exp_avg` or `old_dirs/3`.
        shape: of the whole tensor.
        dtype: of the tensor.
        on_device: whether the optimizer wants its step counter on the parameter's device.
    """
    if key in ("step", "mu_product", "eta", "mu") and shape.numel() == 1:
        return torch.empty(shape, dtype=dtype, device=parameter.device if on_device or key != "step" else "cpu")
    if shape == parameter.shape:
        return room_for(parameter.detach(), dtype)
    if not is_dtensor(parameter):
        return torch.empty(shape, dtype=dtype, device=parameter.device)
    if "/" in key:
        raise CheckpointError(
            f"the optimizer keeps its state {key!r} in lists, which have no meaning for a parameter that is split over "
            "ranks: use a layout without shard and tensor, or another optimizer"
        )
    from torch.distributed.tensor import DTensor, Replicate, Shard, empty

    split = cast(DTensor, parameter)
    placements = [
        placement
        if isinstance(placement, Shard)
        and type(placement) is Shard
        and len(shape) == parameter.ndim
        and shape[placement.dim] == parameter.shape[placement.dim]
        else Replicate()
        for placement in split.placements
    ]
    return empty(*shape, dtype=dtype, device_mesh=split.device_mesh, placements=placements)
