"""What a loop of the user's goes over: batches that say how many there are, where that is known."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import final

from shardwise.data.batch import Batch


@final
class Batches(Iterator[Batch]):
    """An iterator over batches. `len` is their number in all, also of those given already, so that bars show a total."""

    def __init__(self, batches: Generator[Batch, None, None], total: int | None) -> None:
        self._batches, self._total = batches, total

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __len__(self) -> int:
        if self._total is None:
            raise TypeError("the number of batches is not known: the data is a stream, or the loop has no end")
        return self._total

    def close(self) -> None:
        """End the loop here."""
        self._batches.close()


def batches_left(*, each: int | None, epochs: int | None, batch: int, steps_left: int | None) -> int | None:
    """How many batches a loop will give; None where nobody knows.

    Args:
        each: batches of one epoch; None for a stream.
        epochs: epochs to go, with the one that is under way; None for no limit.
        batch: batches of that epoch that are over.
        steps_left: steps after which the loop ends; None for no limit.
    """
    by_epochs = None if each is None or epochs is None else max(0, epochs * each - batch)
    if by_epochs is None or steps_left is None:
        # Of a stream with a limit in epochs too, it is not known which limit comes first.
        return by_epochs if steps_left is None else (None if epochs is not None else max(0, steps_left))
    return min(by_epochs, max(0, steps_left))
