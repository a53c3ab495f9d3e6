"""Source: where samples come from, and Reading: which of them one rank wants, in which order."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from shardwise.data.batch import Batch
from shardwise.data.order import epoch_order
from shardwise.errors import JobError
from shardwise.spec.shares import share_bounds


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One rank's pass over a source.

    Attributes:
        batch_size: samples of a global batch.
        start, stop: steps of the epoch, `stop` None for all.
        shares: how a global batch is divided over the ranks, None for evenly.
        training: whether transforms may use randomness; never in an evaluation.
    """

    batch_size: int
    seed: int
    epoch: int
    rank: int
    ranks: int
    start: int
    stop: int | None
    shuffle: bool
    shares: tuple[float, ...] | None
    training: bool

    def bounds(self, count: int) -> tuple[int, int, int]:
        """`(start, stop, largest)`: this rank's slice of a global batch of `count`, and the largest rank's size."""
        every = share_bounds(count, self.ranks, self.shares)
        return (*every[self.rank], max(stop - start for start, stop in every))


class Source(ABC):
    """Where the samples of one split come from."""

    @property
    @abstractmethod
    def length(self) -> int | None:
        """How many samples one epoch has; None when nobody knows before the end."""

    @property
    def sharded(self) -> bool:
        """Whether each rank reads its own part, so that ranks may run out at different times."""
        return False

    def parts(self, ranks: int) -> int | None:
        """In how many parts so many ranks read samples that come one after another; None where samples have numbers."""
        return None

    @property
    def whole(self) -> bool:
        """Whether each rank reads all samples of a global batch and keeps its own, so that more ranks read no faster."""
        return False

    @property
    def threaded(self) -> bool:
        """Whether a background thread may read ahead: only where no code of the user's with hidden state runs."""
        return False

    @abstractmethod
    def read(self, reading: Reading) -> Generator[Batch, None, None]:
        """This rank's batches in step order. Closing the generator ends everything it started."""


@final
class NoData(Source):
    """What a job has that makes its data in the loop."""

    @property
    def length(self) -> int | None:
        return None

    def read(self, reading: Reading) -> Generator[Batch, None, None]:
        raise JobError(
            "the job has no data: give data=, or let the loop make its own, `for number in run.rounds(): "
            "run.step(run.batch(inputs, targets))`"
        )


@final
@dataclass(frozen=True)
class Request:
    """The samples one rank reads for one step; a phantom reads one sample and counts none."""

    index: int
    rows: NDArray[np.int64]
    global_count: int
    largest: int
    phantom: bool

    def batch(self, inputs: Any, targets: Any) -> Batch:
        """The batch with these trees."""
        return Batch(
            inputs=inputs,
            targets=targets,
            count=0 if self.phantom else len(self.rows),
            global_count=self.global_count,
            index=self.index,
            indices=self.rows[:0] if self.phantom else self.rows,
            phantom=self.phantom,
            largest=self.largest,
        )


def requests(length: int, reading: Reading) -> Iterator[Request]:
    """What one rank reads, step by step, of a source that can be indexed: global batch s is order[s*B : (s+1)*B]."""
    order = epoch_order(length, seed=reading.seed, epoch=reading.epoch, shuffle=reading.shuffle)
    size = reading.batch_size
    steps = -(-length // size)
    full = reading.bounds(size)
    for step in range(reading.start, steps if reading.stop is None else min(steps, reading.stop)):
        rows = order[step * size : (step + 1) * size]
        start, stop, largest = full if len(rows) == size else reading.bounds(len(rows))
        phantom = start == stop
        mine = rows[:1] if phantom else rows[start:stop]
        yield Request(step, mine, len(rows), largest, phantom)
