"""Image folders in the ImageNet form: one folder a split, in it one folder a class, in it the images."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.data.gather import Arrays
from shardwise.data.readers.decode import SUFFIXES, load_pillow, square_image
from shardwise.data.readers.files import missing
from shardwise.data.samples import Samples
from shardwise.data.source import Source, Splits
from shardwise.data.transforms import Normalize, Transform
from shardwise.errors import DataError, JobError

TEST_NAMES = ("val", "test", "validation")
# channel means and deviations over the ImageNet training images, as torchvision documents them for its weights
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_folder(
    folder: str | Path,
    size: int = 224,
    loader_workers: int = 0,
    cache_images: bool = False,
    transform: Transform | None = None,
) -> Splits:
    """`folder/train/CLASS/*.jpg` and `folder/val/CLASS/*.jpg` (or `test`); without `train`, `folder/CLASS/*.jpg` alone.

    Samples are uint8 (3, size, size) RGB images, the shorter side scaled to `size` and the middle cut out; the int64
    label is the place of the class among the sorted class folders of the training split.

    Args:
        size: pixels of a side.
        loader_workers: processes of each rank that decode ahead of the step.
        cache_images: decode all images of a split once, into one array in memory, and train from that.
        transform: whole-batch transform of both splits; None normalises with the ImageNet means and deviations.
    """
    if size < 1:
        raise JobError(f"size is {size}: give the side of the square images in pixels, at least 1")
    root = Path(folder)

    def train_folder() -> Path:
        return root / "train" if (root / "train").is_dir() else root

    @cache
    def classes() -> tuple[str, ...]:
        try:
            names = sorted(entry.name for entry in train_folder().iterdir() if entry.is_dir())
        except OSError as error:
            raise missing(root, error, _layout(root)) from error
        if not names:
            raise DataError(f"{train_folder()} has no class folders.\n{_layout(root)}")
        return tuple(names)

    def source(place: Path) -> Source:
        images = _Images(place, classes(), size, _layout(root))
        chosen = transform or Normalize(IMAGENET_MEAN, IMAGENET_STD)
        if cache_images:
            return Arrays(images.decoded(), chosen)
        return Samples(images, loader_workers, transform=chosen)

    def test() -> Source | None:
        found = [root / name for name in TEST_NAMES if (root / name).is_dir()]
        return source(found[0]) if found and train_folder() != root else None

    return Splits(lambda: source(train_folder()), test, about=f"images of {folder}", classes=classes)


def _layout(root: Path) -> str:
    return f"Expected {root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE, or {root}/CLASS/IMAGE without a test split."


@final
class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, folder: Path, classes: tuple[str, ...], size: int, layout: str) -> None:
        self._size = size
        load_pillow()  # told here where it is missing, and not from inside a worker
        number = {name: place for place, name in enumerate(classes)}
        unknown = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in number)
        if unknown:
            raise DataError(f"{folder} has the class {unknown[0]!r}, which the training images have not.\n{layout}")
        self._files = [
            (path, number[name])
            for name in classes
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self._files:
            raise DataError(f"{folder} has no images in its class folders ({', '.join(sorted(SUFFIXES))}).\n{layout}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._files[index]
        return torch.from_numpy(self._decode(path)), label

    def decoded(self) -> tuple[Any, Any]:
        """All images as one uint8 (N, 3, size, size) array, and the labels; Pillow decodes outside the Python lock."""
        images = np.empty((len(self), 3, self._size, self._size), np.uint8)

        def fill(index: int) -> None:
            images[index] = self._decode(self._files[index][0])

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(fill, range(len(self))):
                pass
        return images, np.array([label for _, label in self._files], np.int64)

    def _decode(self, path: Path) -> NDArray[np.uint8]:
        return square_image(path, self._size, str(path))
