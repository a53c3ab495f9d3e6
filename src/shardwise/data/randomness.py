"""Randomness that does not depend on the layout: per-sample random numbers, and fenced generators for user code."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwise.data.order import GOLDEN, hashed, mix, stream_key
from shardwise.errors import JobError

_TRANSFORM_STREAM = 2
_SAMPLE_STREAM = 3
_LOOP_STREAM = 4


@final
class BatchRandom:
    """Random numbers for a batch of samples, each a pure function of (seed, epoch, global sample index, draw).

    Which rank holds a sample, and with which others, cannot change its numbers. The draw counts the calls, so a
    transform must make the same calls for every batch: draw for all samples and use what is needed.
    """

    def __init__(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> None:
        """`indices`: the global sample index of each sample, int64 (N,)."""
        self._key = stream_key(_TRANSFORM_STREAM, seed, epoch)
        self._counters = indices.astype(np.uint64)
        self._draw = 0

    def __len__(self) -> int:
        return len(self._counters)

    def _words(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        self._draw += 1
        words = hashed(stream_key(self._key, self._draw), self._counters)
        if not shape:
            return words
        places = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(GOLDEN)
        return mix(words[:, None] + places).reshape(len(words), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), multiples of 2**-24; float32 of shape (N, *shape)."""
        return torch.from_numpy((self._words(shape) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high), int64 of shape (N, *shape); biased by less than (high - low) / 2**32."""
        span = high - low
        if not 0 < span < 1 << 32:
            raise JobError(f"integers({low}, {high}): high must be above low, by less than 2**32")
        words = self._words(shape)
        return torch.from_numpy((((words >> np.uint64(32)) * np.uint64(span)) >> np.uint64(32)).astype(np.int64) + low)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal (Box and Muller), float32 of shape (N, *shape); platforms may differ in the last bit."""
        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(*shape).double()))
        return (radius * torch.cos(2.0 * torch.pi * self.uniform(*shape).double())).float()


def loop_random(seed: int, *place: int, indices: NDArray[np.int64]) -> BatchRandom:
    """Random numbers for what a loop of the user's own makes.

    Args:
        place: whole numbers >= 0 that say where in the loop they are drawn.
        indices: the number of each sample, or of what else there are many of, int64 (N,).
    """
    return BatchRandom(stream_key(_LOOP_STREAM, seed), stream_key(*place), indices)


def seed_generators(*words: int) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU) from whole numbers >= 0.

    Per-sample augmentations of existing data sets draw from these generators: their numbers then depend on `words` alone.
    """
    key = stream_key(_SAMPLE_STREAM, *words)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002  the legacy global generator is the one that augmentations use
    torch.default_generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)


@contextmanager
def fenced() -> Iterator[None]:
    """Put the global generators of Python, NumPy and torch (CPU) back to where they were before the block."""
    before = generator_states()
    try:
        yield
    finally:
        set_generator_states(before)


def generator_states() -> tuple[Any, Any, Tensor]:
    """The states of the global generators of Python, NumPy and torch (CPU)."""
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002


def set_generator_states(states: tuple[Any, Any, Tensor]) -> None:
    """Undo what happened to the global generators since `generator_states`."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.default_generator.set_state(states[2])
