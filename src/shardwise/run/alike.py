"""Streams that several ranks read: where they end together, and whether ranks were given the same samples."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count

import torch

from shardwise.data.batch import Batch
from shardwise.data.source import Source
from shardwise.dist.collectives import Group
from shardwise.errors import DataError

_MANY_READERS = (
    "a stream is read by every rank, and each must be given the same samples. Where a record goes to one reader only (a queue, a "
    "socket, a pipe) or the order is drawn without a seed, give Stream(make, sharded=True) and let make(rank, ranks) read a part "
    "of its own; where a file is still growing, read up to a fixed end"
)


def alike(
    batches: Generator[Batch, None, None], source: Source, world: Group, samples: Group, device: torch.device
) -> Generator[Batch, None, None]:
    """The same batches; over a stream, ranks that should read the same compare what they read. Collective, then.

    Args:
        world: all ranks.
        samples: those that share out each batch.

    Raises:
        DataError: two ranks read other samples, or one came to its end before another one.
    """
    if source.parts(1) is None or world.size == (samples.size if source.sharded else 1):
        return batches
    return _compared(batches, samples.rank if source.sharded else 0, world, device)


def next_batch(stream: Iterator[Batch], samples: Group, device: torch.device) -> Batch | None:
    """The next global batch, None at the end of the epoch, which all ranks reach at the same step."""
    batch = next(stream, None)
    if batch is None or not batch.ragged:
        return batch
    # Each rank reads its own part of a stream: only together do they know how much there is.
    total = samples.sum_(torch.tensor(batch.count, dtype=torch.int64, device=device)).item()
    return replace(batch, global_count=int(total)) if total else None


def _compared(
    batches: Generator[Batch, None, None], part: int, world: Group, device: torch.device
) -> Generator[Batch, None, None]:
    with closing(batches):
        for step in count():
            batch = next(batches, None)
            mine = torch.tensor([part, -1 if batch is None else batch.read], dtype=torch.int64, device=device)
            first: dict[int, tuple[int, int]] = {}
            for rank, (its_part, read) in enumerate(world.gather(mine, "samples of a stream").tolist()):
                reader, other = first.setdefault(its_part, (rank, read))
                if other != read:
                    raise DataError(_difference(step, reader, other, rank, read))
            if batch is None:
                return
            yield batch


def _difference(step: int, reader: int, other: int, rank: int, read: int) -> str:
    if -1 in (other, read):
        ended, goes_on = (reader, rank) if other == -1 else (rank, reader)
        return f"the stream of rank {ended} ended after {step} batches, and that of rank {goes_on} went on: {_MANY_READERS}"
    return f"rank {rank} read other samples than rank {reader} in batch {step + 1}: {_MANY_READERS}"
