"""Arrays in memory, and .npy files read where they lie on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardwise.data.batch import tree_map
from shardwise.data.gather import Arrays
from shardwise.data.readers.files import missing
from shardwise.data.source import Splits
from shardwise.data.transforms import Transform
from shardwise.errors import DataError


def arrays(
    train: Any, test: Any = None, transform: Transform | None = None, classes: Sequence[str] = (), about: str = "arrays"
) -> Splits:
    """Arrays in memory.

    Args:
        train, test: `(inputs, targets)` or inputs alone; NumPy arrays or torch tensors, or tuples or dicts of these.
            Numbers keep their type: give float32 to a float32 model, or use `ToFloat`.
        transform: whole-batch transform of both splits.
    """
    return Splits(
        Arrays(train, transform), None if test is None else Arrays(test, transform), about=about, classes=classes
    )


def npy(train: Any, test: Any = None, transform: Transform | None = None, classes: Sequence[str] = ()) -> Splits:
    """.npy files, memory-mapped: only the rows of each batch are read, and all processes share the pages.

    Args:
        train, test: as `arrays`, with a path in the place of each array: `("x.npy", "y.npy")`.
    """
    return Splits(
        lambda: Arrays(tree_map(_mapped, train), transform),
        None if test is None else lambda: Arrays(tree_map(_mapped, test), transform),
        about=f"memory-mapped {train}",
        classes=classes,
    )


def _mapped(path: Any) -> Any:
    if path is None:
        return None
    try:
        # copy-on-write: the file is opened for reading and can never change
        return np.load(Path(path), mmap_mode="c", allow_pickle=False)
    except ValueError as error:
        raise DataError(
            f"{path} is no .npy file of numbers that can be mapped, or is cut short ({error}); write it with numpy.save"
        ) from error
    except EOFError as error:
        raise DataError(f"{path} is empty; write it with numpy.save") from error
    except OSError as error:
        raise missing(Path(path), error, "Expected a file written by numpy.save.") from error
