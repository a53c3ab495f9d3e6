"""What a model's constructor did to its large tensors, operation by operation, and how to do parts of it again.

A tensor that was not given memory is known by its *storage*: a number. A view of it is that number with sizes, strides and an
offset, so that writing through one view is seen by all. `Log.replay` computes what storages hold: it finds the operations
that their values depend on (none before the last that overwrote everything), and does these, in order, with real memory.
A random operation starts from the state of the generator in which the constructor met it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from shardwise.errors import RunFailed
from shardwise.parallel.deferred.memory import fresh_storage
from shardwise.parallel.replicas import checksum

NO_READS = frozenset(
    {"normal_", "uniform_", "random_", "exponential_", "log_normal_", "geometric_", "cauchy_", "zero_", "fill_"}
)
"""Operators that overwrite a tensor without looking at it; `bernoulli_` looks at its probabilities only."""

OVERWRITING = NO_READS | {"copy_", "bernoulli_"}

EMPTY = frozenset({"empty", "empty_strided", "empty_permuted", "empty_like", "new_empty", "new_empty_strided"})
"""Operators that leave memory as it is."""

SHAPE_ONLY = EMPTY | {
    *("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_full"),
}
"""Operators that look at the shape and dtype of a tensor, not at its values."""


@final
@dataclass(frozen=True)
class View:
    """A tensor without memory: a part of a storage, sizes and strides in elements."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, storage: int) -> View:
        """How `tensor` looks at its storage."""
        return cls(storage, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)

    def scratch(self) -> Tensor:
        """Memory of this form with any values."""
        last = sum((length - 1) * stride for length, stride in zip(self.size, self.stride, strict=True))
        storage = fresh_storage(0 if 0 in self.size else (last + 1) * self.dtype.itemsize)
        return torch.empty(0, dtype=self.dtype).set_(storage, 0, self.size, self.stride)

    def covers(self, storage_bytes: int) -> bool:
        """Whether writing all elements of the view overwrites its whole storage."""
        elements = 1
        for stride, length in sorted(zip(self.stride, self.size, strict=True)):
            if length != 1 and stride != elements:
                return False
            elements *= length
        return self.offset == 0 and elements * self.dtype.itemsize == storage_bytes


@final
@dataclass(frozen=True)
class Entry:
    """One operation.

    Attributes:
        call: the operator.
        arguments: positional and keyword arguments, with a `View` for each tensor without memory.
        outputs: views of the storages that it made, in the order of its results.
        reads: storages whose values it looks at.
        writes: storages that it changes or makes.
        overwrites: those of `writes` of which nothing is left.
        state: of the random generator before it, None where it draws nothing.
        bits: checksum of what it drew.
    """

    call: Any
    arguments: Any
    outputs: tuple[View, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    overwrites: frozenset[int]
    state: Tensor | None = None
    bits: int | None = None

    @property
    def name(self) -> str:
        """The operator's name, without its overload."""
        return name_of(self.call)

    @property
    def keeps_layout(self) -> bool:
        """Whether results surely have the same strides with memory as without: it made none, or copied, or looked at sizes."""
        return not self.outputs or not self.reads or self.name in ("clone", "_to_copy")

    def signature(self) -> tuple[Any, ...]:
        """Equal for entries whose results have the same layout."""
        forms = [
            (item.size, item.stride, item.offset, item.dtype) if isinstance(item, View) else str(item)
            for item in pytree.tree_leaves(self.arguments)
            if not isinstance(item, Tensor)
        ]
        return (str(self.call), *forms)


def name_of(call: Any) -> str:
    """The name of an operator such as `aten.normal_.default`: normal_."""
    return str(call.overloadpacket.__name__)


class CannotReplayError(Exception):
    """Something in the constructor cannot be done again later; the text completes "because ..."."""


@final
class Log:
    """Operations in the order in which they were done, and the storages they are about."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.sizes: list[int] = []
        """Bytes of each storage."""
        self._writers: list[list[int]] = []

    def add_storage(self, size_bytes: int) -> int:
        """A new storage's number."""
        self.sizes.append(size_bytes)
        self._writers.append([])
        return len(self.sizes) - 1

    def add(self, entry: Entry) -> None:
        """Append an operation."""
        for storage in entry.writes:
            self._writers[storage].append(len(self.entries))
        self.entries.append(entry)

    def needed(self, storages: Iterable[int]) -> list[int]:
        """Which operations the present values of storages depend on, in order."""
        bound = len(self.entries)
        found: set[int] = set()
        # Backwards: a storage is wanted with its value before the operation `bound`; (-index, storage) comes out last first.
        queue: list[tuple[int, int]] = []

        def want(storage: int, before: int) -> None:
            writers = self._writers[storage]
            place = _last_below(writers, before)
            if place is not None:
                heapq.heappush(queue, (-place, storage))

        for storage in storages:
            want(storage, bound)
        seen: set[tuple[int, int]] = set()
        while queue:
            item = heapq.heappop(queue)
            if item in seen:
                continue
            seen.add(item)
            index, storage = -item[0], item[1]
            entry = self.entries[index]
            if storage not in entry.overwrites:
                want(storage, index)
            if index not in found:
                found.add(index)
                for other in entry.reads:
                    want(other, index)
                # What else it writes must be there to be written to; its value does not matter unless it is wanted.
        return sorted(found)

    @torch.no_grad()
    def replay(self, storages: Iterable[int]) -> dict[int, torch.UntypedStorage]:
        """The present contents of storages. The random generator is left as it was.

        Raises:
            CannotReplayError: a result has another layout than it had without memory.
            RunFailed: a random operation drew other numbers than in the constructor.
        """
        wanted = frozenset(storages)
        order = self.needed(wanted)
        last_use = {s: index for index in order for s in (*self.entries[index].reads, *self.entries[index].writes)}
        real: dict[int, torch.UntypedStorage] = {}
        before = torch.get_rng_state()
        try:
            for index in order:
                entry = self.entries[index]
                self._do(entry, real)
                for storage in (*entry.reads, *entry.writes):
                    if last_use[storage] == index and storage not in wanted:
                        real.pop(storage, None)
        finally:
            torch.set_rng_state(before)
        for storage in wanted - real.keys():
            raise CannotReplayError(f"nothing is known of storage {storage}")  # pragma: no cover  # guards ourselves
        return real

    def _do(self, entry: Entry, real: dict[int, torch.UntypedStorage]) -> None:
        if entry.name in EMPTY:
            for output in entry.outputs:
                # No defined values in a serial run either; but copies of them must be equal.
                real[output.storage] = fresh_storage(self.sizes[output.storage])
            return
        for storage in entry.writes - {output.storage for output in entry.outputs}:
            if storage not in real:
                real[storage] = fresh_storage(self.sizes[storage])
        if entry.state is not None:
            torch.set_rng_state(entry.state)
        result = run_real(entry, lambda view: tensor_on(real[view.storage], view))
        made = [item for item in pytree.tree_leaves(result) if isinstance(item, Tensor)][: len(entry.outputs)]
        for view, tensor in zip(entry.outputs, made, strict=True):
            if View.of(tensor, view.storage) != view:
                raise CannotReplayError(f"{entry.call} gives another memory layout than it told beforehand")
            real[view.storage] = tensor.untyped_storage()
        if entry.bits is not None:
            drawn = drawn_by(entry, result)
            if int(checksum(drawn)) != entry.bits:
                raise RunFailed(
                    f"{entry.call} drew other random numbers for a weight of {tuple(drawn.shape)} than while the model was "
                    "built: this is a fault of shardwise; give build = 'whole' in the plan file"
                )


def run_real(entry: Entry, tensor_of: Callable[[View], Tensor], generator: torch.Generator | None = None) -> Any:
    """Do an operation with real memory.

    Args:
        entry: the operation.
        tensor_of: gives the tensor that a view stands for.
        generator: that an operation with a generator of its own draws from; None makes one in the state of the entry.
    """
    look = (lambda view: view.scratch()) if entry.name in SHAPE_ONLY else tensor_of
    args, kwargs = pytree.tree_map(lambda item: look(item) if isinstance(item, View) else item, entry.arguments)
    if kwargs.get("generator") is not None:
        kwargs["generator"] = generator if generator is not None else _generator(entry)
    return entry.call(*args, **kwargs)


def _generator(entry: Entry) -> torch.Generator:
    assert entry.state is not None
    generator = torch.Generator()
    generator.set_state(entry.state)
    return generator


def drawn_by(entry: Entry, result: Any) -> Tensor:
    """The tensor that holds what a random operation drew: its first result."""
    return next(item for item in pytree.tree_leaves(result) if isinstance(item, Tensor))


def tensor_on(storage: torch.UntypedStorage, view: View) -> Tensor:
    """A tensor that looks at a real storage as a view does."""
    return torch.empty(0, dtype=view.dtype).set_(storage, view.offset, view.size, view.stride)


def _last_below(ordered: list[int], bound: int) -> int | None:
    place = bisect_left(ordered, bound)
    return ordered[place - 1] if place else None
