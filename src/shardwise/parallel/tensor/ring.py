"""The ranks that share split tensors, and the four ways values pass between split and whole.

A *whole* tensor has the same values on all ranks, and so has its gradient. Of a *split* tensor each rank holds a piece,
and the same piece of its gradient. Each crossing is an autograd function that keeps both statements true:

| crossing | forward pass | backward pass |
|---|---|---|
| `enter`: a whole tensor meets split ones | nothing | sum over the ranks |
| `total`: every rank has a summand | sum over the ranks | nothing |
| `gather`: pieces to whole | all-gather | each rank keeps its piece |
| `scatter`: whole to pieces | each rank keeps its piece | all-gather |

The same functions run in one process that plays all ranks one after the other (`rehearsal`), which is how a plan is found
and checked before any worker starts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwise.dist.collectives import Group

if TYPE_CHECKING:
    from shardwise.parallel.tensor.part import SplitTensor


@final
@dataclass(frozen=True)
class Cut:
    """Where a dim is cut: it consists of `outer` blocks of `length`, and every rank has its share of every block.

    A fused query-key-value projection has `outer=3`. Shares are those of `torch.chunk`: equal where `length` divides by the
    number of ranks, else the first ranks have more than the last.

    Attributes:
        dim: which dim, counted from 0.
        outer: number of blocks.
        length: of a block, in whole-tensor elements.
        ranks: number of ranks.
    """

    dim: int
    outer: int
    length: int
    ranks: int

    @property
    def total(self) -> int:
        """Length of the dim in the whole tensor."""
        return self.outer * self.length

    @property
    def even(self) -> bool:
        """Whether all ranks have equally much."""
        return self.length % self.ranks == 0

    def at(self, dim: int) -> Cut:
        """The same cut of another dim."""
        return self if dim == self.dim else Cut(dim, self.outer, self.length, self.ranks)

    def same_shares(self, other: Cut) -> bool:
        """Whether both cut a dim of one length in the same places."""
        return (self.outer, self.length, self.ranks) == (other.outer, other.length, other.ranks)

    def start(self, rank: int) -> int:
        """First element of a rank's share within each block."""
        return min(self.length, rank * -(-self.length // self.ranks))

    def share(self, rank: int) -> int:
        """Elements of each block that a rank has."""
        return self.start(rank + 1) - self.start(rank)

    def piece(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's piece of a whole tensor; a view where there is one block."""
        if self.outer == 1:
            return whole.narrow(self.dim, self.start(rank), self.share(rank))
        blocks = whole.unflatten(self.dim, (self.outer, self.length))
        own: Tensor = blocks.narrow(self.dim + 1, self.start(rank), self.share(rank)).flatten(self.dim, self.dim + 1)
        return own

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the pieces of all ranks."""
        if self.outer == 1:
            return torch.cat(list(pieces), self.dim)
        blocks = [piece.unflatten(self.dim, (self.outer, -1)) for piece in pieces]
        return torch.cat(blocks, self.dim + 1).flatten(self.dim, self.dim + 1)


class Watcher(ABC):
    """Told what happens to split tensors while a plan is being found."""

    @abstractmethod
    def claim(self, tensor: Tensor, cut: Cut, like: SplitTensor) -> SplitTensor | None:
        """A whole tensor is needed in pieces; if it is a parameter that may be split, its pieces."""

    @abstractmethod
    def meet(self, first: SplitTensor, second: SplitTensor) -> None:
        """Two split tensors are used in one operation, so they are split together or not at all."""

    @abstractmethod
    def reshape(self, part: SplitTensor, outers: Sequence[int]) -> None:
        """A split dim is viewed as several, along others of which it would be split with these numbers of blocks."""

    @abstractmethod
    def block(self, parts: Sequence[SplitTensor], reason: str) -> None:
        """Split tensors had to be put together."""

    @abstractmethod
    def close(self, part: SplitTensor) -> None:
        """A split tensor came to a good end: a sum that makes it whole."""


@final
@dataclass(frozen=True, eq=False)
class Ring:
    """The ranks of one tensor-parallel group, or one process that plays them all.

    Attributes:
        size: number of ranks.
        members: the ranks whose pieces this process holds.
        group: how to reach the others; None in a rehearsal.
        watcher: told what happens, while a plan is being found.
        entered: whole tensors that have entered in this forward pass, so that one that enters several times (the input
            of query, key and value projections) has its gradient summed once.
    """

    size: int
    members: tuple[int, ...]
    group: Group | None = None
    watcher: Watcher | None = None
    entered: dict[tuple[int, int, bool], tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, group: Group) -> Ring:
        """The ring of a group of ranks."""
        return cls(group.size, (group.rank,), group)

    @classmethod
    def rehearsal(cls, size: int, watcher: Watcher | None = None) -> Ring:
        """All ranks in this process."""
        return cls(size, tuple(range(size)), None, watcher)

    def add(self, values: Sequence[Tensor]) -> Tensor:
        """Sum of all ranks' values; no autograd."""
        if self.group is None:
            return torch.stack(list(values)).sum(0) if len(values) > 1 else values[0].clone()
        return self.group.sum_(values[0].clone(memory_format=torch.contiguous_format))

    def largest(self, values: Sequence[Tensor]) -> Tensor:
        """Elementwise maximum of all ranks' values; no autograd."""
        every = torch.stack(list(values)) if self.group is None else self.group.gather(values[0])
        return every.amax(0)

    def collect(self, values: Sequence[Tensor], cut: Cut) -> Tensor:
        """The whole tensor from pieces; no autograd."""
        if self.group is None:
            return cut.join(values)
        own = values[0]
        if cut.even:
            return cut.join(self.group.gather(own).unbind(0))
        # Only one block can be uneven. Pieces are padded to the largest, which rank 0 has.
        longest = cut.share(0)
        padded = own
        if own.shape[cut.dim] < longest:
            shape = list(own.shape)
            shape[cut.dim] = longest - own.shape[cut.dim]
            padded = torch.cat([own, own.new_zeros(shape)], cut.dim)
        every = self.group.gather(padded).unbind(0)
        return cut.join([piece.narrow(cut.dim, 0, cut.share(rank)) for rank, piece in enumerate(every)])

    def enter(self, whole: Tensor) -> tuple[Tensor, ...]:
        """A whole tensor for use with each member's pieces."""
        if not (torch.is_grad_enabled() and whole.requires_grad):
            return (whole,) * len(self.members)
        key = (id(whole), whole._version, torch.is_inference_mode_enabled())
        known = self.entered.get(key)
        if known is None:
            values = cast("tuple[Tensor, ...]", _Enter.apply(self, whole))  # type: ignore[no-untyped-call]
            known = self.entered[key] = (whole, values)  # the tensor itself is kept, so that its id stays taken
        return known[1]

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of all ranks' values, whole."""
        return cast(Tensor, _Total.apply(self, *values))  # type: ignore[no-untyped-call]

    def gather(self, values: Sequence[Tensor], cut: Cut) -> Tensor:
        """The whole tensor of pieces."""
        return cast(Tensor, _Gather.apply(self, cut, *values))  # type: ignore[no-untyped-call]

    def scatter(self, whole: Tensor, cut: Cut) -> tuple[Tensor, ...]:
        """The members' pieces of a whole tensor."""
        if not (torch.is_grad_enabled() and whole.requires_grad):
            return tuple(cut.piece(whole, rank) for rank in self.members)
        return cast("tuple[Tensor, ...]", _Scatter.apply(self, cut, whole))  # type: ignore[no-untyped-call]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, whole: Tensor) -> tuple[Tensor, ...]:
        ctx.ring = ring
        return tuple(whole.view_as(whole) for _ in ring.members)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, ctx.ring.add(gradients)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, *values: Tensor) -> Tensor:
        ctx.members = len(values)
        return ring.add(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return (None, *[gradient] * ctx.members)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, cut: Cut, *values: Tensor) -> Tensor:
        ctx.ring, ctx.cut = ring, cut
        return ring.collect(values, cut)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return (None, None, *[ctx.cut.piece(gradient, rank) for rank in ctx.ring.members])


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, cut: Cut, whole: Tensor) -> tuple[Tensor, ...]:
        ctx.ring, ctx.cut = ring, cut
        return tuple(cut.piece(whole, rank).clone() for rank in ring.members)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, ctx.ring.collect(gradients, ctx.cut)
