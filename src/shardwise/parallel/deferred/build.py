"""Build a model without memory for its large tensors, and give them their values later, one module at a time."""

from __future__ import annotations

import gc
import hashlib
import platform
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwise.parallel.deferred.log import CannotReplayError, Log, View, tensor_on
from shardwise.parallel.deferred.record import MIN_BYTES, Recorder


@final
class Deferred:
    """A model whose large parameters are on the meta device still. Its buffers and other tensors are as in any model.

    Attributes:
        model: the user's module.
        digest: equal on ranks whose parameters will get equal values.
        device: where parameters are put when they get their values.
        deferred_bytes: size of the parameters without memory.
    """

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.model = model
        self._log = recorder.log
        self._views = _parameter_views(model, recorder)
        self._holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in self._views:
                    self._holders.setdefault(id(parameter), []).append((module, name))
        self.device = torch.device("cpu")
        self.deferred_bytes = sum(self._log.sizes[number] for number in {view.storage for view in self._views.values()})
        self._fill_others(recorder)
        _check_layouts(self._log, {view.storage for view in self._views.values()})
        self.digest = _digest(model, self._log, self._views)

    def fill(self, module: nn.Module) -> None:
        """Give the parameters of a part of the model their initial values, whole. Draws no random numbers.

        Each is the same to the bit as in an ordinary construction from the same state of the random generators.
        """
        wanted = {
            id(parameter): parameter
            for part in module.modules()
            for parameter in part._parameters.values()
            if parameter is not None and id(parameter) in self._views and parameter.is_meta
        }
        by_storage: dict[int, list[int]] = {}
        for key in wanted:
            by_storage.setdefault(self._views[key].storage, []).append(key)
        for storage, keys in by_storage.items():
            memory = self._log.replay([storage])[storage]
            for key in keys:
                filled = _with_values(wanted[key], tensor_on(memory, self._views[key]).to(self.device))
                for holder, name in self._holders.pop(key):
                    if type(holder).__setattr__ is nn.Module.__setattr__:
                        holder._parameters[name] = filled
                    else:
                        setattr(holder, name, filled)  # a recurrent layer keeps a list of its weights as well

    def _fill_others(self, recorder: Recorder) -> None:
        """Give buffers and tensors that are plain attributes of modules their values."""
        places: list[tuple[dict[str, Any], str, View]] = []
        for module in self.model.modules():
            for owner in (module._buffers, vars(module)):
                for name, value in owner.items():
                    view = recorder.view_of(value) if isinstance(value, Tensor) else None
                    if value is None or view is None:
                        continue
                    if value.requires_grad:
                        raise CannotReplayError(
                            f"{type(module).__name__}.{name} is computed from weights, and no parameter"
                        )
                    places.append((owner, name, view))
        storages = {view.storage for _, _, view in places}
        _check_layouts(self._log, storages)
        memory = self._log.replay(storages)
        same = {view: tensor_on(memory[view.storage], view) for _, _, view in places}
        value = None
        for owner, name, view in places:
            owner[name] = same[view]
        _refuse_others(recorder, set(self._views))


def build_deferred(build: Callable[[], nn.Module], *, min_bytes: int = MIN_BYTES) -> Deferred:
    """Call a model's constructor without giving memory to its large tensors.

    Args:
        build: makes the model, on the CPU.
        min_bytes: what counts as large.

    Raises:
        CannotReplayError: the constructor does what cannot be done again later. All random generators are then where they
            were, so that the model can be built as ever.
    """
    with _generators_kept():
        recorder = Recorder(min_bytes)
        try:
            with recorder:
                model = build()
        except CannotReplayError:
            raise
        except Exception as error:  # an ordinary construction will raise it again, if it is not for the missing memory
            raise CannotReplayError(recorder.problem or f"it raised {type(error).__name__}: {error}") from error
        if recorder.problem is not None:
            raise CannotReplayError(recorder.problem)
        if not isinstance(model, nn.Module):
            raise CannotReplayError(f"it returned a {type(model).__name__}")
        return Deferred(model, recorder)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """If the block fails, the random generators of torch, Python and NumPy are where they were."""
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        yield
    except BaseException:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])
        raise


def _parameter_views(model: nn.Module, recorder: Recorder) -> dict[int, View]:
    """What each parameter without memory stands for, by its identity."""
    views = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CannotReplayError(f"module {name!r} is compiled by torch.jit")
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            continue
        view = recorder.view_of(parameter)
        if view is None:
            raise CannotReplayError(f"its parameter {name} is on the meta device")
        views[id(parameter)] = view
    return views


def _refuse_others(recorder: Recorder, known: set[int]) -> None:
    """No tensor without memory may be left but the model's parameters: nobody would give it its values.

    Raises:
        CannotReplayError: there is one.
    """
    gc.collect()
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and id(item) not in known and item.is_meta:
            view = recorder.view_of(item)
            if view is not None:
                raise CannotReplayError(
                    f"a large tensor of shape {tuple(item.shape)} is kept where it is neither a parameter nor a buffer nor an "
                    "attribute of a module"
                )


def _check_layouts(log: Log, storages: set[int]) -> None:
    """Try out once each operation of a kind whose results might lie otherwise in memory than was told without memory.

    Raises:
        CannotReplayError: one does.
    """
    seen: set[tuple[Any, ...]] = set()
    for storage in sorted(storages):
        kinds = {
            entry.signature() for entry in (log.entries[i] for i in log.needed([storage])) if not entry.keeps_layout
        }
        if kinds - seen:
            log.replay([storage])
            seen |= kinds


def _with_values(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    made: Any = Tensor._make_subclass(type(parameter), values, parameter.requires_grad)
    made.__dict__.update(vars(parameter))
    return made  # type: ignore[no-any-return]


def _digest(model: nn.Module, log: Log, views: dict[int, View]) -> str:
    """A fingerprint of all that the values depend on: what was done, random numbers, small tensors, and who computes."""
    hashed = hashlib.blake2b(repr((torch.__version__, torch.get_num_threads(), _processor())).encode())
    for entry in log.entries:
        hashed.update(f"{entry.call} {entry.bits}".encode())
        if entry.state is not None:
            _add(hashed, entry.state)
        for item in (*pytree.tree_leaves(entry.arguments), *entry.outputs):
            _add(hashed, item)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        hashed.update(name.encode())
        _add(hashed, views.get(id(tensor), tensor))
    return hashed.hexdigest()


def _add(hashed: hashlib.blake2b, item: Any) -> None:
    if isinstance(item, Tensor):
        hashed.update(f"{item.dtype} {tuple(item.shape)}".encode())
        if item.layout == torch.strided:
            hashed.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif not isinstance(item, torch.Generator):
        hashed.update(repr(item).encode())


def _processor() -> str:
    """Kernels are chosen by the processor, and may round differently on another."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {names[0] if names else ''}"
