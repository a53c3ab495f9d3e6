"""Call a model's constructor without giving memory to its large tensors, and log what it does to them.

Two modes of torch see every operation that the constructor asks for. Small tensors are made as ever. A large one gets the
meta device, which has shapes and no memory, and what is done to it goes into a log. Operations that draw random numbers are
done at once on memory that is let go again, so the generator moves as in an ordinary construction, and everything that looks
at it, or at small tensors, or at the values of large ones (which are computed for it), sees what it would see.

What cannot be logged ends the attempt with its reason; the caller then builds the model as ever.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from shardwise.parallel.deferred.log import (
    OVERWRITING,
    SHAPE_ONLY,
    CannotReplayError,
    Entry,
    Log,
    View,
    drawn_by,
    name_of,
    run_real,
    tensor_on,
)
from shardwise.parallel.deferred.operators import (
    depends_on_data,
    is_random,
    is_tensor_type,
    returns_written,
    takes_device,
    written_by,
)
from shardwise.parallel.replicas import checksum

MIN_BYTES = 1 << 20
"""Smaller tensors are made as ever: they cost little memory, and code that looks at values looks mostly at those. Chosen."""

_UNLOGGED = frozenset({"resize_", "resize_as_", "set_", "swap_", "_resize_output_"})
_CPU = torch.device("cpu")


@final
class Recorder:
    """The two modes as one context, and what they found."""

    def __init__(self, min_bytes: int = MIN_BYTES) -> None:
        self.log = Log()
        self.problem: str | None = None
        self._min_bytes = min_bytes
        self._numbers: dict[int, int] = {}
        self._storages: list[torch.UntypedStorage] = []
        self._modes = (_Operations(self), _Functions(self))

    def __enter__(self) -> Recorder:
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, value, trace)  # type: ignore[no-untyped-call]

    def view_of(self, tensor: Tensor) -> View | None:
        """What a tensor without memory stands for; None for other tensors."""
        if tensor.device.type != "meta" or tensor.layout != torch.strided:
            return None
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is None:
            return None
        if tensor.is_conj() or tensor.is_neg():
            self.give_up("it keeps a large complex tensor conjugated")
        return View.of(tensor, number)

    def give_up(self, why: str) -> None:
        """Remember why, for a constructor may catch what is raised.

        Raises:
            CannotReplayError: always.
        """
        self.problem = self.problem or why
        raise CannotReplayError(self.problem)

    def real(self, tensor: Tensor) -> Tensor:
        """A tensor with the values that `tensor`, without memory, has now."""
        view = self.view_of(tensor)
        assert view is not None
        with _disable_current_modes():
            return tensor_on(self.log.replay([view.storage])[view.storage], view)

    def operation(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do one operation that the constructor asked for."""
        name = name_of(call)
        tensors = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        large = any(self.view_of(tensor) is not None for tensor in tensors)
        if not large:
            if _is_meta(kwargs.get("device")):
                # Torch itself asks for what goes with a large tensor; constructors that do are refused in `_Functions`.
                kwargs = {**kwargs, "device": _CPU}
            new_like = name.startswith("new_") and name in SHAPE_ONLY and tensors[0].device == _CPU
            if tensors and not new_like:
                return call(*args, **kwargs)
            if new_like:
                args = (torch.empty(0, dtype=tensors[0].dtype), *args[1:])
            return self._make(call, args, kwargs)
        if call.namespace != "aten":
            self.give_up(f"it calls {call}, which is not torch's own, on a large tensor")
        if str(call) == "aten.set_.source_Tensor":
            if all(self.view_of(tensor) is not None for tensor in tensors):
                return call(*args)  # the one looks at the other's storage from here
            if self.view_of(tensors[0]) is None:
                return call(tensors[0], self.real(tensors[1]))
        if name in _UNLOGGED:
            self.give_up(f"it calls {name} on a large tensor")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type not in ("cpu", "meta"):
            self.give_up(f"it puts a large tensor on {device}")
        if (
            name == "_to_copy"
            and device is not None
            and not _is_meta(device)
            and kwargs.get("dtype") in (None, tensors[0].dtype)
        ):
            self.give_up("it copies a large tensor in a way that may or may not share its memory")
        if torch.Tag.inplace_view in call.tags:
            return call(*args, **kwargs)  # another look at the same storage
        return self._log(call, args, kwargs)

    def _make(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation that needs no values of tensors: what it makes may be large."""
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return call(*args, **kwargs)
        if [str(item.type) for item in call._schema.returns] != ["Tensor"] or not takes_device(call):
            return call(*args, **kwargs)
        try:
            meta = self._on_meta(call, args, kwargs)
        except NotImplementedError:
            return call(*args, **kwargs)
        if meta.device.type != "meta" or meta.untyped_storage().nbytes() < self._min_bytes:
            return call(*args, **kwargs)
        return self._log(call, args, kwargs, meta=meta)

    def _log(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, meta: Any = None) -> Any:
        written = written_by(call, args, kwargs)
        returns_tensors = all(is_tensor_type(item.type) for item in call._schema.returns)
        if any(self.view_of(tensor) is None for tensor in written) or not returns_tensors or depends_on_data(call):
            return self._do_now(call, args, kwargs, written)
        if meta is None:
            try:
                meta = self._on_meta(call, args, kwargs)
            except NotImplementedError:
                if not returns_written(call):
                    return self._do_now(call, args, kwargs, written)
                meta = written[0]  # values change, shapes do not
            except Exception as error:  # noqa: BLE001  # the constructor may catch it, and go on otherwise than with memory
                self.give_up(f"{call} fails on a large tensor without memory ({error})")
        results = [item for item in pytree.tree_leaves(meta) if isinstance(item, Tensor)]
        if any(item.device.type != "meta" for item in results):
            return self._do_now(call, args, kwargs, written)
        made = tuple(view for view in (self._new_view(item) for item in results) if view is not None)
        if not made and not written:
            return meta  # another look at the same storage
        if made and len(made) != len(results):
            self.give_up(f"{call} returns new tensors and views of old ones together")
        entry = self._entry(call, args, kwargs, written, made)
        if is_random(call):
            entry = self._draw(entry, kwargs.get("generator"))
        self.log.add(entry)
        return meta

    def _entry(self, call: Any, args: Any, kwargs: Any, written: list[Tensor], made: tuple[View, ...]) -> Entry:
        name = name_of(call)
        writes = {view for view in map(self.view_of, written) if view is not None}
        changed = frozenset(view.storage for view in writes)
        seen = {id(item) for item in written} if name in OVERWRITING else set()
        views = [
            view
            for item in pytree.tree_leaves((args, kwargs))
            if isinstance(item, Tensor) and id(item) not in seen and (view := self.view_of(item)) is not None
        ]
        reads = frozenset(view.storage for view in views) if name not in SHAPE_ONLY else frozenset()
        whole = {view.storage for view in writes if name in OVERWRITING and view.covers(self.log.sizes[view.storage])}
        fresh = frozenset(view.storage for view in made)
        return Entry(
            call=call,
            arguments=pytree.tree_map(self._kept, (args, kwargs)),
            outputs=made,
            reads=reads,
            writes=changed | fresh,
            overwrites=(frozenset(whole) - reads) | fresh,
        )

    def _kept(self, item: Any) -> Any:
        """An argument as the log keeps it: small tensors with the values that they have now."""
        if not isinstance(item, Tensor):
            return item
        view = self.view_of(item)
        if view is None and item.is_meta:
            self.give_up("it has tensors on the meta device of its own")
        return item.detach().clone(memory_format=torch.preserve_format) if view is None else view

    def _draw(self, entry: Entry, generator: torch.Generator | None) -> Entry:
        """Move the generator on as the operation does, and remember where it stood and what it drew."""
        state = (torch.get_rng_state() if generator is None else generator.get_state()).clone()
        values = self.log.replay(entry.reads)

        def tensor_of(view: View) -> Tensor:
            return tensor_on(values[view.storage], view) if view.storage in values else view.scratch()

        with torch.no_grad():
            result = run_real(entry, tensor_of, generator)
            return Entry(**{**vars(entry), "state": state, "bits": int(checksum(drawn_by(entry, result)))})

    def _do_now(self, call: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """An operation that needs values, or changes small tensors by those of large ones."""
        if any(self.view_of(tensor) is not None for tensor in written):
            self.give_up(f"it calls {call} on a large tensor, which can only be done at once")
        return call(*pytree.tree_map(self._as_real, args), **pytree.tree_map(self._as_real, kwargs))

    def _as_real(self, item: Any) -> Any:
        if not isinstance(item, Tensor) or self.view_of(item) is None:
            return item
        return self.real(item)

    def _on_meta(self, call: Any, args: Any, kwargs: Any) -> Any:
        """What an operation returns, in shapes alone."""

        def without_memory(item: Any) -> Any:
            if isinstance(item, Tensor) and item.device == _CPU and (item.dim() or not item.numel()):
                return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
            return item

        args, kwargs = pytree.tree_map(without_memory, (args, kwargs))
        if takes_device(call):
            kwargs = {**kwargs, "device": torch.device("meta")}
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        if not is_random(call):
            return call(*args, **kwargs)
        before = torch.get_rng_state()
        try:
            return call(*args, **kwargs)
        finally:
            torch.set_rng_state(before)

    def _new_view(self, tensor: Tensor) -> View | None:
        """A number for the storage of a result; None if it has one."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._numbers:
            return None
        self._storages.append(storage)  # while it lives, no other has its address
        self._numbers[storage._cdata] = number = self.log.add_storage(storage.nbytes())
        return View.of(tensor, number)


class _Operations(TorchDispatchMode):
    """Sees operators, whoever calls them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._recorder.operation(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees what Python asks of tensors. One without memory says that it is on the CPU, as it would be."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_meta(kwargs.get("device")) or (func in _moves() and any(_is_meta(item) for item in args[1:])):
            self._recorder.give_up("it uses the meta device itself")
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _as_indices(args[1]), *args[2:])
        if func in _answers() or func in _needs_memory() or func in _needs_values() or func in _moves():
            tensor: Any = args[0] if args else None
            if self._is_large(tensor):
                if func in _answers():
                    return _answers()[func]
                if func in _needs_memory():
                    self._recorder.give_up(f"it asks for the memory of a large tensor ({func.__name__})")
                if func in _needs_values():
                    with torch._C.DisableTorchFunction():
                        return func(self._recorder.real(tensor), *args[1:], **kwargs)
                args, kwargs = pytree.tree_map(_not_cpu, (args, kwargs))
                if func is Tensor.cpu and not args[1:] and not kwargs:
                    return tensor
            elif func in (Tensor.to, Tensor.type_as) and len(args) > 1 and self._is_large(args[1]):
                args = (tensor, torch.empty(0, dtype=args[1].dtype), *args[2:])
        return func(*args, **kwargs)

    def _is_large(self, item: Any) -> bool:
        return isinstance(item, Tensor) and self._recorder.view_of(item) is not None


def _as_indices(index: Any) -> Any:
    """Lists and arrays among indices as tensors: torch would make tensors of them where the indexed tensor is."""
    if isinstance(index, tuple):
        return tuple(_as_indices(item) for item in index)
    sequence = isinstance(index, list) and all(isinstance(item, int) for item in index)
    return torch.as_tensor(index) if (sequence and index) or type(index).__name__ == "ndarray" else index


def _is_meta(device: Any) -> bool:
    return (isinstance(device, str) and device == "meta") or (
        isinstance(device, torch.device) and device.type == "meta"
    )


def _not_cpu(item: Any) -> Any:
    """The device of tensors without memory in the place of the CPU, so that moving to where a tensor is moves nothing."""
    if (isinstance(item, str) and item in ("cpu", "cpu:0")) or (isinstance(item, torch.device) and item.type == "cpu"):
        return torch.device("meta")
    return item


@functools.cache
def _answers() -> dict[Any, Any]:
    getters: Any = Tensor
    return {
        getters.device.__get__: _CPU,
        getters.is_meta.__get__: False,
        getters.is_cpu.__get__: True,
        Tensor.get_device: -1,
    }


@functools.cache
def _needs_memory() -> frozenset[Any]:
    names = (
        *(
            "numpy",
            "data_ptr",
            "storage",
            "untyped_storage",
            "_typed_storage",
            "share_memory_",
            "pin_memory",
            "__array__",
        ),
        *("__dlpack__", "__reduce_ex__", "resize_", "resize_as_", "__cuda_array_interface__", "is_set_to"),
    )
    return frozenset(getattr(Tensor, name) for name in names if hasattr(Tensor, name))


@functools.cache
def _needs_values() -> frozenset[Any]:
    return frozenset({Tensor.tolist, Tensor.__repr__})


@functools.cache
def _moves() -> frozenset[Any]:
    return frozenset({Tensor.to, Tensor.cpu, Tensor.type, Tensor.type_as})
