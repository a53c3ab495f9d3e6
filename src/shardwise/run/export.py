"""Final weights as `model.safetensors`, under the model's own names, for anyone to load without shardwise.

A tensor with several names is stored once, under its first name; the file's metadata says `other name: stored name`.
`safetensors.torch.load_model(model, path)` reads the file into the bare model, and so does `load_weights`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.dist.p2p import start_receive, start_send
from shardwise.dist.split import is_dtensor, is_stand_in, whole_tensor
from shardwise.errors import CheckpointError
from shardwise.run.folder import sync_folder
from shardwise.run.names import own_model, own_name, reshard


def save_weights(model: nn.Module, path: Path) -> None:
    """Write parameters and persistent buffers; every rank calls, rank 0 writes.

    Split parameters are put together one at a time, and those of other pipeline stages sent to rank 0, so a rank needs room
    for the largest, and rank 0 for all in host memory. The file is written aside and renamed: it is complete or absent.

    Raises:
        CheckpointError: on rank 0: the disk refuses, or safetensors has no such dtype.
    """
    model = own_model(model)
    reshard(model)
    world = Group.world()
    keep = world.rank == 0
    tensors, metadata = {}, {"format": "pt"}
    state = {own_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    holders = _holders(state, world)
    # Where tensors lie in each other's memory, no rank that lacks one of them can tell.
    first = _stored_names(model, state, by_memory=not holders)
    for name, tensor in state.items():
        if first[name] != name:
            metadata[name] = first[name]
            continue
        whole = whole_tensor(tensor)
        if keep or holders.get(name) == world.rank:
            if name in holders:
                whole = _moved(whole, world, holders[name])
            if keep:
                tensors[name] = whole.detach().cpu().contiguous()
    if keep:
        _write(path, _unshared(tensors), metadata)


def _holders(state: dict[str, Tensor], world: Group) -> dict[str, int]:
    """The lowest rank that has a tensor, of those that rank 0 has not. Collective."""
    lacking = {name for name, tensor in state.items() if is_stand_in(tensor)}
    every: list[set[str]] = world.gather_objects(lacking)
    return {
        name: next(rank for rank, names in enumerate(every) if name not in names) for name in state if name in every[0]
    }


def _moved(tensor: Tensor, world: Group, holder: int) -> Tensor:
    """A tensor of rank `holder`, on rank 0; called on these two."""
    if world.rank == holder:
        start_send(tensor.detach().cpu().contiguous(), world, 0).wait()
        return tensor
    return start_receive(torch.empty(tensor.shape, dtype=tensor.dtype), world, holder).wait()


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a bare model from `model.safetensors`, in place.

    Raises:
        CheckpointError: no such file, or names, shapes or dtypes differ from the model's.
    """
    state = {own_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            aliases = {name: kept for name, kept in (file.metadata() or {}).items() if kept in stored}
            _check_names(path, set(state), stored | set(aliases))
            # Names that share memory in the model are filled by the one that is stored.
            filled = {name for name in aliases if _share_memory(state[name], state[aliases[name]])}
            loaded = {name: file.get_tensor(aliases.get(name, name)) for name in state if name not in filled}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights {path} cannot be read: {error}") from error
    for name, tensor in state.items():
        if name in filled:
            continue
        if loaded[name].shape != tensor.shape or loaded[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} is {tuple(loaded[name].shape)} {loaded[name].dtype} in {path}, and {tuple(tensor.shape)} "
                f"{tensor.dtype} in the model: build the model as it was trained"
            )
    with torch.no_grad():
        for name, values in loaded.items():
            state[name].copy_(values)


def _check_names(path: Path, wanted: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit the model: it lacks {', '.join(missing[:5]) or 'nothing'}, and holds "
            f"{', '.join(unexpected[:5]) or 'nothing'} that the model has not; build the model as it was trained"
        )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _stored_names(model: nn.Module, state: dict[str, Tensor], *, by_memory: bool) -> dict[str, str]:
    """Name -> the name under which its values are stored.

    Names share values where the model registers one tensor several times, or where a plain tensor lies within the
    memory of another (looked for with `by_memory`), as `load_model` of safetensors expects it.
    """
    owner: dict[int, str] = {}
    first = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in ((own_name(name), tensor) for name, tensor in named):
        if name in state:
            first[name] = owner.setdefault(id(tensor), name)
    first = {name: first.get(name, name) for name in state}
    if not by_memory:
        return first
    whole = {
        (tensor.device, tensor.untyped_storage().data_ptr()): name
        for name, tensor in reversed(state.items())
        if first[name] == name and _fills_its_memory(tensor)
    }
    for name, tensor in state.items():
        if not is_dtensor(tensor) and tensor.numel() and first[name] == name:
            first[name] = whole.get((tensor.device, tensor.untyped_storage().data_ptr()), name)
    return {name: first[first[name]] for name in state}


def _fills_its_memory(tensor: Tensor) -> bool:
    if is_dtensor(tensor) or not tensor.numel():
        return False
    storage = tensor.untyped_storage()
    return tensor.data_ptr() == storage.data_ptr() and tensor.numel() * tensor.element_size() == storage.nbytes()


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those tensors that still share memory with another, which safetensors refuses."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return own


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, aside, metadata=metadata)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise CheckpointError(f"weights {path} cannot be written: {error}") from error
