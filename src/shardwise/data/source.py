"""Splits: the training and test data of a job, and what may be given instead of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from shardwise.data.gather import Arrays
from shardwise.data.reading import Source
from shardwise.data.samples import Samples
from shardwise.data.stream import Stream
from shardwise.errors import JobError

__all__ = ["Arrays", "Samples", "Source", "Splits", "Stream", "as_splits"]

_ACCEPTED = (
    "give a Splits, a source (Arrays, Samples, Stream), (inputs, targets) arrays, a torch Dataset or IterableDataset, "
    'or {"train": ..., "test": ...} of these'
)


@final
class Splits:
    """The data of a job.

    Args:
        train: the source of the training samples, or a function that returns it.
        test: the same for the samples of the evaluation; None, or a function that returns None, where there are none.
        about: one line for people: what the data is and where it comes from.
        classes: names of the classes in the order of their numbers, or a function that returns them.

    A function is called when its part is first asked for, and once: a job that is only printed reads no file.
    """

    def __init__(
        self,
        train: Source | Callable[[], Source],
        test: Source | Callable[[], Source | None] | None = None,
        about: str = "",
        classes: Sequence[str] | Callable[[], Sequence[str]] = (),
    ) -> None:
        self.about = about
        self._train, self._test, self._classes = train, test, classes

    @property
    def train(self) -> Source:
        if not isinstance(self._train, Source):
            self._train = self._train()
        return self._train

    @property
    def test(self) -> Source | None:
        if self._test is not None and not isinstance(self._test, Source):
            self._test = self._test()
        return self._test

    @property
    def classes(self) -> tuple[str, ...]:
        if callable(self._classes):
            self._classes = self._classes()
        self._classes = tuple(self._classes)
        return self._classes

    def __repr__(self) -> str:
        return f"Splits({self.about!r})"


def as_splits(data: Any) -> Splits:
    """Whatever a job may give as its data, as `Splits`.

    Raises:
        JobError: none of the accepted forms; the message lists them.
    """
    if isinstance(data, Splits):
        return data
    if isinstance(data, Mapping):
        if "train" not in data or set(data) - {"train", "test"}:
            raise JobError(f"data is a dict with the keys {list(data)}: give 'train' and, if there is one, 'test'")
        test = data.get("test")
        return Splits(_as_source(data["train"]), None if test is None else _as_source(test))
    return Splits(_as_source(data))


def _as_source(data: Any) -> Source:
    if isinstance(data, Source):
        return data
    if isinstance(data, TensorDataset) and len(data.tensors) <= 2:
        return Arrays(tuple(data.tensors))  # the same samples, gathered a batch at a time
    if isinstance(data, IterableDataset):
        return Stream(data)
    if isinstance(data, Dataset):
        return Samples(data)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, _ARRAYS) for part in data):
        return Arrays(tuple(data))
    if data is None:
        raise JobError(
            "the job has no data, which a loop of your own (shardwise.start) can do without, where it makes its own: train, "
            "prove, bench, and plans with tensor, pipeline or context need some, such as a few samples like those of the loop"
        )
    if isinstance(data, DataLoader):
        raise JobError(
            "data is a DataLoader: give its data set, data=loader.dataset, and batch_size= beside it; shardwise deals out the "
            "samples itself, so that all workers together take the batches that one would. loader_workers and collate= belong to "
            "shardwise.data.Samples(dataset, ...), and an order of your own is a Subset of the data set with shuffle=False"
        )
    given = f"{type(data).__name__} of {len(data)} items" if isinstance(data, tuple | list) else type(data).__name__
    raise JobError(f"data is a {given}: {_way_out(data)}")


def _way_out(data: Any) -> str:
    """What to do with data of a form that is not accepted."""
    if isinstance(data, Iterator):
        return "it can be read once, and an epoch reads it all: give a function that makes it, Stream(function)"
    if callable(data) and not isinstance(data, type):
        return "a function that yields samples goes into shardwise.data.Stream(function)"
    if isinstance(data, tuple | list) and len(data) > 2 and all(isinstance(part, _ARRAYS) for part in data):
        return (
            "give (inputs, targets); several inputs are a tuple or dict, ((a, b), targets), and so are several targets"
        )
    if isinstance(data, tuple | list) and len(data) == 2 and any(isinstance(part, list) for part in data):
        return "lists are no arrays: numpy.array(inputs, dtype='float32'), numpy.array(targets)"
    if any(hasattr(part, "to_numpy") for part in (data if isinstance(data, tuple | list) else (data,))):
        return "give arrays: (frame[columns].to_numpy('float32'), frame[target].to_numpy()); files are read by data.csv, parquet"
    return _ACCEPTED


_ARRAYS = (np.ndarray, Tensor, dict, tuple)
