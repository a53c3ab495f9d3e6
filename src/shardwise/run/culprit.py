"""Which samples made a step fail, or its loss no finite number: what the message of torch leaves out."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from shardwise.data.batch import Batch, tree_leaves
from shardwise.data.loader import batches, steps_per_epoch
from shardwise.data.source import Splits
from shardwise.errors import ShardwiseError
from shardwise.run.failure import is_own_error
from shardwise.run.rehearse import described
from shardwise.spec.job import Job

NAMED = 5
"""Samples that a message lists."""


def note_batch(error: Exception, batch: Batch, step: int) -> None:
    """Add to an error of the job's own functions what they were given, as a note below its message."""
    if isinstance(error, ShardwiseError) or not is_own_error(error):
        return
    lines = [f"in step {step + 1}, given inputs {described(batch.inputs)}; targets {described(batch.targets)}"]
    if isinstance(error, IndexError) and isinstance(batch.targets, Tensor) and batch.targets.dtype == torch.int64:
        rows = batch.targets.reshape(len(batch.targets), -1)
        largest = int(rows.max())
        where = "" if batch.indices is None else f", first of sample {batch.indices[int(rows.amax(1).argmax())]}"
        lines.append(
            f"the largest target is {largest}{where}: classes are numbered from 0, so {largest + 1} outputs would be needed"
        )
    elif batch.indices is not None and batch.count:
        lines.append(f"{_list(batch.indices.tolist())} of the training data")
    # add_note, which Python 3.10 does not have
    error.__notes__ = [*getattr(error, "__notes__", []), *lines]


def not_finite(job: Job, splits: Splits, step: int) -> str:
    """Which samples of a step hold nan or infinity, one sentence part; "" where none does or it cannot be told.

    Reads the global batch again: only where the data can be indexed, and gives the same again.
    """
    each = steps_per_epoch(splits.train, job.batch_size)
    if each is None:
        return ""
    epoch, index = divmod(step, each)
    stream = batches(
        splits.train,
        batch_size=job.batch_size,
        seed=job.seed,
        epoch=epoch,
        start=index,
        stop=index + 1,
        shuffle=job.shuffle,
        prefetch=0,
    )
    try:
        with torch.random.fork_rng(devices=[]), closing(stream):
            batch = next(stream)
    except Exception:  # noqa: BLE001  # it is told on the way to something else
        return ""
    bad: set[int] = set()
    places = []
    for name, tree in (("inputs", batch.inputs), ("targets", batch.targets)):
        rows = {row for leaf in tree_leaves(tree) for row in _bad_rows(leaf)}
        if rows:
            places.append(name)
            bad |= rows
    if not bad or batch.indices is None:
        return ""
    samples = sorted(int(batch.indices[row]) for row in bad)
    return f"the {' and '.join(places)} of {_list(samples)} of the training data hold nan or infinity"


def _bad_rows(leaf: Any) -> list[int]:
    if not isinstance(leaf, Tensor) or not leaf.dim() or not (leaf.is_floating_point() or leaf.is_complex()):
        return []
    good = torch.isfinite(leaf).reshape(leaf.shape[0], -1).all(1)
    return [int(row) for row in (~good).nonzero().flatten()]


def _list(samples: list[int]) -> str:
    shown = ", ".join(map(str, samples[:NAMED]))
    return f"{'sample' if len(samples) == 1 else 'samples'} {shown}" + (
        f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
    )
