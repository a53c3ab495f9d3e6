"""Is a sample the same whichever others it is read with? Where a transform, a collate function or a data set mixes samples, or
draws random numbers by itself, another number of workers and a resumed run train on other samples.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from shardwise.data.batch import tree_leaves
from shardwise.data.randomness import fenced
from shardwise.data.reading import Reading
from shardwise.data.source import Source, Splits
from shardwise.spec.job import Job

SAMPLES = 8
"""Samples that are read at once, and the second half of them by itself: a random order of them is seen but once in thousands."""


def look_at_samples(job: Job, splits: Splits) -> tuple[str, ...]:
    """What to know of data whose samples depend on how they are read, one sentence for each split.

    Data without a length is not read for it, because what was read may be gone.
    """
    splits_by_name = {"training": splits.train, "test": splits.test}
    return tuple(
        f"the {name} data gives other samples when a batch is divided in another way or read again: a transform, a collate "
        f"function or the data set mixes samples, or draws random numbers by itself. {consequence}"
        for name, consequence in _CONSEQUENCES.items()
        if (source := splits_by_name[name]) is not None and _depends(job, source, training=name == "training")
    )


_CONSEQUENCES = {
    "training": "Another number of workers and a resumed run train on other samples; a transform's argument `random` draws "
    "the same for each sample and epoch",
    "test": "The metrics depend on the number of workers",
}


def _depends(job: Job, source: Source, *, training: bool) -> bool:
    if source.length is None or source.length < SAMPLES or source.sharded or source.parts(2) is not None:
        return False
    try:
        whole, half = _read(job, source, 0, 1, training), _read(job, source, 1, 2, training)
        return any(not _same(one[SAMPLES // 2 :], other) for one, other in zip(whole, half, strict=True))
    except Exception:  # noqa: BLE001  # anything can go wrong in it, and will again where it is told better
        return False


def _read(job: Job, source: Source, rank: int, ranks: int, training: bool) -> list[Any]:
    """The tensors of this rank's part of the first batch."""
    reading = Reading(
        batch_size=SAMPLES,
        seed=job.seed,
        epoch=0,
        rank=rank,
        ranks=ranks,
        start=0,
        stop=1,
        shuffle=job.shuffle and training,
        shares=None,
        training=training,
    )
    with fenced(), closing(source.read(reading)) as stream:
        batch = next(stream)
        return tree_leaves(batch.inputs) + tree_leaves(batch.targets)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding; rows that were padded to the longest of their batch cannot be compared."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
