"""Samples: any map-style torch Dataset, one sample at a time, through the workers of torch's DataLoader."""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from shardwise.data.batch import Batch, as_pair
from shardwise.data.order import stream_key
from shardwise.data.randomness import BatchRandom, fenced, seed_generators
from shardwise.data.reading import Reading, Request, Source, requests
from shardwise.data.transforms import Transform, as_transform
from shardwise.errors import DataError, JobError, UserError

Collate = Callable[[list[Any]], Any]
_WORKER_STREAM = 4


@final
class Samples(Source):
    """Samples of a map-style data set: anything with `dataset[i]` and `len(dataset)`.

    A sample is `(inputs, targets)`, or a dict or tensor without targets. Before a sample is read, the global
    generators of Python, NumPy and torch are seeded from (seed, epoch, sample index), so that the augmentations of an
    existing data set draw the same numbers under every layout and number of workers.

    Args:
        dataset: the data set.
        loader_workers: processes of each rank that read ahead; 0 reads in the training process, when a batch is asked
            for.
        collate: list of samples -> batch; None is torch's `default_collate`.
        transform: whole-batch transform of what `collate` gave, see `shardwise.data.transforms`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        loader_workers: int = 0,
        collate: Collate | None = None,
        transform: Transform | None = None,
    ) -> None:
        check_workers(loader_workers)
        try:
            self._length = len(dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError) as error:
            raise JobError(
                f"{type(dataset).__name__} has no length: Samples needs len(dataset) and dataset[i]; use Stream for an "
                "iterable"
            ) from error
        self.dataset = dataset
        self.loader_workers = loader_workers
        self._collate = default_collate if collate is None else collate
        self._transform = None if transform is None else as_transform(transform)

    @property
    def length(self) -> int:
        return self._length

    def choose(self, dataset: Dataset[Any]) -> "Samples":
        """The source of another data set, such as a part of this one, read and transformed in the same way."""
        return Samples(dataset, self.loader_workers, self._collate, self._transform)

    def _batch(self, request: Request, collated: Any, reading: Reading) -> Batch:
        inputs, targets = as_pair(collated)
        if self._transform is not None:
            random = BatchRandom(reading.seed, reading.epoch, request.rows) if reading.training else None
            inputs, targets = self._transform(inputs, targets, random)
        return request.batch(inputs, targets)

    def read(self, reading: Reading) -> Generator[Batch, None, None]:
        seeded = _Seeded(self.dataset, reading.seed, reading.epoch)
        wanted = requests(self._length, reading)
        if self.loader_workers == 0:
            for request in wanted:
                with fenced():
                    collated = self._collate([seeded[int(row)] for row in request.rows])
                yield self._batch(request, collated, reading)
            return
        # the loader asks for requests ahead of the batches it gives back, in the same order
        asked: list[Request] = []
        loader = DataLoader(
            _Told(seeded),
            batch_sampler=_Rows(wanted, asked),
            num_workers=self.loader_workers,
            collate_fn=functools.partial(_collate_told, self._collate),
            generator=worker_generator(reading),
        )
        collated_batches = iter(loader)
        try:
            for collated in collated_batches:
                if isinstance(collated, _Refusal):
                    raise collated.error
                yield self._batch(asked.pop(0), collated, reading)
        finally:
            stop_workers(collated_batches)


def check_workers(loader_workers: int) -> None:
    """Raises JobError unless it is a number of processes."""
    if not isinstance(loader_workers, int) or loader_workers < 0:
        raise JobError(f"loader_workers is {loader_workers!r}: give a whole number of at least 0")


def worker_generator(reading: Reading) -> torch.Generator:
    """What the loader seeds its workers from, instead of drawing from the training's own generator."""
    key = stream_key(_WORKER_STREAM, reading.seed, reading.epoch)
    return torch.Generator().manual_seed(key & 0x7FFFFFFFFFFFFFFF)


def stop_workers(iterator: Any) -> None:
    """End the worker processes of a DataLoader iterator now, rather than when it is collected."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()


@final
class _Seeded(Dataset[Any]):
    """The data set, with the global generators seeded before every sample. Call it inside `fenced` or in a worker."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        seed_generators(self._seed, self._epoch, index)
        try:
            sample = self._dataset[index]
        except UserError:
            raise
        except Exception as error:
            # add_note, which Python 3.10 does not have
            error.__notes__ = [*getattr(error, "__notes__", []), f"in sample {index} of {self._name()}"]
            raise
        if sample is None:
            raise DataError(
                f"sample {index} of {self._name()} is None: every sample counts in its global batch, so none can be left out "
                "while it is read; leave it out before, with torch.utils.data.Subset(dataset, indices)"
            )
        return sample

    def _name(self) -> str:
        return f"the data set {type(self._dataset).__name__}"


@final
class _Refusal:
    """What is wrong with a sample, on its way from a worker: an exception would arrive with the worker's whole traceback."""

    def __init__(self, error: UserError) -> None:
        self.error = error


@final
class _Told(Dataset[Any]):
    """The data set in a worker, where what is wrong with a sample takes its place."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except UserError as error:
            return _Refusal(error)


def _collate_told(collate: Collate, samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, _Refusal)), None) or collate(samples)


@final
class _Rows(Iterable[list[int]]):
    """The rows of each request as a batch sampler wants them, remembering the requests."""

    def __init__(self, wanted: Iterator[Request], asked: list[Request]) -> None:
        self._wanted, self._asked = wanted, asked

    def __iter__(self) -> Iterator[list[int]]:
        for request in self._wanted:
            self._asked.append(request)
            yield request.rows.tolist()
