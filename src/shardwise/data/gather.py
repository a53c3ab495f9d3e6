"""Arrays: the fast path. A whole batch is gathered and transformed at once, with no Python per sample.

The arrays are read where they lie: a worker that was forked shares their pages with its siblings, a memory-mapped file
its pages with the whole machine. Nothing here writes to them.
"""

import warnings
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from shardwise.data.batch import Batch, tree_leaves, tree_map
from shardwise.data.randomness import BatchRandom
from shardwise.data.reading import Reading, Request, Source, requests
from shardwise.data.rows import Rows
from shardwise.data.transforms import Transform, as_transform
from shardwise.errors import JobError

GROUP_BYTES = 1 << 19
GROUP_STEPS = 32
ALIGNMENT_BYTES = 64
"""Where torch's allocator puts every new tensor."""


@final
class Arrays(Source):
    """Samples that are rows of arrays.

    Args:
        arrays: `(inputs, targets)`, or the inputs alone. Each is a NumPy array, memory-mapped array or torch tensor, or
            a tuple or dict of these, with the samples along the first dim.
        transform: whole-batch transform, see `shardwise.data.transforms`.

    Raises:
        JobError: no arrays, first dims that differ, or numbers that torch does not have.
    """

    def __init__(self, arrays: Any, transform: Transform | None = None) -> None:
        if transform is not None and not callable(transform):
            raise JobError(
                f"Arrays was given a {type(transform).__name__} as transform: inputs and targets go in one tuple, "
                "Arrays((inputs, targets))"
            )
        pair = tuple(arrays) if isinstance(arrays, tuple | list) else (arrays, None)
        if len(pair) == 1:
            pair = (pair[0], None)
        if len(pair) != 2:
            raise JobError(
                f"Arrays was given {len(pair)} items: give (inputs, targets); several inputs go in one tuple"
            )
        self.inputs = tree_map(_as_tensor, pair[0])
        self.targets = None if pair[1] is None else tree_map(_as_tensor, pair[1])
        lengths = [len(leaf) for leaf in tree_leaves(self.inputs) + tree_leaves(self.targets)]
        if not lengths or len(set(lengths)) != 1:
            raise JobError(f"Arrays have first dims {lengths}: all must have the same number of samples")
        self._length = lengths[0]
        self._transform = None if transform is None else as_transform(transform)

    @property
    def length(self) -> int:
        return self._length

    @property
    def threaded(self) -> bool:
        return True

    def choose(self, rows_of: Callable[[Any], Any]) -> "Arrays":
        """The source of some of the samples, with the same transform; `rows_of` chooses them in a tree of arrays."""
        targets = None if self.targets is None else rows_of(self.targets)
        return Arrays((rows_of(self.inputs), targets), self._transform)

    def read(self, reading: Reading) -> Generator[Batch, None, None]:
        wanted, steps = requests(self._length, reading), self._group_size(reading)
        while group := list(islice(wanted, steps)):
            yield from self._gather(group, reading)

    def _group_size(self, reading: Reading) -> int:
        """How many steps are gathered in one go, so that small batches do not pay a dozen calls each."""
        leaves = tree_leaves(self.inputs) + tree_leaves(self.targets)
        row_bytes = sum(_row_bytes(leaf) for leaf in leaves)
        share = max(1, reading.bounds(reading.batch_size)[2])
        return max(1, min(GROUP_STEPS, GROUP_BYTES // max(1, row_bytes * share)))

    def _gather(self, group: list[Request], reading: Reading) -> Iterator[Batch]:
        rows = group[0].rows if len(group) == 1 else np.concatenate([request.rows for request in group])
        index = torch.from_numpy(rows)
        inputs = tree_map(lambda leaf: _gathered(leaf, index), self.inputs)
        targets = None if self.targets is None else tree_map(lambda leaf: _gathered(leaf, index), self.targets)
        if self._transform is not None:
            random = BatchRandom(reading.seed, reading.epoch, rows) if reading.training else None
            inputs, targets = self._transform(inputs, targets, random)
            _check_rows(inputs, targets, len(rows))
        if len(group) == 1:
            yield group[0].batch(inputs, targets)
            return
        start = 0
        for request in group:
            part = slice(start, start + len(request.rows))
            start = part.stop
            yield request.batch(_rows(inputs, part), None if targets is None else _rows(targets, part))


def _gathered(leaf: Tensor | Rows, index: Tensor) -> Tensor:
    return leaf.gather(index) if isinstance(leaf, Rows) else leaf.index_select(0, index)


def _row_bytes(leaf: Tensor | Rows) -> int:
    return leaf.row_bytes if isinstance(leaf, Rows) else leaf.element_size() * max(1, leaf[0].numel())


def _rows(tree: Any, part: slice) -> Any:
    """One step's rows of a gathered group, at an address that does not depend on the step's place in the group.

    Matrix kernels round differently at other alignments, so a run that resumes in the middle of a group would otherwise
    not repeat the uninterrupted run bit for bit.
    """
    return tree_map(lambda leaf: _aligned(leaf[part]), tree)


def _aligned(rows: Tensor) -> Tensor:
    return rows if rows.data_ptr() % ALIGNMENT_BYTES == 0 else rows.clone()


def _check_rows(inputs: Any, targets: Any, count: int) -> None:
    for leaf in tree_leaves(inputs) + tree_leaves(targets):
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != count:
            given = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise JobError(
                f"a transform turned {count} samples into {given}: it must return a tensor with one row a sample"
            )


def _as_tensor(leaf: Any) -> Tensor | Rows:
    """The same memory as a tensor, where the byte order and alignment allow it."""
    if isinstance(leaf, Rows):
        return leaf
    if isinstance(leaf, Tensor):
        tensor = leaf.detach()
    elif isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise JobError(
            "a masked array: torch has no masks, and would train on what is masked; put numbers there, filled(0)"
        )
    elif isinstance(leaf, np.ndarray):
        if leaf.dtype.byteorder not in "=|<" and leaf.dtype.kind in "iufcb":
            leaf = leaf.astype(leaf.dtype.newbyteorder("="))
        if any(stride < 0 for stride in leaf.strides):
            leaf = np.ascontiguousarray(leaf)
        with warnings.catch_warnings():  # read-only memory is fine: nothing here writes to it
            warnings.filterwarnings("ignore", message=".*not writable.*")
            try:
                tensor = torch.from_numpy(leaf)
            except TypeError as error:
                raise JobError(
                    f"an array of {leaf.dtype}: torch has no such numbers; code it as integers or floats"
                ) from error
    else:
        raise JobError(f"Arrays was given a {type(leaf).__name__}: give NumPy arrays or torch tensors")
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise JobError(f"numbers of {tensor.dtype}: torch computes almost nothing with them; give int32 or int64")
    if not tensor.dim():
        raise JobError("Arrays was given a single number: the first dim must run over the samples")
    return tensor
