"""Transforms of a whole batch: `transform(inputs, random)`.

`inputs` is what the source holds, N samples along the first dim; `random` is a `BatchRandom` for these samples, or None
in an evaluation, where the random transforms leave their input alone. A function of one argument gets the inputs only;
one of three is `transform(inputs, targets, random)` and returns both.

Each sample must be transformed on its own: what mixes the samples of a batch depends on how the batch is divided.

Shapes: N samples, C channels, H rows, W columns.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from shardwise.data.randomness import BatchRandom
from shardwise.errors import JobError

Pair: TypeAlias = tuple[Any, Any]
Transform: TypeAlias = Callable[..., Any]


def as_transform(transform: Transform) -> Callable[[Any, Any, BatchRandom | None], Pair]:
    """Any accepted form of transform as `(inputs, targets, random) -> (inputs, targets)`.

    Raises:
        JobError: not callable, or not with one, two or three positional arguments.
    """
    if not callable(transform):
        raise JobError(f"transform is {transform!r}: give a function (inputs, random) -> inputs")
    match _positional(transform):
        case 1:
            return lambda inputs, targets, random: (transform(inputs), targets)
        case 2:
            return lambda inputs, targets, random: (transform(inputs, random), targets)
        case 3:
            return transform
        case count:
            raise JobError(
                f"transform {transform!r} takes {count} positional arguments: write (inputs), (inputs, random) or "
                "(inputs, targets, random) -> (inputs, targets)"
            )


def _positional(function: Transform) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions do not say; those take the inputs alone
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [parameter for parameter in parameters if parameter.kind in kinds]
    required = [parameter for parameter in named if parameter.default is inspect.Parameter.empty]
    count = len(required)
    if count < len(named) and named[count].name == "random":
        count += 1  # (inputs, random=None)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return max(1, count) if named or takes_any else 0


@final
class Compose:
    """Transforms one after another, each of any accepted form."""

    def __init__(self, *transforms: Transform) -> None:
        self._steps = [as_transform(transform) for transform in transforms]
        self._names = ", ".join(repr(transform) for transform in transforms)

    def __call__(self, inputs: Any, targets: Any, random: BatchRandom | None) -> Pair:
        for step in self._steps:
            inputs, targets = step(inputs, targets, random)
        return inputs, targets

    def __repr__(self) -> str:
        return f"Compose({self._names})"


def _image(inputs: Any, name: str) -> Tensor:
    if not isinstance(inputs, Tensor) or inputs.dim() < 3:
        given = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise JobError(f"{name} was given {given}: it needs one tensor of images, (N, C, H, W) or (N, H, W)")
    return inputs


@final
class ToFloat:
    """float32: bytes (uint8) are divided by 255, other numbers are converted as they are."""

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs.float()

    def __repr__(self) -> str:
        return "ToFloat()"


@final
class Normalize:
    """`(inputs - mean) / std` per channel (dim 1), as float32 (float64 stays float64).

    Bytes (uint8) are first scaled to [0, 1].

    Args:
        mean, std: one number, or one a channel, in units of the scaled inputs.
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        self._mean = torch.tensor(mean, dtype=torch.float64).reshape(-1)
        self._std = torch.tensor(std, dtype=torch.float64).reshape(-1)
        self._affines: dict[object, tuple[Tensor, Tensor]] = {}  # made once per form of input
        if not bool((self._std > 0).all()) or len({1, len(self._mean), len(self._std)}) > 2:
            raise JobError(f"Normalize(mean={mean}, std={std}): give one number or one a channel for both, std above 0")

    def __call__(self, inputs: Tensor) -> Tensor:
        channels = max(len(self._mean), len(self._std))
        if channels > 1 and (inputs.dim() < 2 or inputs.shape[1] != channels):
            raise JobError(f"Normalize has {channels} channels, the inputs are {tuple(inputs.shape)}: dim 1 must match")
        shape = (1, channels, *[1] * (inputs.dim() - 2)) if channels > 1 else (1,)
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        scale, shift = self._affine(inputs.dtype == torch.uint8, shape, dtype)
        # one copy, then in place: the fused addcmul is three times slower on torch 2.13 CPU
        return inputs.to(dtype, copy=True).mul_(scale).add_(shift)

    def _affine(self, are_bytes: bool, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (are_bytes, shape, dtype)
        if key not in self._affines:
            channels = max(shape)
            scale = 1.0 / ((255.0 if are_bytes else 1.0) * self._std)
            self._affines[key] = (
                scale.expand(channels).to(dtype).view(shape),
                (-self._mean / self._std).expand(channels).to(dtype).view(shape),
            )
        return self._affines[key]

    def __repr__(self) -> str:
        return f"Normalize(mean={self._mean.tolist()}, std={self._std.tolist()})"


@final
class Flip:
    """Mirrors each image left to right with `probability`. Images of shape (N, ..., W)."""

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise JobError(f"Flip(probability={probability}): give a number from 0 to 1")
        self.probability = probability

    def __call__(self, inputs: Tensor, random: BatchRandom | None) -> Tensor:
        images = _image(inputs, "Flip")
        if random is None:
            return images
        return _mirrored(images, random.uniform() < self.probability)

    def __repr__(self) -> str:
        return f"Flip({self.probability})"


def _mirrored(images: Tensor, chosen: Tensor) -> Tensor:
    """A copy with the chosen images (bool of shape (N,)) mirrored left to right."""
    copy = images.clone(memory_format=torch.contiguous_format)
    if copy.dtype == torch.uint8 and copy.shape[-1] % 4 == 0:
        # Bytes are mirrored a machine word at a time: reverse the words, then the bytes in each. On torch 2.13 CPU this
        # takes a quarter of the time of `flip` and a copy back.
        word = np.uint64 if copy.shape[-1] % 8 == 0 else np.uint32
        words, rows = copy.numpy().view(word), chosen.numpy()
        words[rows] = words[rows][..., ::-1].byteswap()
    else:
        copy[chosen] = copy[chosen].flip(-1)
    return copy


@final
class RandomCrop:
    """Pads each image by `padding` on all sides and cuts a window of the old size at a random place.

    Images of shape (N, ..., H, W). `fill` is the value of the padding, in the units of the input: crop before
    `Normalize` to pad with black.
    """

    def __init__(self, padding: int, fill: float = 0) -> None:
        if padding < 1:
            raise JobError(f"RandomCrop(padding={padding}): give a whole number of at least 1")
        self.padding, self.fill = padding, fill

    def __call__(self, inputs: Tensor, random: BatchRandom | None) -> Tensor:
        images = _image(inputs, "RandomCrop")
        if random is None:
            return images
        pad, (height, width) = self.padding, images.shape[-2:]
        corners = random.integers(0, 2 * pad + 1, 2).numpy()
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad), value=self.fill).numpy()
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(-2, -1))
        # windows: (N, ..., 2*pad+1, 2*pad+1, H, W), a view; one fancy index copies the chosen window of every image
        windows = np.moveaxis(windows, (-4, -3), (1, 2))
        return torch.from_numpy(windows[np.arange(len(images)), corners[:, 0], corners[:, 1]])

    def __repr__(self) -> str:
        return f"RandomCrop({self.padding})"
