"""Batches of one rank, read ahead of the step where that pays."""

import threading
from collections.abc import Generator, Sequence
from queue import SimpleQueue
from typing import final

from shardwise.data.batch import Batch
from shardwise.data.reading import Reading, Source
from shardwise.errors import JobError


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    ranks: int = 1,
    start: int = 0,
    stop: int | None = None,
    shuffle: bool = True,
    shares: Sequence[float] | None = None,
    prefetch: int = 2,
    device_pin: bool = False,
) -> Generator[Batch, None, None]:
    """This rank's training batches of one epoch, in step order.

    Global batch s of an epoch is `order[s*B : (s+1)*B]` of `epoch_order`, the last one short where B does not divide
    the length; ranks take the slices of `share_bounds`. Over a sharded stream with more than one rank the batches are
    `ragged` (see `Batch`) and never end by themselves: stop when the counts of all ranks add up to 0.

    Args:
        batch_size: samples of a global batch, over all ranks.
        start, stop: steps of the epoch; what came before `start` is not read, where the source can be indexed.
        shares: how each global batch is divided, one number a rank; None for evenly.
        prefetch: batches read ahead by one background thread; 0 reads each when it is asked for. Data sets and streams
            are never read in a thread: their code may draw from the generators the training uses. Give them
            `loader_workers`, which read ahead in processes.
        device_pin: put batches into page-locked memory.

    Close the generator (or use it up) to end the thread and the workers it started.

    Raises:
        JobError: contradicting arguments, here; data errors come out of the iteration with their own traceback.
    """
    reading = _reading(batch_size, seed, epoch, rank, ranks, start, stop, shuffle, shares, training=True)
    return _open(source, reading, prefetch, device_pin)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    start: int = 0,
    stop: int | None = None,
    shares: Sequence[float] | None = None,
    prefetch: int = 2,
    device_pin: bool = False,
) -> Generator[Batch, None, None]:
    """This rank's evaluation batches: every sample exactly once over all ranks, in the order of the source, without
    random transforms. Arguments, phantoms and ragged sources as in `batches`."""
    reading = _reading(batch_size, 0, 0, rank, ranks, start, stop, False, shares, training=False)
    return _open(source, reading, prefetch, device_pin)


def steps_per_epoch(source: Source, batch_size: int) -> int | None:
    """Optimizer steps of one epoch, the short last one included; None when only reading it can tell."""
    if source.sharded or source.length is None:
        return None
    return -(-source.length // batch_size)


def _reading(
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int,
    ranks: int,
    start: int,
    stop: int | None,
    shuffle: bool,
    shares: Sequence[float] | None,
    *,
    training: bool,
) -> Reading:
    if batch_size < 1:
        raise JobError(f"batch_size is {batch_size}: give a whole number of at least 1")
    if not 0 <= rank < ranks:
        raise JobError(f"rank {rank} of {ranks}: the rank must be at least 0 and below the number of ranks")
    if start < 0 or (stop is not None and stop < start):
        raise JobError(f"steps {start} to {stop}: give 0 <= start <= stop")
    reading = Reading(
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        rank=rank,
        ranks=ranks,
        start=start,
        stop=stop,
        shuffle=shuffle,
        shares=None if shares is None else tuple(shares),
        training=training,
    )
    reading.bounds(batch_size)  # raises here, not in the first step, when the shares are wrong
    return reading


def _open(source: Source, reading: Reading, prefetch: int, device_pin: bool) -> Generator[Batch, None, None]:
    if source.length == 0:
        raise JobError("the data set has no samples: there is nothing to train or evaluate on")
    stream = source.read(reading)
    if device_pin:
        stream = _pinned(stream)
    return _ahead(stream, prefetch) if prefetch > 0 and source.threaded else stream


def _pinned(stream: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    try:
        for batch in stream:
            yield batch.pin()
    finally:
        stream.close()


@final
class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _ahead(stream: Generator[Batch, None, None], depth: int) -> Generator[Batch, None, None]:
    """The same batches, read by a thread that is at most `depth` batches ahead."""
    ready: SimpleQueue[Batch | _Failure | None] = SimpleQueue()
    room = threading.Semaphore(depth)
    closed = threading.Event()

    def produce() -> None:
        try:
            for batch in stream:
                room.acquire()
                if closed.is_set():
                    return
                ready.put(batch)
            ready.put(None)
        except BaseException as error:  # noqa: BLE001  the consumer raises it, whatever it is
            ready.put(_Failure(error))
        finally:
            stream.close()

    thread = threading.Thread(target=produce, name="shardwise-prefetch", daemon=True)
    thread.start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, _Failure):
                raise batch.error
            room.release()
            yield batch
    finally:
        closed.set()
        room.release()
        thread.join()
