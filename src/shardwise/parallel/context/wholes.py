"""What is known of whole sequences without asking other ranks: inputs, positions, and what is computed from these alone.

Every rank has its tokens of the inputs and could have all of them; only activations are spread out. So beside each tensor that
comes from inputs and positions, the same tensor for the whole sequence is computed, as long as no parameter and no activation
takes part. Masks made from padding, distances or document numbers, positions counted by `cumsum`, and shifted labels come out
as on one worker: this rank's part is taken from the whole.

Shapes: L tokens of this rank, T of the whole sequence.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from shardwise.parallel.context.part import Part

Function = Callable[..., Any]

_SIZED = frozenset(
    ["view", "reshape", "expand", "broadcast_to", "unflatten", "new_zeros", "new_ones", "new_full", "new_empty"]
)
"""Functions that are given sizes, among them perhaps L."""

_MADE = frozenset(["ones", "zeros", "full", "empty"])
"""Functions that make a tensor of given sizes; one of L x L is a mask."""

_COMPARED = frozenset(["eq", "__eq__", "ne", "__ne__"])
"""Functions that compare a sum with a number of elements: are all of them true?"""

_ORDERED = frozenset(["gt", "__gt__", "ge", "__ge__", "lt", "__lt__", "le", "__le__"])
"""Functions that ask how many there are, of which each rank has its own number."""

_PASSED = frozenset(
    ["__get__", "__set__", "size", "dim", "numel", "stride", "is_floating_point", "detach_", "backward"]
)
"""Functions that make no new tensor of interest."""


@final
class Wholes:
    """Tensors of this rank for which the whole sequence's are known."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._known: Any = WeakTensorKeyDictionary()
        # A sum over all of a tensor -> how many elements this rank's has, and the whole one.
        self._counted: Any = WeakTensorKeyDictionary()
        # Made of no other tensors, such as numbers of samples: the same for every part of a sequence.
        self._constant: Any = WeakTensorKeyDictionary()

    def know(self, own: Any, whole: Any) -> None:
        """Two trees of the same structure: what this rank has, and the same of the whole sequence."""
        for one, other in zip(pytree.tree_leaves(own), pytree.tree_leaves(whole), strict=True):
            if isinstance(one, Tensor) and one.shape != other.shape:
                self._known[one] = other

    def of(self, tensor: Tensor) -> Tensor | None:
        """The same for the whole sequence; None where that is not known."""
        found: Tensor | None = self._known.get(tensor)
        return found

    def follow(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], call: Function) -> Any:
        """The result of a torch function, `call(*args, **kwargs)`; where the whole's can be computed, the part of that.

        Args:
            func: what was called.
            call: how to call it, through whatever else watches.
        """
        name = func.__name__
        if name in _MADE and self._square(args):
            return self._made(func, args, kwargs, call)
        if name in _PASSED:
            return call(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not self._concerns(tensors):
            plain = call(*args, **kwargs)
            if type(plain) is Tensor and not plain.requires_grad and all(leaf in self._constant for leaf in tensors):
                self._constant[plain] = True
            return plain
        failed: Exception | None = None
        own: Any = None
        try:
            own = call(*args, **kwargs)
        except (IndexError, RuntimeError) as error:  # positions of the whole sequence in a part of it
            failed = error
        for whole_args in self._whole_arguments(name, args, kwargs):
            try:
                with torch._C.DisableTorchFunction():
                    whole = func(*whole_args[0], **whole_args[1])
                    shape_like = own if failed is None else _shape_of(func, args, kwargs)
                answer = self._answer(name, own, shape_like, whole, failed is not None)
                if name == "sum" and isinstance(answer, Tensor) and not answer.dim():
                    self._counted[answer] = args[0].numel(), self._known[args[0]].numel()
            except (IndexError, RuntimeError, ValueError, TypeError, NotImplementedError):
                continue
            if answer is not None or failed is None:
                return own if answer is None else answer
        if failed is not None:
            raise failed
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
            self._known.pop(args[0], None)  # changed in place, and nobody knows to what
        return own

    # What a call is about

    def _concerns(self, tensors: list[Tensor]) -> bool:
        """Whether the arguments are known as wholes, or the same for every part of a sequence.

        Something over pairs of tokens (a mask, distances) may meet parameters too: a bias that is learned.
        """
        pairs = [self._pairs(leaf) for leaf in tensors if leaf in self._known]
        if not pairs:
            return False
        for leaf in tensors:
            if leaf in self._known or leaf in self._constant:
                continue
            if type(leaf) is nn.Parameter and any(pairs):
                continue
            if type(leaf) is not Tensor or leaf.requires_grad or self._part.own in leaf.shape:
                return False  # an activation, a parameter, a stand-in or a piece; or what seems to run over tokens
        return True

    def _pairs(self, known: Tensor) -> bool:
        whole = self._known[known]
        return bool(sum(map(operator.ne, known.shape, whole.shape)) > 1)

    def _square(self, args: tuple[Any, ...]) -> bool:
        sizes = args[0] if args and isinstance(args[0], (tuple, list)) else args
        own = self._part.own
        return own > 1 and len(sizes) >= 2 and sizes[-1] == own and sizes[-2] == own

    def _made(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], call: Function) -> Any:
        own = call(*args, **kwargs)
        length = self._part.length
        listed = isinstance(args[0], (tuple, list))
        sizes = args[0] if listed else args
        grown = (*sizes[:-2], length, length)
        with torch._C.DisableTorchFunction():
            whole = func(grown, *args[1:], **kwargs) if listed else func(*grown, **kwargs)
        if type(own) is Tensor and not own.requires_grad:
            self._known[own] = whole
        return own

    # The same call for the whole sequence

    def _whole_arguments(self, name: str, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
        """The arguments with wholes in place of parts; with T in place of L where sizes or ends of slices are given."""
        swapped = pytree.tree_map_only(Tensor, lambda leaf: self._known.get(leaf, leaf), (args, kwargs))
        if name == "__getitem__" or name == "__setitem__":
            yield (swapped[0][0], self._grown_index(args[1]), *swapped[0][2:]), swapped[1]
            return
        if name in _COMPARED:
            counts = [self._counted[leaf] for leaf in args if isinstance(leaf, Tensor) and leaf in self._counted]
            if counts:
                replaced = dict(counts)
                swapped = pytree.tree_map_only(int, lambda number: replaced.get(number, number), swapped)
            yield swapped
            return
        leaves, structure = pytree.tree_flatten(swapped)
        places = [place for place, leaf in enumerate(leaves) if type(leaf) is int and leaf == self._part.own]
        if name not in _SIZED or not places:
            yield swapped
            return
        # The first size is mostly of the samples, which may be as many as the tokens of a rank: the last to be changed.
        first = next(place for place, leaf in enumerate(leaves) if type(leaf) is int)
        given = next(leaf for leaf in args if isinstance(leaf, Tensor))
        if given in self._known and given.dim() and given.shape[0] == self._known[given].shape[0] == self._part.own:
            places = [place for place in places if place != first]
        chosen = [c for n in range(len(places), -1, -1) for c in itertools.combinations(places, n)]
        for some in sorted(chosen, key=lambda group: first in group and len(places) > 1):
            changed = [self._part.length if place in some else leaf for place, leaf in enumerate(leaves)]
            yield pytree.tree_unflatten(changed, structure)

    def _grown_index(self, index: Any) -> Any:
        def grown(item: Any) -> Any:
            if isinstance(item, Tensor):
                return self._known.get(item, item)
            if isinstance(item, slice) and item.stop == self._part.own:
                return slice(item.start, self._part.length, item.step)
            return item

        return tuple(grown(item) for item in index) if isinstance(index, tuple) else grown(index)

    # What this rank gets of it

    def _answer(self, name: str, own: Any, shape_like: Any, whole: Any, failed: bool) -> Any:
        """This rank's part of the whole result, remembered as such; None where there is nothing to say."""
        if isinstance(whole, Tensor) and isinstance(shape_like, Tensor):
            return self._tensor(name, own, shape_like, whole, failed)
        if isinstance(whole, (tuple, list)) and isinstance(own, (tuple, list)) and len(own) == len(whole):
            parts = [
                self._tensor(name, one, one, other, failed)
                if isinstance(one, Tensor) and isinstance(other, Tensor)
                else one
                for one, other in zip(own, whole, strict=True)
            ]
            made = getattr(type(own), "_make", type(own))
            return made(one if part is None else part for one, part in zip(own, parts, strict=True))
        return None

    def _tensor(self, name: str, own: Any, like: Tensor, whole: Tensor, failed: bool) -> Tensor | None:
        if like.dim() != whole.dim():
            return None
        part, taken = self._part, whole
        if name.endswith("_") and not name.endswith("__"):
            self._known[own] = whole
            return own  # type: ignore[no-any-return]
        differing = [dim for dim in range(whole.dim()) if like.shape[dim] != whole.shape[dim]]
        if not differing:
            # A yes or no is about the sequence, as on one worker; a number counts this rank's tokens.
            if failed or (whole.dtype == torch.bool and whole.numel() == 1 and name not in _ORDERED):
                return whole
            self._known[own] = whole
            return own  # type: ignore[no-any-return]
        for dim in differing:
            if like.shape[dim] == part.own and whole.shape[dim] == part.length:
                taken = part.take(taken, dim)
            elif name == "__getitem__" and part.own - like.shape[dim] == part.length - whole.shape[dim] > 0:
                # A sequence that has lost some of its ends: each rank has what is left at its own places.
                taken = taken.index_select(dim, _places(part, whole.shape[dim]).to(taken.device))
            else:
                taken = own  # for now not the same tokens, such as a sequence with something added
                break
        # A copy: what changes it in place must not change the whole as well, and a view of a part may not be viewed again.
        result: Tensor = own if taken is own else taken.clone(memory_format=torch.contiguous_format)
        self._known[result] = whole
        return result


def _places(part: Part, length: int) -> Tensor:
    places = [place for start, stop in part.spans for place in range(start, stop) if place < length]
    return torch.tensor(places, dtype=torch.int64)


def _shape_of(func: Function, args: Any, kwargs: Any) -> Any:
    """The result without values, for which no index is out of bounds."""
    return func(
        *pytree.tree_map_only(Tensor, _without_values, args), **pytree.tree_map_only(Tensor, _without_values, kwargs)
    )


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
