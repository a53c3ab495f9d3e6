"""MNIST, and the sets published in its form, as idx files (http://yann.lecun.com/exdb/mnist/), plain or .gz.

An idx file is big-endian: magic number 2051 for images and 2049 for labels, one int32 per dim, then the bytes.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardwise.data.download import Remote, fetch
from shardwise.data.gather import Arrays
from shardwise.data.readers.files import check_labels, read_file
from shardwise.data.source import Splits
from shardwise.data.transforms import Normalize, Transform
from shardwise.errors import DataError

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
# SHA-256 of the four original files, computed from copies whose MD5 are the published ones
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049


def mnist(folder: str | Path, download: bool = False, transform: Transform | None = None) -> Splits:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 x 28.

    Samples are uint8 (1, 28, 28) images, int64 labels. Fashion-MNIST and others in the same files are read as well.

    Args:
        folder: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two `t10k-` files, each plain or .gz.
        download: fetch the files (12 MB) into `folder` when they are not there.
        transform: whole-batch transform of both splits; None normalises to mean 0 and deviation 1 over the training set
            (0.1307 and 0.3081 of the full scale).
    """
    place = Path(folder)
    return Splits(
        lambda: _arrays(place, "train", download, transform),
        lambda: _arrays(place, "t10k", download, transform),
        about=f"MNIST from {folder}",
        classes=tuple(str(digit) for digit in range(10)),
    )


def _arrays(folder: Path, prefix: str, download: bool, transform: Transform | None) -> Arrays:
    image_path = _find(folder, f"{prefix}-images-idx3-ubyte", download)
    label_path = _find(folder, f"{prefix}-labels-idx1-ubyte", download)
    images = read_idx(image_path, IMAGES_MAGIC)
    labels = read_idx(label_path, LABELS_MAGIC).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(
            f"{image_path} holds {len(images)} images and {label_path} {len(labels)} labels: they must match"
        )
    check_labels(label_path, labels, 10)
    return Arrays((images[:, None], labels), transform or Normalize(0.1307, 0.3081))


def _find(folder: Path, name: str, download: bool) -> Path:
    packed = name + ".gz"
    for path in (folder / name, folder / packed):
        if path.exists():
            return path
    if download:
        return fetch(Remote(packed, CHECKSUMS[packed], tuple(mirror + packed for mirror in MIRRORS)), folder)
    return folder / packed  # reading it says what is missing


def read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """The array of an idx file of bytes; (N, rows, columns) for images, (N,) for labels."""
    layout = (
        f"Expected in {path.parent}: {', '.join(name.removesuffix('.gz') for name in CHECKSUMS)}, each plain or .gz, from "
        f"{MIRRORS[0]} (download=True fetches them)."
    )
    content = read_file(path, layout)
    dims = 3 if magic == IMAGES_MAGIC else 1
    if len(content) < 4 + 4 * dims:
        raise DataError(f"{path} has {len(content)} bytes, less than the header of an idx file: it is damaged")
    found, *shape = (int(value) for value in np.frombuffer(content, ">i4", 1 + dims))
    if found != magic:
        raise DataError(
            f"{path} starts with the number {found}, an idx file of this kind with {magic}: it is another file"
        )
    count = int(np.prod(shape, dtype=np.int64))
    if min(shape) < 0 or len(content) != 4 + 4 * dims + count:
        raise DataError(
            f"{path} says it holds {' x '.join(map(str, shape))} bytes and has {len(content) - 4 - 4 * dims}: it is damaged"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
