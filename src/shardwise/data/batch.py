"""Batch: what one rank trains on in one optimizer step, and the trees of tensors inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwise.errors import JobError

Tree: TypeAlias = "Tensor | tuple[Any, ...] | dict[Any, Any]"
"""A tensor, or a tuple or dict of trees. The first dim of every tensor runs over the samples."""


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `function` applied to every leaf. Lists become tuples; named tuples and dict keys are kept."""
    if isinstance(tree, Tensor):  # most trees are one; the other questions take a microsecond
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return tuple(tree_map(function, value) for value in tree)
    if isinstance(tree, tuple):
        make = getattr(type(tree), "_make", tuple)
        return make(tree_map(function, value) for value in tree)
    return function(tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of a tree in order; None is the empty tree."""
    if isinstance(tree, Tensor):
        return [tree]
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in tree_leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in tree_leaves(value)]
    return [tree]


def as_pair(collated: Any) -> tuple[Tree, Tree | None]:
    """`(inputs, targets)` out of what a collate function gave: a pair, or one tree without targets.

    Raises:
        JobError: a leaf is no tensor, or a tuple has a length other than 1 or 2, so that it does not say what the
            targets are.
    """
    for leaf in tree_leaves(collated):
        if not isinstance(leaf, Tensor):
            raise JobError(
                f"a batch holds a {type(leaf).__name__}: every leaf must be a tensor; drop what the model does not "
                "read from the samples, or give collate=, a function from a list of samples to tensors"
            )
    tree = tree_map(lambda leaf: leaf, collated)
    if type(tree) is not tuple:
        return tree, None
    if len(tree) not in (1, 2):
        raise JobError(
            f"a sample has {len(tree)} items: give (inputs, targets), each a tensor, tuple or dict, or one dict "
            "without targets; a collate= function can arrange them"
        )
    return tree[0], (tree[1] if len(tree) == 2 else None)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """One rank's part of one global batch.

    Attributes:
        inputs: tree of tensors of first dim `count` (1 for a phantom).
        targets: the same for the targets, None where the data has none.
        count: true samples of this rank, 0 for a phantom.
        global_count: true samples of all ranks together; -1 for a `ragged` batch.
        index: step within the epoch, from 0; -1 for a batch that a loop of the user's made.
        indices: global sample index of each sample of this rank, int64 (count,); None for streams.
        phantom: this rank's share is empty, and `inputs` and `targets` hold one real sample, so that the rank can walk
            through the collectives of a forward and backward pass; its loss must be multiplied by zero.
        largest: samples of the rank that has most of this global batch, which sets how many pieces `split` makes.
        ragged: only the ranks together know the global count, because each reads its own part of a stream: add up
            `count` over the ranks; a sum of 0 is the end of the epoch. A ragged iterator itself never ends: a rank that
            ran out gives phantoms for as long as it is asked.
        read: of a stream, a digest of some of the samples that this rank read for it, 0 or more.
    """

    inputs: Tree
    targets: Tree | None
    count: int
    global_count: int
    index: int
    indices: NDArray[np.int64] | None = None
    phantom: bool = False
    largest: int = 0
    ragged: bool = False
    read: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`; itself when they are there already."""
        target = torch.device(device)
        leaves = tree_leaves(self.inputs) + tree_leaves(self.targets)
        if all(leaf.device == target for leaf in leaves):
            return self
        return self._mapped(lambda leaf: leaf.to(target, non_blocking=non_blocking))

    def pin(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to a device can run behind the computation."""
        return self._mapped(lambda leaf: leaf.pin_memory())

    def split(self, micro_batch: int) -> list[Batch]:
        """This batch in pieces of at most `micro_batch` samples, in order; they are views and copy nothing.

        Every rank gets the same number of pieces, as many as the rank with the largest share needs, so that ranks stay
        in step through collectives of a forward pass: a rank with fewer samples ends in phantom pieces.
        """
        if micro_batch < 1:
            raise JobError(f"micro_batch is {micro_batch}: give a whole number of at least 1")
        pieces = max(1, -(-max(self.largest, self.count) // micro_batch))
        if pieces == 1 or self.phantom:
            return [self] * pieces
        return [self._piece(piece * micro_batch, micro_batch) for piece in range(pieces)]

    def _piece(self, start: int, size: int) -> Batch:
        stop = min(self.count, start + size)
        rows = slice(start, stop) if start < stop else slice(0, 1)
        piece = self._mapped(lambda leaf: leaf[rows] if leaf.dim() else leaf)
        count = max(0, stop - start)
        indices = None if self.indices is None else self.indices[start : start + count]
        largest = min(size, max(self.largest, self.count) - start)
        return replace(piece, count=count, indices=indices, phantom=count == 0, largest=largest)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        targets = None if self.targets is None else tree_map(function, self.targets)
        return replace(self, inputs=tree_map(function, self.inputs), targets=targets)
