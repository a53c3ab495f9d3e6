"""Which tokens of a sequence a rank of the context axis holds.

A sequence of T tokens is cut into 2P chunks for P ranks; rank r holds chunks r and 2P - 1 - r. With causal attention the
last tokens look at everything and the first at nothing, so a pair of an early and a late chunk is the same work for every
rank (Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from shardwise.errors import PlanError

Span = tuple[int, int]
"""[start, stop) in a sequence."""


@final
@dataclass(frozen=True)
class Part:
    """One rank's tokens of sequences of one length.

    Attributes:
        length: T, tokens of the whole sequence.
        degree: P, ranks that share it.
        rank: which of them.
    """

    length: int
    degree: int
    rank: int

    def __post_init__(self) -> None:
        if self.length < self.degree:
            raise PlanError(
                f"sequences of {self.length} tokens (dim 1 of the inputs) over context={self.degree}: some would have none; "
                f"use at most context={self.length}, or data instead"
            )

    @property
    def spans(self) -> tuple[Span, ...]:
        """Where this rank's tokens are, in order; one or two stretches."""
        return _spans(self.length, self.degree)[self.rank]

    @property
    def own(self) -> int:
        """Tokens of this rank."""
        return self.counts[self.rank]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of every rank."""
        return tuple(sum(stop - start for start, stop in spans) for spans in _spans(self.length, self.degree))

    @property
    def share(self) -> float:
        """This rank's fraction of the tokens."""
        return self.own / self.length

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's tokens of a tensor that has T of them along `dim`."""
        pieces = [tensor.narrow(dim, start, stop - start) for start, stop in self.spans]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def by_rank(length: int, degree: int, device: torch.device) -> Tensor:
    """Tokens (T,) in the order rank 0's, rank 1's, ...: index a whole sequence with it to send each rank its part."""
    return _indices(length, degree, device)[0]


def in_order(length: int, degree: int, device: torch.device) -> Tensor:
    """Rows (T,) to take from all ranks' parts, each padded to the longest, to have the whole sequence."""
    return _indices(length, degree, device)[1]


@lru_cache(maxsize=64)
def _spans(length: int, degree: int) -> tuple[tuple[Span, ...], ...]:
    base, more = divmod(length, 2 * degree)
    sizes = [base + (chunk < more) for chunk in range(2 * degree)]
    ends = [sum(sizes[: chunk + 1]) for chunk in range(2 * degree)]
    chunks = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return tuple(_joined(chunks[rank], chunks[2 * degree - 1 - rank]) for rank in range(degree))


def _joined(first: Span, second: Span) -> tuple[Span, ...]:
    if second[0] == second[1]:
        return (first,)
    return ((first[0], second[1]),) if first[1] == second[0] else (first, second)


@lru_cache(maxsize=64)
def _indices(length: int, degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = [[t for start, stop in spans for t in range(start, stop)] for spans in _spans(length, degree)]
    longest = max(len(part) for part in tokens)
    rows = [0] * length
    for rank, part in enumerate(tokens):
        for place, token in enumerate(part):
            rows[token] = rank * longest + place
    flat = [token for part in tokens for token in part]
    # Not an inference tensor, even where the first use is inside an evaluation.
    with torch.inference_mode(False):
        return torch.tensor(flat, device=device), torch.tensor(rows, device=device)
