"""Packed data sets: what `shardwise data pack` wrote, memory-mapped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardwise.data.gather import Arrays
from shardwise.data.rows import JoinedRows, WindowRows
from shardwise.data.source import Splits
from shardwise.data.transforms import Normalize, Transform, as_transform
from shardwise.errors import DataError, JobError
from shardwise.spec.packed import INDEX_NAME, PackedIndex, PackedSplit


def is_packed(folder: str | Path) -> bool:
    """Whether `shardwise data pack` wrote this folder to its end."""
    return (Path(folder) / INDEX_NAME).is_file()


def packed(
    folder: str | Path,
    transform: Transform | None = None,
    *,
    block: int = 128,
    stride: int | None = None,
    test_fraction: float = 0.1,
) -> Splits:
    """A folder that `shardwise data pack` wrote: only the rows of each batch are read, all processes share the pages.

    Images are uint8 (3, size, size) with int64 labels, tables are what `shardwise.data.csv` gives, texts are windows as
    `shardwise.data.text` gives them.

    Args:
        transform: whole-batch transform of both splits; None normalises images by the mean and deviation of each channel
            that the packing measured, and changes nothing else.
        block, stride, test_fraction: of a text, as in `shardwise.data.text`.

    Raises:
        DataError: when it is read: no packed data set, or files that are missing or of another size. Their checksums are
            compared by `shardwise data check` alone.
    """
    root = Path(folder)

    @cache
    def index() -> PackedIndex:
        return PackedIndex.read(root)

    def arrays(split: str) -> Arrays:
        fields = _fields(root, index().splits[split])
        if index().kind != "images":
            return Arrays(_pair(fields), transform)
        measured = index().statistics
        # a channel that never changes has no deviation to divide by
        default = Normalize(measured["mean"], [std or 1.0 for std in measured["std"]])
        return Arrays(_pair(fields), transform or default)

    def train() -> Arrays:
        return _windows(root, index(), 0, block, stride, test_fraction, transform) if _is_text() else arrays("train")

    def test() -> Arrays | None:
        if _is_text():
            return _windows(root, index(), 1, block, stride, test_fraction, transform) if test_fraction else None
        return arrays("test") if "test" in index().splits else None

    def _is_text() -> bool:
        return index().kind == "text"

    return Splits(train, test, about=f"packed {folder}", classes=lambda: index().classes)


def _fields(root: Path, split: PackedSplit) -> dict[str, JoinedRows]:
    found = {}
    for field in split.fields:
        parts = []
        for shard in split.shards:
            path = root / shard.files[field.name]
            try:
                array = np.load(path, mmap_mode="c", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path} cannot be mapped ({error}); pack the data again") from error
            if array.shape != (shard.rows, *field.shape) or array.dtype.str != field.dtype:
                raise DataError(
                    f"{path} holds {array.dtype} {array.shape}, the index says {field.dtype} {(shard.rows, *field.shape)}; "
                    "pack the data again"
                )
            parts.append(torch.from_numpy(array))
        found[field.name] = JoinedRows(parts)
    return found


def _pair(fields: dict[str, JoinedRows]) -> tuple[Any, Any]:
    inputs: Any = fields.get("inputs")
    if inputs is None:
        inputs = tuple(fields[f"inputs.{place}"] for place in range(len(fields) - 1))
    return inputs, fields["targets"]


def _windows(
    root: Path,
    index: PackedIndex,
    part: int,
    block: int,
    stride: int | None,
    test_fraction: float,
    transform: Transform | None,
) -> Arrays:
    """Windows of the first part of a text (0, for training) or of its last (1)."""
    stride = block if stride is None else stride
    if block < 1 or stride < 1 or not 0 <= test_fraction < 1:
        raise JobError(
            f"packed(block={block}, stride={stride}, test_fraction={test_fraction}): give a block and a stride of at least 1 "
            "and a fraction from 0 to below 1"
        )
    tokens = _fields(root, index.splits["all"])["tokens"]
    cut = len(tokens) - round(len(tokens) * test_fraction)
    begin, length = (cut, len(tokens) - cut) if part else (0, cut)
    if length <= block:
        raise DataError(
            f"{root}: {length} tokens in a split, a window needs block + 1 = {block + 1}; use a smaller block, another "
            "test_fraction or a longer text"
        )
    count = (length - 1 - block) // stride + 1
    inputs, targets = (
        WindowRows(tokens, block=block, stride=stride, offset=begin + shift, count=count) for shift in (0, 1)
    )
    after = None if transform is None else as_transform(transform)

    def as_long(inputs: Any, targets: Any, random: Any) -> tuple[Any, Any]:
        pair = (inputs.long(), targets.long())
        return pair if after is None else after(*pair, random)

    return Arrays((inputs, targets), as_long)
