"""Messages between stages: all tensors that go from one stage to the next for one micro-batch, in one block of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes: the longest vector loads of CPUs and GPUs need it."""


@final
@dataclass(frozen=True)
class Form:
    """What a message holds: its tensors' numbers, shapes, dtypes and first bytes.

    Attributes:
        optional: tensors may be absent: the message ends with one byte for each that says whether it is there. Reading
            these bytes waits for the device.
        flags: first of these bytes.
        bytes: size of the message.
    """

    numbers: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]
    optional: bool
    flags: int
    bytes: int

    @classmethod
    def of(cls, tensors: Mapping[int, Tensor] | Sequence[Tensor], numbers: Sequence[int], *, optional: bool) -> Form:
        """The form of a message with tensors like these; they may be stand-ins."""
        starts, place = [], 0
        for number in numbers:
            starts.append(place)
            size = tensors[number].numel() * tensors[number].element_size()
            place = -(-(place + size) // ALIGNMENT) * ALIGNMENT
        shapes = tuple(tensors[number].shape for number in numbers)
        dtypes = tuple(tensors[number].dtype for number in numbers)
        flags = len(numbers) if optional else 0
        return cls(tuple(numbers), shapes, dtypes, tuple(starts), optional, place, place + flags)

    def empty(self, device: torch.device) -> Tensor:
        """Room for a message."""
        return torch.empty(self.bytes, dtype=torch.uint8, device=device)


def pack(form: Form, tensors: Mapping[int, Tensor | None], device: torch.device) -> Tensor:
    """A message of the given form; None is an absent tensor, where the form allows that.

    Raises:
        ValueError: a tensor does not have the shape or dtype that the form says.
    """
    message = form.empty(device)
    if form.optional:
        message[form.flags :].fill_(1)
    pieces = _pieces(form, message)
    for index, (number, piece) in enumerate(zip(form.numbers, pieces, strict=True)):
        tensor = tensors[number]
        if tensor is not None:
            if tensor.shape != piece.shape or tensor.dtype != piece.dtype:
                raise ValueError(
                    f"a value that was traced as {piece.dtype} {tuple(piece.shape)} came out as {tensor.dtype} "
                    f"{tuple(tensor.shape)}: the shapes of activations must depend on the shapes of the inputs alone"
                )
            piece.copy_(tensor.detach())
        elif form.optional:
            message[form.flags + index] = 0
    return message


def unpack(form: Form, message: Tensor) -> dict[int, Tensor | None]:
    """The tensors in a message, as views of it."""
    present = message[form.flags :].tolist() if form.optional else [1] * len(form.numbers)
    pieces = _pieces(form, message)
    return {number: piece if flag else None for number, piece, flag in zip(form.numbers, pieces, present, strict=True)}


def _pieces(form: Form, message: Tensor) -> list[Tensor]:
    pieces = []
    for shape, dtype, start in zip(form.shapes, form.dtypes, form.starts, strict=True):
        size = shape.numel() * dtype.itemsize
        pieces.append(message[start : start + size].view(dtype).view(shape))
    return pieces
