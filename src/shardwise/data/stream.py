"""Stream: samples that come one after another, with or without a known number."""

import hashlib
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any, final

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from shardwise.data.batch import Batch, as_pair, tree_leaves
from shardwise.data.randomness import fenced, generator_states, seed_generators, set_generator_states
from shardwise.data.reading import Reading, Source
from shardwise.data.samples import Collate, check_workers, stop_workers, worker_generator
from shardwise.errors import DataError, JobError

CHUNK = 16  # samples that a worker process sends at a time
_LOOKED_AT = (0.0, 0.3, 0.7, 1.0)  # places in a batch, of the samples by which two readers are told apart


@final
class Stream(Source):
    """Samples of an iterable, in its own order, which is never shuffled here.

    By default every rank reads the same stream and keeps its slice of each global batch, which equals the serial run
    whatever the number of ranks. With `sharded`, each rank reads its own part and nothing is read twice; the ranks then
    make up a global batch out of their parts, so that its samples depend on their number, and may run out at different
    times: one that did takes part with no samples until all have.

    While the stream runs in the training process, the global generators of Python, NumPy and torch are its own, seeded
    from (seed, epoch): a stream that shuffles through them does the same on every rank.

    Args:
        source: an iterable that starts over for every epoch (a torch `IterableDataset`, a list), or a function that
            returns the samples: `source()`, or `source(rank, ranks)` when sharded. A function with an argument `epoch`
            is given that too, by name.
        sharded: each rank reads its own part.
        length: samples of an epoch over all ranks, when it is known; checked where one rank sees the whole stream.
        loader_workers: processes of each rank that read ahead. More than one divide the stream: a function is called as
            `source(part, parts)` in each; an `IterableDataset` divides itself by `torch.utils.data.get_worker_info()`.
        collate: list of samples -> batch; None is torch's `default_collate`.

    Raises:
        JobError: a generator object (it can be read only once), or a plain iterable with more than one worker.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[..., Iterable[Any]],
        sharded: bool = False,
        length: int | None = None,
        loader_workers: int = 0,
        collate: Collate | None = None,
    ) -> None:
        check_workers(loader_workers)
        if length is not None and length < 0:
            raise JobError(f"length is {length}: give a whole number of at least 0, or None when it is unknown")
        iterable = isinstance(source, Iterable)
        if not iterable and not callable(source):
            raise JobError(f"Stream was given a {type(source).__name__}: give an iterable or a function returning one")
        if iterable and isinstance(source, Iterator):
            raise JobError(
                f"Stream was given a {type(source).__name__}, which is used up after one epoch: give its function"
            )
        if iterable and loader_workers > 1 and not isinstance(source, IterableDataset):
            raise JobError(
                f"loader_workers={loader_workers} would read a plain iterable {loader_workers} times: use 1, or give a "
                "function (part, parts) -> samples of that part"
            )
        self._source = source
        self._parted = not iterable and (sharded or loader_workers > 1)
        self._takes_epoch = not iterable and "epoch" in _names(source)
        self._sharded = sharded
        self._length = length
        self.loader_workers = loader_workers
        self._collate = default_collate if collate is None else collate

    @property
    def length(self) -> int | None:
        return self._length

    @property
    def sharded(self) -> bool:
        return self._sharded

    def parts(self, ranks: int) -> int | None:
        return max(1, self.loader_workers) * (ranks if self._sharded else 1)

    @property
    def whole(self) -> bool:
        return not self._sharded

    def open(self, epoch: int, part: int, parts: int) -> Iterator[Any]:
        """The samples of one part of the stream."""
        if isinstance(self._source, Iterable):
            return iter(self._source)
        named = {"epoch": epoch} if self._takes_epoch else {}
        return iter(self._source(part, parts, **named) if self._parted else self._source(**named))

    def read(self, reading: Reading) -> Generator[Batch, None, None]:
        ragged = self._sharded and reading.ranks > 1
        samples = self._in_workers(reading) if self.loader_workers else self._fenced(reading)
        try:
            if ragged:
                yield from self._parts(samples, reading)
            else:
                yield from self._slices(samples, reading)
        finally:
            samples.close()

    def _slices(self, samples: "_Puller", reading: Reading) -> Iterator[Batch]:
        """Every rank reads the whole global batch and keeps its slice."""
        size, step = reading.batch_size, reading.start
        seen = len(samples.send((size * step, True)))
        ended = seen < size * step
        self._check_length(seen, ended)
        while not ended and (reading.stop is None or step < reading.stop):
            group = samples.send((size, False))
            seen += len(group)
            ended = len(group) < size
            self._check_length(seen, ended)
            if not group:
                break
            start, stop, largest = reading.bounds(len(group))
            phantom = start == stop
            inputs, targets = self._pair(group[:1] if phantom else group[start:stop])
            yield Batch(
                inputs=inputs,
                targets=targets,
                count=stop - start,
                global_count=len(group),
                index=step,
                phantom=phantom,
                largest=largest,
                read=_read(group),
            )
            step += 1

    def _parts(self, samples: "_Puller", reading: Reading) -> Iterator[Batch]:
        """Each rank reads its own part; one that ran out repeats a sample it knows as phantoms, without end."""
        start, stop, largest = reading.bounds(reading.batch_size)
        size = stop - start
        if size == 0:
            raise JobError(
                f"a global batch of {reading.batch_size} leaves rank {reading.rank} of {reading.ranks} without "
                "samples: a sharded stream needs a batch_size that gives every rank at least one"
            )
        skipped = samples.send((size * reading.start, True))
        known: list[Any] = skipped[-1:]
        step = reading.start
        while reading.stop is None or step < reading.stop:
            group = samples.send((size, False))
            known = group[:1] or known
            if not known:
                raise DataError(
                    f"the part of rank {reading.rank} of {reading.ranks} of a sharded stream is empty: every rank "
                    "needs at least one sample; use fewer ranks, or sharded=False"
                )
            inputs, targets = self._pair(group or known)
            yield Batch(
                inputs=inputs,
                targets=targets,
                count=len(group),
                global_count=-1,
                index=step,
                phantom=not group,
                largest=largest,
                ragged=True,
                read=_read(group),
            )
            step += 1

    def _pair(self, group: list[Any]) -> tuple[Any, Any]:
        with fenced():
            return as_pair(self._collate(group))

    def _check_length(self, seen: int, ended: bool) -> None:
        if self._length is None or seen == self._length or (not ended and seen < self._length):
            return
        order = "only" if seen < self._length else "at least"
        raise DataError(
            f"a stream with length={self._length} gave {order} {seen} samples: correct the length, or leave it out"
        )

    def _fenced(self, reading: Reading) -> "_Puller":
        with fenced():
            seed_generators(reading.seed, reading.epoch, *_rank_word(self._sharded, reading))
            own = generator_states()
        part = (reading.rank, reading.ranks) if self._sharded else (0, 1)
        return _started(_pull_fenced(lambda: self.open(reading.epoch, *part), own))

    def _in_workers(self, reading: Reading) -> "_Puller":
        loader = DataLoader(
            _Chunks(self, reading),
            batch_size=None,
            num_workers=self.loader_workers,
            collate_fn=_as_it_is,
            generator=worker_generator(reading),
        )
        return _started(_pull_workers(loader))


_Puller = Generator[list[Any], tuple[int, bool], None]
"""Send `(count, skip)`, get a list of the next `count` samples, shorter at the end. With skip only the last is real."""


def _started(puller: _Puller) -> _Puller:
    next(puller)
    return puller


def _take(samples: Iterator[Any], count: int, skip: bool) -> list[Any]:
    if not skip:
        return list(islice(samples, count))
    seen, last = 0, None
    for sample in islice(samples, count):
        seen, last = seen + 1, sample
    return [None] * (seen - 1) + [last] * (seen > 0)


def _pull_fenced(open_samples: Callable[[], Iterator[Any]], own: Any) -> _Puller:
    """Pull in this process; the global generators are the stream's while it runs, the training's otherwise."""
    count, skip = yield []
    with fenced():
        set_generator_states(own)
        samples = open_samples()
        own = generator_states()
    while True:
        with fenced():
            set_generator_states(own)
            group = _take(samples, count, skip)
            own = generator_states()
        count, skip = yield group


def _pull_workers(loader: "DataLoader[Any]") -> _Puller:
    chunks = iter(loader)
    samples = (sample for chunk in chunks for sample in chunk)
    try:
        count, skip = yield []
        while True:
            count, skip = yield _take(samples, count, skip)
    finally:
        stop_workers(chunks)


@final
class _Chunks(IterableDataset[list[Any]]):
    """What runs in a worker process: this worker's part of the stream, a few samples at a time."""

    def __init__(self, stream: Stream, reading: Reading) -> None:
        self._stream, self._reading = stream, reading

    def __iter__(self) -> Iterator[list[Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rank, ranks = (self._reading.rank, self._reading.ranks) if self._stream.sharded else (0, 1)
        words = _rank_word(self._stream.sharded, self._reading)
        # one worker draws what no worker would
        seed_generators(self._reading.seed, self._reading.epoch, *words, *([worker] if workers > 1 else []))
        samples = self._stream.open(self._reading.epoch, rank * workers + worker, ranks * workers)
        while chunk := list(islice(samples, CHUNK)):
            yield chunk


def _rank_word(sharded: bool, reading: Reading) -> tuple[int, ...]:
    return (reading.rank,) if sharded and reading.ranks > 1 else ()


def _read(group: list[Any]) -> int:
    """A digest of some of the samples: enough to tell whether another reader was given the same ones."""
    hashed = hashlib.blake2b(len(group).to_bytes(8, "little"), digest_size=7)
    for place in {round(part * (len(group) - 1)) for part in _LOOKED_AT} if group else ():
        for leaf in tree_leaves(group[place]):
            hashed.update(_some_bytes(leaf))
    return int.from_bytes(hashed.digest(), "little")


def _some_bytes(leaf: Any) -> bytes:
    if isinstance(leaf, torch.Tensor):
        leaf = leaf.detach().reshape(-1)
        return repr([*leaf[:8].tolist(), *leaf[-8:].tolist()]).encode()
    if isinstance(leaf, np.ndarray):
        leaf = leaf.reshape(-1)
        return repr([*leaf[:8].tolist(), *leaf[-8:].tolist()]).encode()
    return repr(leaf).encode() if isinstance(leaf, str | bytes | int | float | np.generic) else b"?"


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _names(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()
