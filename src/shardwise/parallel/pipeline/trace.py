"""The trace of a forward pass: the calls it makes, in order, and the values that flow between them. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@final
@dataclass(frozen=True)
class Own:
    """In an answer: the model's own parameter or buffer of that name."""

    name: str


@final
@dataclass(frozen=True)
class Call:
    """One call that the open part of a forward pass makes: a unit, or a torch function between units.

    Questions (for a shape, a dtype) are no calls.

    Attributes:
        name: of the unit, or of the torch function.
        everywhere: every stage makes this call itself, because it depends on the inputs and buffers alone.
        uses: numbers of the values it is given.
        defines: numbers of the values it makes.
        changes: numbers of the values it changes in place.
        tensors: names of the parameters and buffers it touches.
        writes: names of those it changes in place.
        hidden: numbers of earlier calls whose results reach this one by another way than its arguments.
        region: identifies the part of the forward pass that is computed again in the backward pass, which this call is in.
        cost: estimated work, in floating-point operations.
        answer: what to return where another stage runs the call, as (leaves, structure); its tensors are stand-ins.
    """

    name: str
    everywhere: bool
    uses: tuple[int, ...]
    defines: tuple[int, ...]
    changes: tuple[int, ...]
    tensors: frozenset[str]
    writes: frozenset[str]
    hidden: frozenset[int]
    region: int
    cost: float
    answer: tuple[tuple[Any, ...], Any]

    def stand_in(self) -> Any:
        """The answer, with containers of its own, because the caller may change them."""
        leaves, structure = self.answer
        return pytree.tree_unflatten(leaves, structure)


@final
@dataclass
class Value:
    """A tensor that a call makes.

    Attributes:
        ghost: its stand-in.
        storage: identifies the memory it lies in; views share it.
        gradients: (number of a call, whether the value needs a gradient after it), in order.
        late: it became part of the autograd graph after its call, as the result of a custom autograd function does.
    """

    ghost: Tensor
    storage: int
    gradients: list[tuple[int, bool]] = field(default_factory=list)
    late: bool = False

    def needs_gradient(self, position: int) -> bool:
        """Whether the value needs a gradient when `position` calls have been made."""
        state = False
        for call, needed in self.gradients:
            if call < position:
                state = needed
        return state

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return int(self.ghost.numel() * self.ghost.element_size())

    def __str__(self) -> str:
        return f"{str(self.ghost.dtype).removeprefix('torch.')}{list(self.ghost.shape)}"


@final
@dataclass(frozen=True)
class Trace:
    """A forward pass, call by call.

    Attributes:
        calls: in the order they are made.
        values: by number.
        entries: (name of a module, how many calls were made before its first call), in order.
        output: numbers of the values in the output.
        numbers: id of a stand-in -> its value's number.
        copy_inputs: the forward pass changes its inputs in place.
        asks_values: it reads values of its inputs into Python, so that other inputs of these shapes may go another way.
    """

    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    entries: tuple[tuple[str, int], ...]
    output: tuple[int, ...]
    numbers: dict[int, int]
    copy_inputs: bool
    asks_values: bool

    def live(self, position: int) -> tuple[int, ...]:
        """Values that cross a cut before the call at `position`: made before it, needed at or after it."""
        made = {value for call in self.calls[:position] for value in call.defines}
        needed = set(self.output)
        for call in self.calls[position:]:
            needed.update(call.uses)
        return tuple(sorted(made & needed))

    def starts(self, cuts: Sequence[str]) -> list[int]:
        """The position of each cut; positions are numbers of calls.

        Raises:
            KeyError: a module is not called in this forward pass.
        """
        places = dict(reversed(self.entries))
        return [places[name] for name in cuts]


def signature(inputs: Any, modes: tuple[bool, ...]) -> tuple[Any, ...]:
    """What a trace depends on: structure, shapes and dtypes of the inputs, modes of the modules, gradients, autocast."""
    leaves, structure = pytree.tree_flatten(inputs)
    shapes = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    )
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (str(structure), shapes, modes, torch.is_grad_enabled(), autocast)
