"""Rows that are not one tensor: files laid end to end, and windows over a long run of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor


class Rows(ABC):
    """Samples along a first dim, gathered by number."""

    @abstractmethod
    def __len__(self) -> int:
        """How many rows."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of one row where it lies."""

    @abstractmethod
    def gather(self, index: Tensor) -> Tensor:
        """Rows `index` (int64, (N,)) in that order, as a new tensor of N rows."""


@final
class JoinedRows(Rows):
    """Tensors of one type and row shape, laid end to end without copying them."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        assert parts and len({(part.dtype, part.shape[1:]) for part in parts}) == 1
        self._parts = list(parts)
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def row_bytes(self) -> int:
        first = self._parts[0]
        return first.element_size() * first[0].numel()

    def gather(self, index: Tensor) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0].index_select(0, index)
        places = torch.searchsorted(self._ends, index, right=True)
        first = self._parts[0]
        rows = torch.empty((len(index), *first.shape[1:]), dtype=first.dtype)
        for place in places.unique().tolist():
            chosen = (places == place).nonzero().squeeze(1)
            begin = int(self._ends[place - 1]) if place else 0
            rows.index_copy_(0, chosen, self._parts[place].index_select(0, index[chosen] - begin))
        return rows


@final
class WindowRows(Rows):
    """Window number i is elements `offset + i * stride` and the `block - 1` after it, of rows that are single numbers."""

    def __init__(self, tokens: Rows, *, block: int, stride: int, offset: int, count: int) -> None:
        self._tokens, self._stride, self._offset, self._count = tokens, stride, offset, count
        self._within = torch.arange(block)

    def __len__(self) -> int:
        return self._count

    @property
    def row_bytes(self) -> int:
        return self._tokens.row_bytes * len(self._within)

    def gather(self, index: Tensor) -> Tensor:
        places = (self._offset + index * self._stride)[:, None] + self._within
        return self._tokens.gather(places.reshape(-1)).reshape(places.shape)
