"""Images as arrays, needing Pillow and NumPy alone: used by the reader of folders and by the packing of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def load_pillow() -> Any:
    """The `PIL.Image` module.

    Raises:
        DataError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError('reading images needs Pillow: pip install "shardwise[images]"') from error
    return Image


def square_image(source: Path | IO[bytes], size: int, name: str) -> NDArray[np.uint8]:
    """uint8 (3, size, size), RGB: the shorter side scaled to `size` (bilinear), the middle cut out.

    Raises:
        DataError: no readable image; the message calls it `name`.
    """
    pillow = load_pillow()
    try:
        with pillow.open(source) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        # Pillow names the object that it was given, which is another one in every process.
        why = "of no format that Pillow knows" if isinstance(error, pillow.UnidentifiedImageError) else str(error)
        raise DataError(f"{name} is no readable image ({why}); replace or delete it") from error
    width, height = image.size
    scale = size / min(width, height)
    if scale != 1:
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
