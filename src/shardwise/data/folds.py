"""Cross-validation: the training split in parts, each of which is left out once."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from shardwise.data.batch import tree_map
from shardwise.data.gather import Arrays
from shardwise.data.order import hashed, stream_key
from shardwise.data.rows import Rows
from shardwise.data.samples import Samples
from shardwise.data.source import Source, Splits, as_splits
from shardwise.errors import DataError, JobError

_FOLD_STREAM = 5
"""Tells the permutation of the folds from other random streams of the same seed."""


def fold(data: Any, number: int, folds: int, seed: int = 0) -> Splits:
    """The data of one fold: its test split is part `number` of the training split, its training split is the rest.

    The parts are those of one random permutation, which is a function of the seed and the number of samples alone; their
    sizes differ by at most one. A test split that the data has already takes no part.

    Args:
        data: what a job may give as its data.
        number: of the part that is left out, from 0.
        folds: number of parts.
        seed: of the permutation.

    Raises:
        DataError: fewer samples than folds.
        JobError: a source whose samples have no numbers.
    """
    if not 0 <= number < folds or folds < 2:
        raise JobError(f"fold {number} of {folds}: there are at least 2 folds, numbered from 0")
    splits = as_splits(data)
    source = splits.train
    if source.length is not None and source.length < folds:
        raise DataError(f"{folds} folds of {source.length} samples: each fold needs one at least")
    if source.length is None:
        return Splits(chosen(source, ()))  # which says why it cannot
    words = hashed(stream_key(_FOLD_STREAM, seed, folds), np.arange(source.length, dtype=np.uint64))
    order = np.argsort(words, kind="stable")
    bounds = [source.length * part // folds for part in (number, number + 1)]
    left_out = np.sort(order[bounds[0] : bounds[1]])
    rest = np.sort(np.concatenate([order[: bounds[0]], order[bounds[1] :]]))
    return Splits(
        chosen(source, rest),
        chosen(source, left_out),
        about=f"fold {number + 1} of {folds} of {splits.about}",
        classes=lambda: splits.classes,
    )


def chosen(source: Source, rows: Any) -> Source:
    """Some of the samples of a source, in the order of `rows` (int64, (N,)), with its transforms.

    Raises:
        JobError: the source's samples have no numbers.
    """
    index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    if isinstance(source, Arrays):
        return source.choose(lambda tree: tree_map(lambda leaf: _Chosen(leaf, index), tree))
    if isinstance(source, Samples):
        return source.choose(Subset(source.dataset, index.tolist()))
    raise JobError(
        f"a {type(source).__name__} has no numbered samples, so it cannot be divided into folds: "
        "give arrays or a data set with a length"
    )


@final
class _Chosen(Rows):
    """Some rows of a tensor or of other rows, which stay where they are."""

    def __init__(self, inner: Tensor | Rows, index: Tensor) -> None:
        self._inner, self._index = inner, index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def row_bytes(self) -> int:
        if isinstance(self._inner, Rows):
            return self._inner.row_bytes
        return self._inner.element_size() * max(1, self._inner[0].numel())

    def gather(self, index: Tensor) -> Tensor:
        rows = self._index[index]
        return self._inner.gather(rows) if isinstance(self._inner, Rows) else self._inner.index_select(0, rows)
