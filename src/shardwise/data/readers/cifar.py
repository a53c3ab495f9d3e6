"""CIFAR-10 and CIFAR-100 in their standard python batches (Krizhevsky, 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

A batch is a pickle of a dict with `data`, uint8 (N, 3072), each row an image of 3 x 32 x 32, and `labels`.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardwise.data.download import Remote, extract, fetch
from shardwise.data.gather import Arrays
from shardwise.data.readers.files import check_labels, missing
from shardwise.data.readers.pickled import load_arrays
from shardwise.data.source import Splits
from shardwise.data.transforms import Normalize, Transform
from shardwise.errors import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10 = Remote(
    "cifar-10-python.tar.gz",
    "md5:c58f30108f718f92721af3b95e74349a",
    (
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "http://www.cs.utoronto.ca/~kriz/cifar-10-python.tar.gz",
    ),
)
CIFAR100 = Remote(
    "cifar-100-python.tar.gz",
    "md5:eb9058c3a382ffc7106e4002c42a8d85",
    (
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "http://www.cs.utoronto.ca/~kriz/cifar-100-python.tar.gz",
    ),
)
_IMAGE_BYTES = 3 * 32 * 32
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))


def cifar10(folder: str | Path, download: bool = False, transform: Transform | None = None) -> Splits:
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 in 10 classes.

    Samples are uint8 (3, 32, 32) images, int64 labels. The batches may be of any length.

    Args:
        folder: holds `cifar-10-batches-py/`, or is that folder.
        download: fetch the archive (170 MB) into `folder` when the batches are not there.
        transform: whole-batch transform of both splits; None scales bytes to float32 in [-1, 1].
    """
    name = "cifar-10-batches-py"
    archive = CIFAR10 if download else None
    return Splits(
        lambda: _arrays(folder, name, archive, (*_TRAIN, "test_batch"), _TRAIN, b"labels", 10, transform),
        lambda: _arrays(folder, name, archive, (*_TRAIN, "test_batch"), ("test_batch",), b"labels", 10, transform),
        about=f"CIFAR-10 from {folder}",
        classes=CIFAR10_CLASSES,
    )


def cifar100(folder: str | Path, download: bool = False, transform: Transform | None = None) -> Splits:
    """CIFAR-100: the same with 100 classes, from `cifar-100-python/`; labels are the fine ones."""
    name, files = "cifar-100-python", ("train", "test")
    archive = CIFAR100 if download else None
    return Splits(
        lambda: _arrays(folder, name, archive, files, ("train",), b"fine_labels", 100, transform),
        lambda: _arrays(folder, name, archive, files, ("test",), b"fine_labels", 100, transform),
        about=f"CIFAR-100 from {folder}",
        classes=tuple(str(number) for number in range(100)),
    )


def _arrays(
    folder: str | Path,
    name: str,
    archive: Remote | None,
    files: tuple[str, ...],
    wanted: tuple[str, ...],
    key: bytes,
    classes: int,
    transform: Transform | None,
) -> Arrays:
    place = Path(folder)
    if not (place / wanted[0]).exists():
        place = place / name
    if archive is not None and not place.exists():
        extract(fetch(archive, place.parent), [f"{name}/{file}" for file in files], place)
    layout = (
        f"Expected in {folder} or in {name}/ inside it: {', '.join(files)}, the python version of the data set from "
        "https://www.cs.toronto.edu/~kriz/cifar.html (download=True fetches it)."
    )
    paths = [place / file for file in wanted]
    # one array for all batches, filled as they are read; rows that no batch fills are never touched and take no memory
    most = sum(path.stat().st_size for path in paths if path.exists()) // _IMAGE_BYTES
    images, labels, rows = np.empty((most, _IMAGE_BYTES), np.uint8), [], 0
    for path in paths:
        part_labels = _read(path, layout, key, classes, images[rows:])
        labels.append(part_labels)
        rows += len(part_labels)
    return Arrays((images[:rows].reshape(-1, 3, 32, 32), np.concatenate(labels)), transform or Normalize(0.5, 0.5))


def _read(path: Path, layout: str, key: bytes, classes: int, into: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Read one batch: its images into the first rows of `into`, its labels as the result."""
    try:
        content = load_arrays(path, into)
    except OSError as error:
        raise missing(path, error, layout) from error
    if not isinstance(content, dict) or not isinstance(content.get(b"data"), np.ndarray) or key not in content:
        raise DataError(f"{path} is no CIFAR batch: expected a dict with data and {key.decode()}.\n{layout}")
    images = content[b"data"]
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _IMAGE_BYTES:
        raise DataError(f"{path}: data is {images.dtype} of shape {images.shape}, expected uint8 (N, 3072)")
    try:
        labels = np.asarray(content[key], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: the labels are no whole numbers ({error})") from error
    if labels.shape != (len(images),):
        raise DataError(f"{path}: {len(images)} images with labels of shape {labels.shape}: the file is damaged")
    check_labels(path, labels, classes)
    if not np.shares_memory(images, into):
        into[: len(images)] = images
    return labels
