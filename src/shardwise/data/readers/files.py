"""What the readers share: finding files, and reading them with errors that name the file."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import DataError


def read_file(path: Path, layout: str) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz.

    Args:
        layout: what the reader expects where, and where to get it; ends the message about a missing file.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as packed:
                return packed.read()
        return path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut short ({error}); delete it and fetch it again") from error
    except OSError as error:
        raise missing(path, error, layout) from error


def missing(path: Path, error: OSError, layout: str) -> DataError:
    """The error for a file that cannot be opened."""
    return DataError(f"{path} cannot be read: {error.strerror or error}.\n{layout}")


def check_labels(path: Path, labels: NDArray[np.int64], classes: int) -> None:
    """Raises DataError when a label is no class number."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{path}: sample {wrong[0]} has the label {labels[wrong[0]]}, there are {classes} classes numbered from 0; "
            "the file is damaged or of another data set"
        )
