"""The order of the samples and each rank's slice of it: pure functions of (seed, epoch), needing numpy alone.

Every random number of this room comes from one counter-based hash, the finaliser of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with Stafford's variant-13 constants). It is
64-bit integer arithmetic that wraps, so it gives the same bits with every numpy version and on every platform, and
needs no state: number k of a stream can be had without the numbers before it.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import JobError, PlanError

GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_ORDER_STREAM = 1  # keeps the sample order apart from every other use of the same seed


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser of each value, in place: a bijection on 64-bit words. `values`: any shape, uint64."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def mix_word(value: int) -> int:
    """`mix` of one Python integer (taken modulo 2**64)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_key(*words: int) -> int:
    """One 64-bit key from a sequence of whole numbers >= 0 of any size; other words give an unrelated key."""
    key = len(words)
    for word in words:
        if word < 0:
            raise JobError(f"a seed, epoch or index of {word} was given: give a whole number of at least 0")
        key = mix_word(key + GOLDEN)
        while True:  # words beyond 64 bits are absorbed 64 bits at a time
            key = mix_word((key ^ (word & _MASK)) + GOLDEN)
            word >>= 64
            if not word:
                break
    return key


def hashed(key: int, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Random 64-bit word number `counters` of the stream `key`; same shape. Distinct counters give distinct words."""
    return mix(counters * np.uint64(GOLDEN) + np.uint64(key & _MASK))


def epoch_order(length: int, *, seed: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]:
    """The samples of one epoch in training order: a permutation of `range(length)`, int64, of shape (length,).

    A pure function of its arguments, the same with every numpy version and on every platform: samples are sorted by
    the hash of their index. The hash is a bijection, so no two keys are equal and the kind of sort cannot matter.
    """
    if length < 0:
        raise JobError(f"a data set of {length} samples: the length must be at least 0")
    if not shuffle:
        return np.arange(length, dtype=np.int64)
    keys = hashed(stream_key(_ORDER_STREAM, seed, epoch), np.arange(length, dtype=np.uint64))
    return np.argsort(keys).astype(np.int64, copy=False)


def share_bounds(count: int, parts: int, shares: Sequence[float] | None = None) -> list[tuple[int, int]]:
    """Contiguous `[start, stop)` of `count` samples for each of `parts` ranks; together they cover it exactly once.

    Without `shares` the sizes differ by at most one, larger ones first. With `shares` (one number >= 0 a rank, in any
    unit) sizes are proportional by the method of largest remainders, in exact arithmetic, so that every rank computes
    the same answer; ties go to the lower rank. A size may be 0.

    Raises:
        PlanError: no ranks, or shares that are not one finite number >= 0 a rank with a sum above 0.
    """
    if parts < 1 or count < 0:
        raise PlanError(f"{count} samples over {parts} ranks: there must be at least 1 rank and 0 samples")
    if shares is None:
        base, more = divmod(count, parts)
        sizes = [base + (rank < more) for rank in range(parts)]
    else:
        sizes = _largest_remainder(count, parts, shares)
    bounds, start = [], 0
    for size in sizes:
        bounds.append((start, start + size))
        start += size
    return bounds


def _largest_remainder(count: int, parts: int, shares: Sequence[float]) -> list[int]:
    if len(shares) != parts:
        raise PlanError(f"{len(shares)} shares for {parts} ranks: give one number a rank")
    if not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
        raise PlanError(f"shares are {list(shares)!r}: give finite numbers of at least 0, not all of them 0")
    exact = [Fraction(share) for share in shares]
    scale = Fraction(count) / sum(exact)
    sizes = [int(share * scale) for share in exact]
    by_remainder = sorted(range(parts), key=lambda rank: (sizes[rank] - exact[rank] * scale, rank))
    for rank in by_remainder[: count - sum(sizes)]:
        sizes[rank] += 1
    return sizes
