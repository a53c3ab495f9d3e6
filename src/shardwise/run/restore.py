"""From a checkpoint's flat mapping back into a model and an optimizer: check everything, then fill in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardwise.errors import CheckpointError
from shardwise.run import dcp
from shardwise.run.dcp import OtherModelError as OtherModelError
from shardwise.run.encoding import decode, encode, tensor_paths
from shardwise.run.names import named_tensors, own_model, reshard
from shardwise.run.state import (
    HOW_OPTIONS,
    Structure,
    as_split,
    class_name,
    empty_state,
    group_names,
    modules_with_extra_state,
    parameter_names,
    room_for,
    settled_placements,
)

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_ADVICE = "resume with the model and optimizer that the run was started with"


@dataclass
class Target:
    """What a load fills.

    Attributes:
        stored: shape and dtype of each tensor in the checkpoint.
        tensors: to fill, by name in the checkpoint.
        states: parameters of this rank and their encoded state, with their names in the checkpoint.
        aside: tensors for which `tensors` has another, split as a checkpoint can be read.
        names: of the model's tensors on this rank, as the checkpoint calls them.
        structure: the checkpoint's.
        model: to fill.
        optimizer: to fill.
    """

    stored: dict[str, TensorStorageMetadata]
    structure: Structure
    model: nn.Module
    optimizer: Optimizer
    tensors: dict[str, Tensor] = field(default_factory=dict)
    states: list[tuple[Tensor, str, Any]] = field(default_factory=list)
    aside: dict[str, Tensor] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


def prepare(path: Path, structure: Structure, model: nn.Module, optimizer: Optimizer) -> Target:
    """Compare a checkpoint with model and optimizer, and make room for what it holds. Changes nothing.

    Raises:
        CheckpointError: names, shapes, dtypes, groups or options differ; the message names them.
    """
    model = own_model(model)
    reshard(model)
    target = Target(dcp.stored_tensors(path), structure, model, optimizer)
    named, aliases, _ = named_tensors(model)
    called = _names_in_checkpoint(path, structure, named, aliases)
    for name, tensor in named.items():
        room = room_for(tensor.detach())
        target.tensors[f"model/{called[name]}"] = room
        if settled_placements(tensor) is not None:
            target.aside[f"model/{called[name]}"] = tensor.detach()
    target.names = set(called.values())
    _check_extra_state(path, structure, model)
    for name in modules_with_extra_state(model):
        add_plain(target, tensor_paths(structure["extra"][name], f"extra/{name}"))
    _check_optimizer(path, structure["optimizer"], optimizer, parameter_names(named), called)
    for index, group in enumerate(structure["optimizer"]["groups"]):
        for key, record in group["options"].items():
            add_plain(target, tensor_paths(record, f"options/{index}/{key}"))
    _make_room_for_state(target, parameter_names(named), called)
    return target


def add_plain(target: Target, names: Iterable[str]) -> None:
    """Make room for tensors that every rank holds whole, on the CPU."""
    for name in names:
        entry = target.stored[name]
        target.tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)


def read(target: Target, path: Path) -> None:
    """Fill model and optimizer; every rank calls."""
    dcp.read(path, target.tensors, names=target.names, expected=set(target.structure["model"]))
    for name, tensor in target.aside.items():
        values = as_split(target.tensors[name], tensor)
        if name.startswith("model/"):
            tensor.copy_(values)
        target.tensors[name] = values
    optimizer = target.optimizer
    for index, (group, saved) in enumerate(
        zip(optimizer.param_groups, target.structure["optimizer"]["groups"], strict=True)
    ):
        for key, record in saved["options"].items():
            if key in HOW_OPTIONS:
                continue
            value = decode(record, f"options/{index}/{key}", target.tensors)
            if isinstance(group[key], Tensor) and isinstance(value, Tensor):
                group[key].copy_(value)  # schedulers and captured graphs hold on to the tensor itself
            else:
                group[key] = value
    optimizer.state.clear()
    for parameter, name, record in target.states:
        optimizer.state[parameter] = decode(record, f"optimizer/{name}", target.tensors)
    for name, module in modules_with_extra_state(target.model).items():
        module.set_extra_state(decode(target.structure["extra"][name], f"extra/{name}", target.tensors))


def _names_in_checkpoint(
    path: Path, structure: Structure, named: dict[str, Tensor], aliases: dict[str, str]
) -> dict[str, str]:
    """Name here -> name in the checkpoint, which differ where a tied tensor goes by another of its names."""
    stored, stored_aliases = structure["model"], structure["aliases"]
    called = {}
    missing = []
    for name in named:
        if name in stored:
            called[name] = name
        elif name in stored_aliases:
            called[name] = stored_aliases[name]
        else:
            missing.append(name)
    if missing:
        raise CheckpointError(f"checkpoint {path} lacks {dcp.some(missing)}, which the model has: {_ADVICE}")
    by_stored: dict[str, str] = {}
    for name, stored_name in called.items():
        other = by_stored.setdefault(stored_name, name)
        if other != name:
            raise CheckpointError(
                f"{other} and {name} are one tensor in checkpoint {path} and two in the model: {_ADVICE}"
            )
    for alias, name in aliases.items():
        if stored_aliases.get(alias, alias) != called[name]:
            raise CheckpointError(
                f"{name} and {alias} are two tensors in checkpoint {path} and one in the model: {_ADVICE}"
            )
    for name, stored_name in called.items():
        saved, tensor = stored[stored_name], named[name]
        here = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        if here != saved:
            raise CheckpointError(
                f"{name} has shape {tuple(saved['shape'])} and dtype {saved['dtype']} in checkpoint {path}, and shape "
                f"{tuple(tensor.shape)} and dtype {tensor.dtype} in the model: {_ADVICE}"
            )
    return called


def _check_extra_state(path: Path, structure: Structure, model: nn.Module) -> None:
    missing = set(modules_with_extra_state(model)) - set(structure["extra"])
    if missing:
        raise CheckpointError(f"checkpoint {path} lacks the extra state of {dcp.some(missing)}: {_ADVICE}")


def _check_optimizer(
    path: Path, saved: dict[str, Any], optimizer: Optimizer, names: dict[int, str], called: dict[str, str]
) -> None:
    if saved["class"] != class_name(optimizer):
        raise CheckpointError(
            f"checkpoint {path} was made with {saved['class']}, and this run has {class_name(optimizer)}: {_ADVICE}"
        )
    groups = group_names(optimizer, names)
    if len(groups) != len(saved["groups"]):
        raise CheckpointError(
            f"checkpoint {path} has {len(saved['groups'])} parameter groups, and the optimizer {len(groups)}: {_ADVICE}"
        )
    group_of = {name: index for index, group in enumerate(saved["groups"]) for name in group["parameters"]}
    here_of = {called[name]: index for index, group in enumerate(groups) for name in group}
    for name, index in here_of.items():
        if group_of.get(name) != index:
            before = f"in group {group_of[name]}" if name in group_of else "in no group"
            raise CheckpointError(
                f"{name} is {before} of the optimizer in checkpoint {path}, and in group {index} here: {_ADVICE}"
            )
    lost = [name for name in group_of if name in called.values() and name not in here_of]
    if lost:
        raise CheckpointError(
            f"the optimizer trained {dcp.some(lost)} in checkpoint {path}, and does not here: {_ADVICE}"
        )
    for index, group in enumerate(optimizer.param_groups):
        _check_options(path, index, saved["groups"][index]["options"], group)


def _check_options(path: Path, index: int, saved: dict[str, Any], group: dict[str, Any]) -> None:
    """Numbers may change while training (schedules); switches, and which options there are, may not."""
    here = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    different = set(saved) ^ set(here)
    if different:
        raise CheckpointError(
            f"group {index} of the optimizer has {dcp.some(different)} only on one side of checkpoint {path} and this "
            f"run: {_ADVICE}"
        )
    for key, value in here.items():
        before = saved[key]
        fixed = isinstance(value, bool) or value is None or isinstance(before, bool) or before is None
        if fixed and key not in HOW_OPTIONS and encode(value, key, {}) != before:
            raise CheckpointError(
                f"{key} of optimizer group {index} is {before} in checkpoint {path}, and {value} here: {_ADVICE}"
            )


def _make_room_for_state(target: Target, names: dict[int, str], called: dict[str, str]) -> None:
    saved = target.structure["optimizer"]["state"]
    for group in target.optimizer.param_groups:
        on_device = bool(group.get("capturable")) or bool(group.get("fused"))
        for parameter in group["params"]:
            name = called[names[id(parameter)]]
            if name not in saved:
                continue
            for place in tensor_paths(saved[name], f"optimizer/{name}"):
                entry = target.stored[place]
                key = place.removeprefix(f"optimizer/{name}/")
                room = empty_state(parameter, key, entry.size, entry.properties.dtype, on_device=on_device)
                target.tensors[place] = room
                if entry.size == parameter.shape and settled_placements(parameter) is not None:
                    target.aside[place] = parameter.detach()
            target.states.append((parameter, name, saved[name]))
