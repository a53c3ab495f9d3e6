"""Counts the operations of a training step while it runs, on real tensors or on fake ones that hold no memory.

A dispatch mode sees every operation below autograd, in the backward pass and in the optimizer too. In the forward pass the
innermost module under way owns it. Autograd numbers its nodes in the order of the forward pass, so an operation of the
backward pass belongs to the module that was under way when the number of its node was given out.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.probe.operations import FREE, flops_of, kind_of, name_of, size_bytes, table_bytes, tensors_in
from shardwise.spec.work import Phase

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_LEAF = (1 << 63) - 1
"""Numbers from here on are those of autograd's leaves, which belong to no module."""

STOCHASTIC = ("bernoulli", "dropout", "rand", "normal_", "uniform_", "rrelu", "multinomial", "exponential_")
"""Beginnings or parts of names of operations that draw random numbers."""


@dataclass(frozen=True)
class Call:
    """One operation: who called it, when, and how much it did."""

    module: str
    phase: Phase
    name: str
    kind: str
    precision: str
    flops: float
    moved_bytes: float
    weighted: bool


@dataclass
class Counted:
    """A counted step of `samples` samples.

    Attributes:
        calls: in the order of execution.
        saved_bytes: module -> bytes that the forward pass keeps for the backward pass, parameters left out.
        output_bytes: module -> bytes of what it returned.
        peak_bytes: most bytes of tensors that were alive during the step and made in it.
        attention_bytes: keys and values of all attention operations.
    """

    samples: int
    calls: list[Call] = field(default_factory=list)
    saved_bytes: dict[str, float] = field(default_factory=dict)
    output_bytes: dict[str, float] = field(default_factory=dict)
    peak_bytes: float = 0.0
    attention_bytes: float = 0.0


class Counting(TorchDispatchMode):
    """While it is active, every operation is counted. Use `counting`."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = Counted(samples)
        self.updating = False
        self._stack = [""]
        self._numbers: list[int] = [0]
        self._owners: list[str] = [""]
        self._kept = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._parameters = {_storage(parameter) for parameter in model.parameters()}
        self._alive: dict[int, Any] = {}
        self._alive_bytes = 0.0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        name = name_of(operation)
        if name.startswith("prim."):  # questions about a tensor, which only fake ones pass on
            return out
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
        for tensor in outputs:
            self._follow(tensor)
        weighted = any(_storage(tensor) in self._parameters for tensor in inputs)
        floating = [tensor.dtype for tensor in inputs if tensor.is_floating_point()]
        kind = kind_of(name)
        free = name in FREE
        phase, owner = self._now()
        if kind == "attention":
            self.counted.attention_bytes += sum(size_bytes(tensor) for tensor in inputs[1:3])
        self.counted.calls.append(
            Call(
                module=owner,
                phase=phase,
                name=name,
                kind="view" if free else kind,
                precision=_PRECISIONS.get(floating[0], "other") if floating else "other",
                flops=0.0 if free else flops_of(operation, name, args, kwargs, out),
                moved_bytes=0.0 if free else table_bytes(name, inputs, outputs),
                weighted=weighted,
            )
        )
        return out

    def enter(self, name: str) -> None:
        """A module's forward pass begins."""
        self.updating = False  # of a step with several objectives, the next one
        self._stack.append(name)
        self._mark()

    def leave(self, output: Any) -> None:
        """It ends and returns `output`."""
        name = self._stack.pop()
        size = sum(size_bytes(tensor) for tensor in tensors_in(output))
        self.counted.output_bytes[name] = self.counted.output_bytes.get(name, 0.0) + size
        self._mark()

    def save(self, tensor: Tensor) -> Tensor:
        """Autograd keeps a tensor for the backward pass."""
        storage = _storage(tensor)
        if storage not in self._kept:
            self._kept.add(storage)
            owner = self._stack[-1]
            size = float(tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else 0.0
            self.counted.saved_bytes[owner] = self.counted.saved_bytes.get(owner, 0.0) + size
        return tensor

    def _mark(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(self._stack[-1])

    def _now(self) -> tuple[Phase, str]:
        """The phase under way and the module that an operation belongs to."""
        if self.updating:
            return "optimizer", ""
        node: Any = torch._C._current_autograd_node()  # None outside of a backward pass
        if node is None:
            return "forward", self._stack[-1]
        if node._sequence_nr() >= _LEAF:
            return "backward", ""
        return "backward", self._owners[max(0, bisect.bisect_right(self._numbers, node._sequence_nr()) - 1)]

    def _follow(self, tensor: Tensor) -> None:
        """Count the memory of a new tensor until its storage goes."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._parameters:
            return
        size = float(storage.nbytes())

        def gone(_: Any, key: int = key, size: float = size) -> None:
            if self._alive.pop(key, None) is not None:
                self._alive_bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._alive_bytes += size
        self.counted.peak_bytes = max(self.counted.peak_bytes, self._alive_bytes)


@contextmanager
def counting(model: nn.Module, samples: int) -> Iterator[Counting]:
    """Count what happens in the block; its forward passes go through `model`."""
    mode = Counting(model, samples)
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_entering(mode, name)))
        handles.append(module.register_forward_hook(_leaving(mode), always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(mode.save, lambda tensor: tensor), mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()


def draws(name: str) -> bool:
    """Whether an operation of this name draws random numbers."""
    return any(part in name for part in STOCHASTIC) and "backward" not in name


def _entering(mode: Counting, name: str) -> Callable[..., None]:
    def enter(module: nn.Module, args: Any) -> None:
        mode.enter(name)

    return enter


def _leaving(mode: Counting) -> Callable[..., None]:
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.leave(output)

    return leave


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)
