"""`SplitTensor`: what the user's code sees of a tensor that is split over ranks.

It has the shape of the whole tensor, so code that computes sizes (`view(n, t, self.heads, d // self.heads)`) is right as it
stands. Every torch function that it is given to passes through `dispatch`, which does it piece by piece where a rule
says how, and otherwise puts the tensor together first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwise.parallel.tensor.ring import Cut, Ring


class WholeNeeded(Exception):  # not an error: the dispatcher gathers and goes on
    """A rule cannot work piece by piece; the message says why."""


@final
class SplitTensor(Tensor):
    """A tensor of which each rank holds a piece.

    Attributes:
        pieces: of the ring's members (in a run: this rank's one piece).
        cut: where the whole is cut.
        ring: the ranks.
        family: in a rehearsal, the tensors that are split together with it.
        taken: into how many equal parts of the original dim it has been divided (3 for the query of a fused projection).
        parameter: it is a parameter and no activation.
    """

    pieces: tuple[Tensor, ...]
    cut: Cut
    ring: Ring
    family: int
    taken: int
    parameter: bool

    @staticmethod
    def __new__(
        cls: type[SplitTensor],
        pieces: Sequence[Tensor],
        cut: Cut,
        ring: Ring,
        *,
        family: int = 0,
        taken: int = 1,
        parameter: bool = False,
    ) -> SplitTensor:
        """Put pieces together to what looks like the whole."""
        first = pieces[0]
        shape = list(first.shape)
        shape[cut.dim] = cut.total
        made: SplitTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=first.dtype, device=first.device, requires_grad=False
        )
        made.pieces = tuple(pieces)
        made.cut = cut
        made.ring = ring
        made.family = family
        made.taken = taken
        made.parameter = parameter
        return made

    @classmethod
    def __torch_function__(  # type: ignore[no-untyped-def]
        cls, func, types, args=(), kwargs=None
    ):
        """Every torch function with a split argument."""
        from shardwise.parallel.tensor.dispatch import dispatch

        return dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[no-untyped-def, override]
        cls, func, types, args=(), kwargs=None
    ):
        """No operation below torch's functions may see the wrapper: it has no values."""
        raise RuntimeError(
            f"{func} was called on a tensor that is split over ranks from code below torch's Python functions; name the "
            "module as tensor_rules={name: 'replicate'} to leave it whole"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and cut, no values."""
        with torch._C.DisableTorchFunctionSubclass():
            return f"SplitTensor(shape={tuple(self.shape)}, dim={self.cut.dim}, outer={self.cut.outer})"


def like(
    part: SplitTensor, pieces: Sequence[Tensor], cut: Cut | None = None, *, taken: int | None = None
) -> SplitTensor:
    """New pieces of the same family."""
    return SplitTensor(
        pieces, cut or part.cut, part.ring, family=part.family, taken=part.taken if taken is None else taken
    )


def whole(part: SplitTensor) -> Tensor:
    """The whole tensor, the same on all ranks."""
    return part.ring.gather(part.pieces, part.cut)


def plain(tree: Any) -> Any:
    """A tree of tensors without split ones among them. Collective where there are some."""
    return pytree.tree_map_only(SplitTensor, whole, tree)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor, without passing through the dispatcher."""
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(tensor.shape)


def each(
    ring: Ring, func: Callable[..., Any], arguments: Sequence[Sequence[Any]], kwargs: dict[str, Any] | None = None
) -> list[Any]:
    """`func(*arguments, **kwargs)` for each member; every argument is given once a member."""
    options = kwargs or {}
    return [func(*(values[index] for values in arguments), **options) for index in range(len(ring.members))]


def beside(part: SplitTensor, value: Any, dim: int | None) -> tuple[Any, ...]:
    """Another argument of a call with `part`, for each member.

    Args:
        part: the split argument.
        value: anything; only tensors need care.
        dim: the tensor's dim that goes with the split one; None where it has none.

    Raises:
        WholeNeeded: the tensor does not fit the cut.
    """
    ring = part.ring
    if not isinstance(value, Tensor):
        return (value,) * len(ring.members)
    if isinstance(value, SplitTensor):
        if ring.watcher is not None:
            ring.watcher.meet(part, value)
        if dim is None or value.cut.dim != dim or not value.cut.same_shares(part.cut):
            raise WholeNeeded("two split tensors that are cut in different places meet")
        return value.pieces
    if dim is None or value.shape[dim] == 1:
        return ring.enter(value)
    if value.shape[dim] != part.cut.total:
        raise WholeNeeded(f"a tensor of shape {tuple(value.shape)} does not fit the split dim of {part.cut.total}")
    cut = part.cut.at(dim)
    if not value.requires_grad:
        return ring.scatter(value, cut)
    if ring.watcher is None and isinstance(value, nn.Parameter):
        return ring.scatter(value, cut)
    claimed = ring.watcher.claim(value, cut, part) if ring.watcher is not None else None
    if claimed is None:
        raise WholeNeeded("it meets a whole tensor of the same shape")
    return claimed.pieces
