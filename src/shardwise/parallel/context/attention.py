"""Attention of a part of a sequence to the whole of it, inside unmodified modules.

While a module's forward pass runs, three kinds of calls are answered for the whole sequence: scaled dot-product attention,
whose keys and values come from all ranks; `torch.arange(n)` with n the tokens of this rank, which means positions; and
slices `[:n]` of something at least as long as the whole sequence, which means a table of positions. Everything else acts on
each token by itself, or is found out by the check (`shardwise.parallel.context.check`), which also learns where in the code
positions are asked for.

Shapes: N samples, H heads, L tokens of this rank, T of the whole sequence, D features of a head, P ranks.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwise.dist.collectives import Group
from shardwise.errors import PlanError
from shardwise.parallel.context.part import Part, by_rank, in_order
from shardwise.parallel.context.wholes import Wholes

ATTENTION = F.scaled_dot_product_attention
"""torch's own, whatever the name stands for meanwhile."""


_BETWEEN = ("shardwise.parallel.tensor.", "shardwise.parallel.pipeline.")
"""Where modes of other axes live."""


class Sequences(ABC):
    """Where the other ranks' tokens come from."""

    @abstractmethod
    def keys_values(self, part: Part, key_NHLD: Tensor, value_NHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence (N, H, T, D)."""

    @abstractmethod
    def mask(self, part: Part, mask_L: Tensor) -> Tensor:
        """A mask over the keys (..., L), for the whole sequence (..., T)."""


@final
class Gathered(Sequences):
    """From the other ranks, by all-gather; the backward pass sums the gradients of a token's keys and values."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def keys_values(self, part: Part, key_NHLD: Tensor, value_NHLD: Tensor) -> tuple[Tensor, Tensor]:
        key_LX = key_NHLD.movedim(-2, 0).flatten(1)
        value_LX = value_NHLD.movedim(-2, 0).flatten(1)
        both_TX = self._whole(part, torch.cat([key_LX, value_LX], 1))
        key_TX, value_TX = both_TX.split([key_LX.shape[1], value_LX.shape[1]], 1)
        return _unflatten(key_TX, key_NHLD), _unflatten(value_TX, value_NHLD)

    def mask(self, part: Part, mask_L: Tensor) -> Tensor:
        rows_LX = mask_L.movedim(-1, 0).reshape(mask_L.shape[-1], -1)
        # Not every backend sends booleans.
        rows_TX = self._whole(part, rows_LX.to(torch.uint8) if rows_LX.dtype == torch.bool else rows_LX)
        return rows_TX.to(mask_L.dtype).view(part.length, *mask_L.shape[:-1]).movedim(0, -1)

    def _whole(self, part: Part, rows_LX: Tensor) -> Tensor:
        return cast("Tensor", _Gather.apply(rows_LX, part, self._group))  # type: ignore[no-untyped-call]


def _unflatten(rows_TX: Tensor, like_NHLD: Tensor) -> Tensor:
    rest = (*like_NHLD.shape[:-2], like_NHLD.shape[-1])
    return rows_TX.reshape(-1, *rest).movedim(0, -2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_LX: Tensor, part: Part, group: Group) -> Tensor:
        ctx.part, ctx.group = part, group
        padded = rows_LX.new_zeros((max(part.counts), rows_LX.shape[1]))
        padded[: part.own] = rows_LX
        every_PLX = group.gather(padded)
        return every_PLX.flatten(0, 1).index_select(0, in_order(part.length, part.degree, rows_LX.device))

    @staticmethod
    def backward(ctx: Any, drows_TX: Tensor) -> tuple[Tensor | None, None, None]:
        part, group = ctx.part, ctx.group
        sent = drows_TX.index_select(0, by_rank(part.length, part.degree, drows_TX.device))
        received = group.exchange(sent, part.counts, [part.own] * part.degree)
        return received.view(part.degree, part.own, -1).sum(0), None, None


@final
class Sites:
    """Places in the code that ask for positions, found by the check.

    A number of tokens can be the number of something else in another batch (of its samples, say), so a call means
    positions only where it did when the check ran.
    """

    def __init__(self) -> None:
        self._positions: set[Site] = set()
        self._others: set[Site] = set()
        self._learning = True

    def mean_positions(self, site: Site, fits: bool) -> bool:
        """Whether a call there, whose number is that of this rank's tokens (`fits`) or not, is to be answered."""
        if self._learning:
            (self._positions if fits else self._others).add(site)
        return fits and site in self._positions

    def learned(self) -> None:
        """The check has run.

        Raises:
            PlanError: positions and other things are asked for at the same place.
        """
        self._learning = False
        for site in self._positions & self._others:
            raise PlanError(
                f"{site[0]}, line {site[1]}, counts tokens at one time and something else at another (or a number that is "
                "not the tokens' happens to be as large), so positions cannot be told from others: write arange(tokens) and "
                "table[:tokens] in places of their own, or try another context degree"
            )


Site = tuple[str, int, int]
"""File, line and instruction of a call."""


def _caller() -> FrameType:
    """Where the model called the function that a mode was given; modes of other axes may lie in between."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_BETWEEN):
        frame = frame.f_back
    assert frame is not None
    return frame


def _site(frame: FrameType) -> Site:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_lasti


@final
class WholeSequence(TorchFunctionMode):
    """While active, calls that look at the sequence see the whole of it."""

    def __init__(self, part: Part, sequences: Sequences | None, sites: Sites, wholes: Wholes) -> None:
        """Prepare; without `sequences` attention is left alone, for a pass without values."""
        super().__init__()
        self._part = part
        self._sequences = sequences
        self._sites = sites
        self._wholes = wholes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ or func is torch.arange:
            frame = _caller()
            # Layers of our own count tokens of an expert, which may be as many as this rank's, and never mean positions.
            if str(frame.f_globals.get("__name__", "")).startswith("shardwise.nn."):
                return func(*args, **kwargs)
            return self._arange(args, kwargs, frame) if func is torch.arange else self._sliced(args[0], args[1], frame)
        if self._sequences is None and func in (ATTENTION, F.multi_head_attention_forward):
            return func(*args, **kwargs)
        if func is ATTENTION:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # It calls attention by itself, where this mode is not asked.
            with attention_replaced(self._attend):
                return func(*args, **kwargs)
        return self._wholes.follow(func, args, kwargs, func)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self._sequences is not None
        return _attend(self._part, self._sequences, self._wholes, *args, **kwargs)

    def _arange(self, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> Tensor:
        """`arange(L)` gives the positions of this rank's tokens."""
        own, numbers = self._part.own, [*args]
        numbers += [kwargs[name] for name in ("start", "end", "step") if name in kwargs]
        fits = numbers in ([own], [0, own], [0, own, 1])
        if not self._sites.mean_positions(_site(frame), fits):
            made: Tensor = self._wholes.follow(torch.arange, args, kwargs, torch.arange)
            return made
        options = {name: value for name, value in kwargs.items() if name not in ("start", "end", "step", "out")}
        whole = torch.arange(self._part.length, **options)
        positions = self._part.take(whole, 0)
        self._wholes.know(positions, whole)
        return positions

    def _shortened(self, tensor: Tensor, index: Any, frame: FrameType) -> Tensor | None:
        """`tensor[index]` where a slice `:-1` leaves out the last token: of the sequence, which one rank has; None for others."""
        indices = list(index) if isinstance(index, tuple) else [index]
        ends = [(place, dim) for place, dim, stop in _prefixes(tensor, index) if stop == -1]
        if not ends:
            return None
        fitting = [place for place, dim in ends if tensor.shape[dim] == self._part.own]
        if not self._sites.mean_positions(_site(frame), len(fitting) == 1):
            return None
        if self._part.spans[-1][1] != self._part.length:
            indices[fitting[0]] = slice(None)
        made: Tensor = tensor[tuple(indices)]
        return made

    def _sliced(self, tensor: Tensor, index: Any, frame: FrameType) -> Tensor:
        """`tensor[index]`, where a slice `:L` of a dim of at least T entries takes those at this rank's positions."""
        if self._wholes.of(tensor) is None and (shortened := self._shortened(tensor, index, frame)) is not None:
            return shortened
        prefixes = [] if self._wholes.of(tensor) is not None else _prefixes(tensor, index)
        if not prefixes:
            found_one: Tensor = self._wholes.follow(Tensor.__getitem__, (tensor, index), {}, Tensor.__getitem__)
            return found_one
        part = self._part
        found = [(place, dim) for place, dim, stop in prefixes if stop == part.own and tensor.shape[dim] >= part.length]
        # Of a table over pairs of positions the first L rows and columns stay: a causal mask is told by its values.
        if not self._sites.mean_positions(_site(frame), len(found) == 1):
            return tensor[index]
        indices = list(index) if isinstance(index, tuple) else [index]
        place, dim = found[0]
        indices[place] = slice(None)
        made = part.take(tensor.narrow(dim, 0, part.length), dim)[tuple(indices)]
        if not tensor.requires_grad and type(made) is Tensor:
            with torch._C.DisableTorchFunction():
                self._wholes.know(made, tensor.narrow(dim, 0, part.length)[tuple(indices)])
        return made


def _prefixes(tensor: Tensor, index: Any) -> list[tuple[int, int, int]]:
    """Slices `:n` in an index: (place in the index, dim, n)."""
    indices = index if isinstance(index, tuple) else (index,)
    found: list[tuple[int, int, int]] = []
    dim = 0
    for place, item in enumerate(indices):
        if item is Ellipsis:
            dim = tensor.dim() - sum(_uses_dim(later) for later in indices[place + 1 :])
            continue
        if isinstance(item, Tensor) and item.dtype == torch.bool:
            return []  # takes several dims at once; no table of positions is read like this
        if (
            isinstance(item, slice)
            and item.start in (None, 0)
            and item.step in (None, 1)
            and isinstance(item.stop, int)
        ):
            found.append((place, dim, item.stop))
        dim += _uses_dim(item)
    return found


def _uses_dim(item: Any) -> int:
    return 0 if item is None or item is Ellipsis or isinstance(item, bool) else 1


def _attend(
    part: Part,
    sequences: Sequences,
    wholes: Wholes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `scaled_dot_product_attention`, of this rank's queries to the keys of the whole sequence."""
    queries, keys = query.shape[-2], key.shape[-2]
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    if attn_mask is not None and is_causal:
        return ATTENTION(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)  # torch says no
    if keys != part.own:
        if is_causal and queries == part.own:
            raise PlanError(
                f"causal attention of a split sequence to {keys} keys that are not split: which of them a token may see "
                "depends on its place; leave context out of the plan"
            )
        return ATTENTION(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)
    if queries != part.own:
        raise PlanError(
            f"attention of {queries} queries to the {part.length} tokens of a split sequence: every rank of the context axis "
            "would compute all of it; leave context out of the plan"
        )
    if attn_mask is not None:
        attn_mask, is_causal = _whole_mask(part, sequences, wholes, attn_mask)
    key, value = sequences.keys_values(part, key, value)
    if not is_causal:
        return ATTENTION(query, key, value, attn_mask=attn_mask, **options)
    answers = []
    first = 0
    for start, stop in part.spans:
        rows = query[..., first : first + stop - start, :]
        first += stop - start
        answers.append(_causal(rows, key[..., :stop, :], value[..., :stop, :], start, options))
    return answers[0] if len(answers) == 1 else torch.cat(answers, -2)


def _causal(query: Tensor, key: Tensor, value: Tensor, start: int, options: dict[str, Any]) -> Tensor:
    """Attention of the last rows of a sequence, from `start` on, each to the keys up to its own."""
    if start == 0:
        return ATTENTION(query, key, value, is_causal=True, **options)
    queries, keys = query.shape[-2], key.shape[-2]
    if query.device.type == "cpu":
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(start)
    else:
        # The same mask in a form that fused kernels know. Its module takes over a second to import.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(queries, keys)
    return ATTENTION(query, key, value, attn_mask=mask, **options)


def _whole_mask(part: Part, sequences: Sequences, wholes: Wholes, mask: Tensor) -> tuple[Tensor | None, bool]:
    """A mask for keys of the whole sequence, or None and True for a causal one."""
    over_keys = mask.shape[-1]
    rows = mask.shape[-2] if mask.dim() > 1 else 1
    known = wholes.of(mask)
    if known is not None and over_keys == part.own and known.shape[-1] == part.length:
        if rows == 1:
            return known, False
        if rows == part.own and known.shape[-2] == part.length:
            return (None, True) if _is_causal(known) else (part.take(known, -2), False)
    if over_keys == part.length or (over_keys == 1 and part.own > 1):
        return mask, False
    if rows == 1 and part.own > 1:
        return sequences.mask(part, mask), False
    if part.own > 1 and _is_causal(mask):
        return None, True
    raise PlanError(
        f"an attention mask of shape {tuple(mask.shape)} was made from this rank's {part.own} tokens alone, and says nothing "
        f"about the other {part.length - part.own}: use is_causal=True, give the mask as an input of shape (samples, tokens, "
        "tokens), or leave context out of the plan"
    )


def _is_causal(mask: Tensor) -> bool:
    """Whether every token sees itself and those before, and nothing else changes."""
    allowed = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == allowed).all())
    lowest = torch.finfo(mask.dtype).min
    return bool(((mask == 0) == allowed).all()) and bool((mask.le(lowest) != allowed).all())


@contextmanager
def attention_replaced(attend: Any) -> Iterator[None]:
    """`torch.nn.functional.scaled_dot_product_attention` is `attend` for the functions beside it."""
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ATTENTION
