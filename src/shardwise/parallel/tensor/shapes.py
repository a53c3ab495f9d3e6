"""Rules for functions that only rearrange: views, permutations, pieces and joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.tensor.part import SplitTensor, WholeNeeded, beside, each, like, shape_of
from shardwise.parallel.tensor.ring import Cut

Function = Callable[..., Any]


def wrapped(dim: int, dims: int) -> int:
    """A dim counted from 0."""
    return dim + dims if dim < 0 else dim


def ints(values: Sequence[Any]) -> list[int]:
    """`(2, 3)` of both `f(x, 2, 3)` and `f(x, (2, 3))`."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = values[0]
    return [int(value) for value in values]


def reshape_to(part: SplitTensor, shape: Sequence[int], how: str = "reshape") -> SplitTensor:
    """The same elements in another shape, piece by piece.

    Raises:
        WholeNeeded: elements of one rank's piece would not lie together along any single dim of the new shape.
    """
    old, new = shape_of(part), _without_minus_one(shape_of(part), shape)
    cut = part.cut
    (a, b), (c, d) = _group_of(cut.dim, old, new)
    before, after = prod(old[a : cut.dim]), prod(old[cut.dim + 1 : b])
    found = None
    if cut.even or after == 1:
        found = _place(before * cut.outer, cut.length * after, new[c:d], cut.ranks, unevenly=not cut.even)
    if part.ring.watcher is not None and d - c > 1:
        part.ring.watcher.reshape(part, _other_cuts(part, before, new[c:d]))
    if found is None:
        raise WholeNeeded(f"its shape {old} is viewed as {new}, which cuts across the shares of {cut.ranks} ranks")
    index, outer, length = found
    made = Cut(c + index, outer, length, cut.ranks)
    pieces = []
    for piece, rank in zip(part.pieces, part.ring.members, strict=True):
        local = list(new)
        local[made.dim] = outer * made.share(rank)
        pieces.append(getattr(piece, how)(local))
    return like(part, pieces, made)


def _without_minus_one(old: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    if -1 not in shape:
        return tuple(shape)
    known = -prod(shape)
    return tuple(prod(old) // known if size == -1 else size for size in shape)


def _group_of(dim: int, old: Sequence[int], new: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest runs of old and new dims, with `dim` among the old, that hold the same elements."""
    if prod(old) != prod(new) or prod(old) == 0:
        raise WholeNeeded(f"shape {tuple(old)} is viewed as {tuple(new)}")
    i = j = 0
    while True:
        a, c = i, j
        left, right = old[i], new[j] if j < len(new) else 1
        i, j = i + 1, min(j + 1, len(new))
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        if a <= dim < i:
            return (a, i), (c, len(new) if i == len(old) else j)


def _place(outer: int, length: int, sizes: Sequence[int], ranks: int, *, unevenly: bool) -> tuple[int, int, int] | None:
    """(index, outer, length) of the cut among `sizes`, whose product is `outer * length`; None where there is none."""
    for index, size in enumerate(sizes):
        first, rest = prod(sizes[:index]), prod(sizes[index + 1 :])
        if outer % first or size % (outer // first):
            continue
        blocks = outer // first
        own = size // blocks
        if own * rest != length:
            continue
        if own % ranks == 0 or (unevenly and rest == 1):
            return index, blocks, own
    return None


def _other_cuts(part: SplitTensor, before: int, sizes: Sequence[int]) -> list[int]:
    """Numbers of blocks of the original dim with which the view would work, the outermost first."""
    cut, found = part.cut, []
    for index, size in enumerate(sizes):
        first = prod(sizes[:index])
        if size % cut.ranks == 0 and first % before == 0:
            outer = first // before
            if outer > cut.outer and cut.total % outer == 0:
                found.append(outer * part.taken)
    return found


def view(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`view`, `reshape`."""
    part, sizes = args[0], args[1:] or (kwargs.get("size", kwargs.get("shape")),)
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        raise WholeNeeded("its bits are viewed as another dtype")
    return reshape_to(part, ints(sizes), "view" if func.__name__ == "view" else "reshape")


def view_as(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`view_as`, `reshape_as`."""
    if not isinstance(args[0], SplitTensor):
        raise WholeNeeded("a whole tensor takes its shape")
    return reshape_to(args[0], shape_of(args[1]), "view" if func.__name__ == "view_as" else "reshape")


def flatten(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`flatten(x, start_dim, end_dim)`."""
    part = args[0]
    old = shape_of(part)
    start = wrapped(_option(args, kwargs, 1, "start_dim", 0), len(old))
    end = wrapped(_option(args, kwargs, 2, "end_dim", -1), len(old))
    return reshape_to(part, [*old[:start], prod(old[start : end + 1]), *old[end + 1 :]])


def unflatten(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`unflatten(x, dim, sizes)`."""
    part = args[0]
    old = shape_of(part)
    dim = wrapped(_option(args, kwargs, 1, "dim", None), len(old))
    sizes = list(_without_minus_one((old[dim],), list(_option(args, kwargs, 2, "sizes", None))))
    return reshape_to(part, [*old[:dim], *sizes, *old[dim + 1 :]], "view")


def unsqueeze(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`unsqueeze(x, dim)`."""
    part = args[0]
    dims = len(shape_of(part))
    dim = wrapped(_option(args, kwargs, 1, "dim", None), dims + 1)
    place = part.cut.dim + (1 if dim <= part.cut.dim else 0)
    return like(part, [piece.unsqueeze(dim) for piece in part.pieces], part.cut.at(place))


def squeeze(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`squeeze(x)`, `squeeze(x, dim)`."""
    part = args[0]
    old = shape_of(part)
    asked = _option(args, kwargs, 1, "dim", None)
    wanted = range(len(old)) if asked is None else [wrapped(d, len(old)) for d in ints((asked,))]
    gone = [dim for dim in wanted if old[dim] == 1 and dim != part.cut.dim]
    place = part.cut.dim - sum(dim < part.cut.dim for dim in gone)
    return like(part, [piece.squeeze(tuple(gone)) for piece in part.pieces], part.cut.at(place))


def permute(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Everything that puts the dims in another order; asked of an empty tensor what that order is."""
    part = args[0]
    # Every dim gets its own length, so the result's shape tells where each went.
    probe = torch.empty([index + 2 for index in range(len(shape_of(part)))], device="meta")
    order = list(func(probe, *args[1:], **kwargs).shape)
    place = order.index(part.cut.dim + 2)
    return like(part, [func(piece, *args[1:], **kwargs) for piece in part.pieces], part.cut.at(place))


def expand(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`expand(x, *sizes)`, `expand_as`, `broadcast_to`."""
    part = args[0]
    if not isinstance(part, SplitTensor):
        raise WholeNeeded("a whole tensor takes its shape")
    old = shape_of(part)
    given = args[1:] or (kwargs.get("size"),)
    sizes = list(shape_of(args[1])) if func.__name__ == "expand_as" else ints(given)
    place = part.cut.dim + len(sizes) - len(old)
    if sizes[place] not in (-1, part.cut.total):
        raise WholeNeeded("its split dim is expanded")
    sizes[place] = -1
    return like(part, [piece.expand(sizes) for piece in part.pieces], part.cut.at(place))


def repeat(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`repeat(x, *times)`."""
    part = args[0]
    times = ints(args[1:] or (kwargs.get("repeats"),))
    place = part.cut.dim + len(times) - len(shape_of(part))
    if times[place] > 1 and not part.cut.even:
        raise WholeNeeded("its unevenly split dim is repeated")
    cut = Cut(place, part.cut.outer * times[place], part.cut.length, part.cut.ranks)
    return like(part, [piece.repeat(times) for piece in part.pieces], cut)


def repeat_interleave(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`repeat_interleave(x, times, dim)`."""
    part = args[0]
    times = _option(args, kwargs, 1, "repeats", None)
    dim = _option(args, kwargs, 2, "dim", None)
    if not isinstance(part, SplitTensor) or not isinstance(times, int) or dim is None:
        raise WholeNeeded("it is repeated by a tensor of counts or flattened")
    dim = wrapped(dim, len(shape_of(part)))
    cut = part.cut
    if dim == cut.dim:
        if not cut.even:
            raise WholeNeeded("its unevenly split dim is repeated")
        cut = Cut(cut.dim, cut.outer, cut.length * times, cut.ranks)
    return like(part, [piece.repeat_interleave(times, dim) for piece in part.pieces], cut)


def take(part: SplitTensor, start: int, length: int) -> SplitTensor:
    """Elements from `start` on along the split dim, which must be whole blocks.

    Raises:
        WholeNeeded: they are not.
    """
    cut = part.cut
    if (start, length) == (0, cut.total):
        return part
    if length <= 0 or cut.total % length or start % length:
        raise WholeNeeded(f"elements {start} to {start + length} of its split dim of {cut.total} are taken")
    times = cut.total // length
    if cut.outer % times:
        if part.ring.watcher is not None and length % cut.ranks == 0 and cut.outer == 1:
            part.ring.watcher.reshape(part, [times * part.taken])
        raise WholeNeeded(f"one of {times} equal parts of its split dim is taken")
    outer = cut.outer // times
    made = Cut(cut.dim, outer, cut.length, cut.ranks)
    pieces = []
    for piece, rank in zip(part.pieces, part.ring.members, strict=True):
        size = outer * cut.share(rank)
        pieces.append(piece.narrow(cut.dim, start // length * size, size))
    return like(part, pieces, made, taken=part.taken * times)


def split(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`split`, `chunk`, `unbind` along any dim."""
    part = args[0]
    name = func.__name__
    shape = shape_of(part)
    if name == "unbind":
        dim = wrapped(_option(args, kwargs, 1, "dim", 0), len(shape))
        if dim == part.cut.dim:
            raise WholeNeeded("its split dim is unbound")
        place = part.cut.dim - (dim < part.cut.dim)
        columns = [piece.unbind(dim) for piece in part.pieces]
        return tuple(like(part, list(pieces), part.cut.at(place)) for pieces in zip(*columns, strict=True))
    names = {"chunk": "chunks", "split": "split_size_or_sections", "split_with_sizes": "split_sizes"}
    asked = _option(args, kwargs, 1, names[name], kwargs.get("split_size"))
    dim = wrapped(_option(args, kwargs, 2, "dim", 0), len(shape))
    if dim != part.cut.dim:
        columns = [getattr(piece, name)(asked, dim) for piece in part.pieces]
        return tuple(like(part, list(pieces)) for pieces in zip(*columns, strict=True))
    total = part.cut.total
    size = -(-total // asked) if name == "chunk" else asked
    sizes = [min(size, total - at) for at in range(0, total, size)] if isinstance(size, int) else list(size)
    if len(set(sizes)) != 1:
        raise WholeNeeded(f"its split dim is divided into parts of different lengths {sizes}")
    return tuple(take(part, index * sizes[0], sizes[0]) for index in range(len(sizes)))


def iterate(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`for row in x`, `q, k, v = x`."""
    if args[0].cut.dim == 0:
        raise WholeNeeded("it is walked through along its split dim")
    return iter(split(torch.unbind, (args[0], 0), {}))


def narrow(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`narrow(x, dim, start, length)`."""
    part = args[0]
    if kwargs or not all(isinstance(value, int) for value in args[1:]):
        raise WholeNeeded("it is narrowed by tensors or keywords")
    dim = wrapped(args[1], len(shape_of(part)))
    if dim == part.cut.dim:
        return take(part, args[2], args[3])
    return like(part, [piece.narrow(dim, args[2], args[3]) for piece in part.pieces])


def select(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`select(x, dim, index)`."""
    part = args[0]
    dim = wrapped(_option(args, kwargs, 1, "dim", None), len(shape_of(part)))
    index = _option(args, kwargs, 2, "index", None)
    if dim == part.cut.dim:
        raise WholeNeeded("one element of its split dim is taken")
    place = part.cut.dim - (dim < part.cut.dim)
    return like(part, [piece.select(dim, index) for piece in part.pieces], part.cut.at(place))


def getitem(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x[...]` with whole numbers, slices, None and dots; the split dim may be sliced into whole blocks."""
    part, index = args
    if not isinstance(part, SplitTensor):
        raise WholeNeeded("it is an index")
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (Tensor, list, tuple, bool)) for item in items):
        raise WholeNeeded("it is indexed by tensors or lists")
    shape = shape_of(part)
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (len(shape) - used)
    dim = place = 0
    for position, item in enumerate(items):
        if item is None:
            place += 1
            continue
        if dim == part.cut.dim:
            if not isinstance(item, slice) or item.step not in (None, 1):
                raise WholeNeeded("single or every other element of its split dim is taken")
            start, stop, _ = item.indices(shape[dim])
            part = take(part, start, stop - start)
            items[position] = slice(None)
            found = place
        dim += 1
        place += isinstance(item, slice)
    return like(part, [piece[tuple(items)] for piece in part.pieces], part.cut.at(found))


def cat(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`cat`, `stack`."""
    stacks = func.__name__ == "stack"
    # torch passes over an empty list of numbers whatever the shapes of the others; caches of keys and values begin with one.
    tensors = [tensor for tensor in args[0] if stacks or shape_of(tensor) != (0,)]
    part = next(tensor for tensor in tensors if isinstance(tensor, SplitTensor))
    dims = len(shape_of(part))
    dim = wrapped(_option(args, kwargs, 1, "dim", kwargs.get("axis", 0)), dims + stacks)
    cut = part.cut
    if not stacks and dim == cut.dim:
        others = [tensor for tensor in tensors if isinstance(tensor, SplitTensor)]
        if len(others) != len(tensors) or not cut.even:
            raise WholeNeeded("it is joined to others along its split dim")
        if any((tensor.cut.dim, tensor.cut.length) != (cut.dim, cut.length) for tensor in others):
            raise WholeNeeded("it is joined to others along its split dim")
        made = Cut(cut.dim, sum(tensor.cut.outer for tensor in others), cut.length, cut.ranks)
        columns: list[Sequence[Tensor]] = [tensor.pieces for tensor in others]
    else:
        made = cut.at(cut.dim + (stacks and dim <= cut.dim))
        columns = [beside(part, tensor, cut.dim) for tensor in tensors]
    return like(part, each(part.ring, lambda *pieces: func(pieces, dim), columns), made)


def _option(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)
