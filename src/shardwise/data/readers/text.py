"""Text for next-token training: windows of characters or bytes, gathered a batch at a time."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shardwise.data.gather import Arrays
from shardwise.data.readers.files import missing, read_file
from shardwise.data.source import Splits
from shardwise.errors import DataError, JobError

_LAYOUT = "Expected one plain text file."


def text(
    path: str | Path,
    unit: Literal["char", "byte"] = "char",
    block: int = 128,
    stride: int | None = None,
    test_fraction: float = 0.1,
) -> Splits:
    """Windows of one text: inputs are `block` tokens, targets the same shifted by one; both int64 (block,).

    The text is held once, as one code per token, and windows are views of it until a batch is gathered.

    Args:
        path: a text file; UTF-8 for characters.
        unit: a token is a character, coded by its place in the sorted vocabulary, or a byte, coded by its value.
            `Splits.classes` is the vocabulary; for bytes the 256 values as numbers.
        stride: tokens from one window to the next, None for `block` (each token once). What is left at the end of a
            split and too short for a window is not used.
        test_fraction: the last part of the text, which becomes the test split; 0 for none.
    """
    if unit not in ("char", "byte"):
        raise JobError(f"unit is {unit!r}: give 'char' or 'byte'")
    stride = block if stride is None else stride
    if block < 1 or stride < 1 or not 0 <= test_fraction < 1:
        raise JobError(
            f"text(block={block}, stride={stride}, test_fraction={test_fraction}): give a block and a stride of at least 1 "
            "and a fraction from 0 to below 1"
        )
    place = Path(path)

    @cache
    def codes() -> tuple[Tensor, tuple[str, ...]]:
        return _characters(place) if unit == "char" else (_bytes(place), tuple(str(value) for value in range(256)))

    def windows(part: Callable[[Tensor, int], Tensor]) -> Arrays:
        tokens = codes()[0]
        chosen = part(tokens, len(tokens) - round(len(tokens) * test_fraction))
        if len(chosen) <= block:
            raise DataError(
                f"{place}: {len(chosen)} tokens in a split, a window needs block + 1 = {block + 1}; use a smaller block, "
                "another test_fraction or a longer text"
            )
        return Arrays((chosen[:-1].unfold(0, block, stride), chosen[1:].unfold(0, block, stride)), _to_long)

    return Splits(
        lambda: windows(lambda tokens, cut: tokens[:cut]),
        (lambda: windows(lambda tokens, cut: tokens[cut:])) if test_fraction else None,
        about=f"{unit}s of {path}",
        classes=lambda: codes()[1],
    )


def _to_long(inputs: Tensor, targets: Tensor, random: Any) -> tuple[Tensor, Tensor]:
    return inputs.long(), targets.long()


def _characters(path: Path) -> tuple[Tensor, tuple[str, ...]]:
    try:
        content = read_file(path, _LAYOUT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it, or read it with unit='byte'"
        ) from error
    points = np.frombuffer(content.encode("utf-32-le"), np.uint32)
    if not len(points):
        raise DataError(f"{path} is empty. {_LAYOUT}")
    present = np.zeros(int(points.max()) + 1, bool)
    present[points] = True
    vocabulary = np.flatnonzero(present)
    codes = np.cumsum(present, dtype=np.int32) - 1
    width = np.uint8 if len(vocabulary) <= 256 else np.int32
    return torch.from_numpy(codes.astype(width)[points]), tuple(chr(point) for point in vocabulary)


def _bytes(path: Path) -> Tensor:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty. {_LAYOUT}")
        return torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
    except OSError as error:
        raise missing(path, error, _LAYOUT) from error
