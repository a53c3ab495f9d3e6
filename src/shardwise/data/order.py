"""The order of the samples: pure functions of (seed, epoch), needing numpy alone.

Every random number of this room comes from one counter-based hash, the finaliser of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with Stafford's variant-13 constants). It is
64-bit integer arithmetic that wraps, so it gives the same bits with every numpy version and on every platform, and
needs no state: number k of a stream can be had without the numbers before it.
"""

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import JobError

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
