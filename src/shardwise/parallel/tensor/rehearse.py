"""A rehearsal: one forward pass in which this process plays all ranks, and writes down what could be split.

Every weight that is multiplied with a whole tensor is tried as a column split. Where its output, still split, meets another
weight along the split dim, that weight becomes a row split and the two close up with a sum. Where it meets anything that
needs it whole, the *family* of tensors that are split together is given up, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shardwise.parallel.tensor import multihead
from shardwise.parallel.tensor.dispatch import METADATA, dispatch, split_arguments
from shardwise.parallel.tensor.part import SplitTensor, whole
from shardwise.parallel.tensor.plan import Share
from shardwise.parallel.tensor.ring import Cut, Ring, Watcher

_UNTOUCHED = METADATA | {"__get__", "__set__", "detach", "requires_grad_", "data_ptr"}
"""Functions that may see a parameter itself, because they compute nothing from it."""

_COLUMN_DIM = {"linear": 0, "conv1d": 0, "conv2d": 0, "conv3d": 0, "matmul": 1, "__matmul__": 1, "mm": 1, "addmm": 1}
_WEIGHT_AT = {"addmm": 2}


@final
@dataclass
class Book:
    """What is known so far about the parameters, over several rehearsals.

    Attributes:
        refused: parameter -> why it is not where a split begins.
        fixed: parameters that must stay whole, from the user's rules.
        outers: parameter -> numbers of blocks to try, the current one first.
        tried: parameter -> numbers of blocks that failed.
        first_reasons: parameter -> why it could not be split in one block.
        forced: parameter -> dim, from the user's rules: split even where its output must be put together.
        vocabulary: embedding weights that are split by entries.
        uses: parameter -> names of the functions it was given to.
    """

    refused: dict[str, str] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    outers: dict[str, list[int]] = field(default_factory=dict)
    tried: dict[str, set[int]] = field(default_factory=dict)
    first_reasons: dict[str, str] = field(default_factory=dict)
    forced: dict[str, int] = field(default_factory=dict)
    vocabulary: set[str] = field(default_factory=set)
    uses: dict[str, set[str]] = field(default_factory=dict)


@final
@dataclass
class Family:
    """Tensors that are split together or not at all."""

    columns: set[str] = field(default_factory=set)
    members: set[str] = field(default_factory=set)
    closed: bool = False
    reasons: list[str] = field(default_factory=list)
    outers: list[int] = field(default_factory=list)


@final
class Rehearsal(Watcher):
    """One run. `shares` holds the splits that were tried, `families` how they ended, `inside` the modules that pieces pass
    in or out of, `drops` whether split tensors met dropout."""

    def __init__(self, names: dict[int, str], book: Book, ranks: int) -> None:
        self.names = names
        self.book = book
        self.ring = Ring.rehearsal(ranks, self)
        self.shares: dict[str, Share] = {}
        self.inside: set[str] = set()
        self.drops = False
        self._parts: dict[str, SplitTensor] = {}
        self._families: dict[int, Family] = {}
        self._parent: dict[int, int] = {}

    @property
    def families(self) -> list[Family]:
        """Those that are not part of a larger one."""
        return [family for number, family in self._families.items() if self._root(number) == number]

    def run(self, program: Callable[[], Any]) -> Any:
        """Call `program` under watch; what it returns, put together."""
        with _guarded_functions(self), _Mode(self):
            result = program()
        parts = split_arguments(result, {})
        if parts:
            self.block(parts, "its output leaves the model")
        return pytree.tree_map_only(SplitTensor, whole, result)

    # What the rules report

    def claim(self, tensor: Tensor, cut: Cut, like: SplitTensor) -> SplitTensor | None:
        """A whole tensor that is needed in pieces: a parameter may join the family."""
        name = self.names.get(id(tensor))
        if name is None or name in self.shares or name in self.book.fixed:
            return None
        return self._assign(name, tensor, cut, self._root(like.family))

    def meet(self, first: SplitTensor, second: SplitTensor) -> None:
        """Join two families."""
        a, b = self._root(first.family), self._root(second.family)
        if a == b:
            return
        self._parent[b] = a
        keep, gone = self._families[a], self._families[b]
        keep.columns |= gone.columns
        keep.members |= gone.members
        keep.closed |= gone.closed
        keep.reasons += gone.reasons
        keep.outers += gone.outers

    def reshape(self, part: SplitTensor, outers: Sequence[int]) -> None:
        """Other cuts to try, should this one fail."""
        self._families[self._root(part.family)].outers += outers

    def block(self, parts: Sequence[SplitTensor], reason: str) -> None:
        """The families of these tensors are given up."""
        for part in parts:
            self._families[self._root(part.family)].reasons.append(reason)

    def close(self, part: SplitTensor) -> None:
        """A good end."""
        self._families[self._root(part.family)].closed = True

    # What the mode asks

    def part_of(self, tensor: Tensor) -> Tensor:
        """The pieces of a parameter that is split in this run; anything else as it is."""
        name = self.names.get(id(tensor))
        return tensor if name is None else self._parts.get(name, tensor)

    def open(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Split the weight of a call if it may be the start of a family."""
        name = func.__name__
        if name == "embedding":
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            known = self.names.get(id(weight))
            if known in self.book.vocabulary and isinstance(weight, Tensor):
                self._start(known, weight, 0)
            return
        if name == multihead.NAME:
            self._open_attention(multihead.named(args, kwargs))
            return
        if name not in _COLUMN_DIM:
            return
        place = _WEIGHT_AT.get(name, 1)
        weight = args[place] if len(args) > place else kwargs.get("weight")
        known = self.names.get(id(weight))
        if known is None or not isinstance(weight, Tensor):
            return
        x = args[place - 1] if args else kwargs.get("input")
        if isinstance(x, SplitTensor) and known not in self.book.forced:
            return
        if weight.dim() == 2 or name.startswith("conv"):
            self._start(known, weight, self.book.forced.get(known, _COLUMN_DIM[name]))

    def _open_attention(self, given: dict[str, Any]) -> None:
        weight = given.get("in_proj_weight")
        name = self.names.get(id(weight))
        if name is None or not isinstance(weight, Tensor):
            return
        reason = multihead.obstacle(given, self.ring.size)
        if reason is not None:
            self.book.refused[name] = reason
            return
        self.book.outers.setdefault(name, [3])
        self._start(name, weight, 0)

    def used(self, func: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        """Note which functions see which parameters."""
        for tensor in tensors:
            name = self.names.get(id(tensor))
            if name is not None:
                self.book.uses.setdefault(name, set()).add(func.__name__)

    def _start(self, name: str | None, weight: Tensor, dim: int) -> None:
        if name is None or name in self.shares or name in self.book.refused:
            return
        outer = self.book.outers.get(name, [1])[0]
        if weight.shape[dim] % outer:
            return
        cut = Cut(dim, outer, weight.shape[dim] // outer, self.ring.size)
        if not cut.share(cut.ranks - 1):
            self.book.refused[name] = f"{cut.total} units leave some of {self.ring.size} ranks without any"
            return
        number = len(self._families)
        self._families[number] = Family(columns={name})
        self._parent[number] = number
        if self._assign(name, weight, cut, number) is None:
            self.book.refused[name] = f"blocks of {cut.length} cannot be shared equally by {self.ring.size} ranks"

    def _assign(self, name: str, tensor: Tensor, cut: Cut, family: int) -> SplitTensor | None:
        if cut.outer > 1 and not cut.even:
            return None
        if not cut.share(cut.ranks - 1):
            return None
        self.shares[name] = Share(dim=cut.dim, outer=cut.outer)
        self._families[family].members.add(name)
        # Views where possible: a rehearsal needs no gradients, only to know which tensors would have one.
        pieces = [cut.piece(tensor.detach(), rank).requires_grad_(tensor.requires_grad) for rank in self.ring.members]
        part = SplitTensor(pieces, cut, self.ring, family=family, parameter=True)
        self._parts[name] = part
        return part

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number


@final
class _Mode(TorchFunctionMode):
    """Shows the rules every call that involves a parameter."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self._rehearsal = rehearsal

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        name = func.__name__
        if name in _UNTOUCHED and not any(isinstance(value, SplitTensor) for value in args):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        rehearsal = self._rehearsal
        rehearsal.used(func, tensors)
        rehearsal.open(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(nn.Parameter, rehearsal.part_of, (args, kwargs))
        args, kwargs, drops = _quiet(name, args, kwargs)
        rehearsal.drops |= drops and bool(split_arguments(args, kwargs))
        if split_arguments(args, kwargs):
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


_DROPOUT_AT = {"scaled_dot_product_attention": 4, multihead.NAME: 10}
_DROPOUTS = frozenset(["dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"])


def _quiet(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The call without dropout, so that two rehearsals compute the same; and whether it had any."""
    if name in _DROPOUTS:
        asked, p = "p", 1
    elif name in _DROPOUT_AT:
        asked, p = "dropout_p", _DROPOUT_AT[name]
    else:
        return args, kwargs, False
    before = args[p] if len(args) > p else kwargs.get(asked, 0.5 if asked == "p" else 0.0)
    training = kwargs.get("training", args[2] if asked == "p" and len(args) > 2 else True)
    if len(args) > p:
        return (*args[:p], 0.0, *args[p + 1 :]), kwargs, bool(before and training)
    return args, {**kwargs, asked: 0.0}, bool(before and training)


@contextmanager
def _guarded_functions(rehearsal: Rehearsal) -> Iterator[None]:
    """Autograd functions of the user's own do not pass through torch's Python functions: their arguments must be whole."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        parts = split_arguments(args, kwargs)
        if parts:
            rehearsal.block(parts, f"the autograd function {cls.__name__} needs it whole")
            args, kwargs = pytree.tree_map_only(SplitTensor, whole, (args, kwargs))
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
