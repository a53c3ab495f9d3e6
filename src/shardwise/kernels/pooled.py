"""A 2-d convolution, a ReLU or none, and max-pooling in windows of 2 x 2 at once: the compiled kernels, and where they pay.

Apart, the operators write and read the whole output of the convolution and its gradient, more than a processor's own
cache holds. Together (`conv2d_pooled.c`) they never do, and the gradients start from the quarter that is not zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shardwise.kernels import convolution
from shardwise.kernels.library import load_convolutions

LEAST_OUTSIDE, MOST_OUTSIDE = 3, 64
"""Output channels: with fewer, dense gradients are as fast; with more, it was not measured."""


def pooled(
    image: Tensor, weight: Tensor, bias: Tensor | None, shape: Any, *, relu: bool
) -> tuple[Tensor, Tensor] | None:
    """Convolve and pool; None where a weight is not finite.

    Args:
        image: (N, C, H, W).
        weight: (outputs, C, size, size).
        bias: (outputs,), or None.
        shape: of the convolution, from `convolution.sizes`.
        relu: whether there is one between the two.

    Returns:
        What the pooling gives, and of the same shape, as uint8, the place of each window's largest value.
    """
    library = load_convolutions()
    assert library is not None
    out = image.new_empty((shape[0], shape[2], shape[5] // 2, shape[6] // 2))
    codes = torch.empty(out.shape, dtype=torch.uint8)
    scratch = convolution.scratch_for(library.shardwise_conv2d_pooled_scratch, shape)
    done = library.shardwise_conv2d_pooled(
        image.data_ptr(), weight.data_ptr(), convolution.place(bias), out.data_ptr(), codes.data_ptr(), scratch.data_ptr(),
        shape, relu,
    )  # fmt: skip
    return (out, codes) if done else None


def pooled_gradients(
    image: Tensor, weight: Tensor, slope: Tensor, codes: Tensor, shape: Any, wanted: tuple[bool, ...]
) -> convolution.Gradients | None:
    """Gradients of image, weights and bias that are wanted; None where a value is not finite.

    Args:
        image, weight, codes, shape: as for `pooled`.
        slope: the gradient of what the pooling gave.
        wanted: of image, weights and bias.
    """
    library = load_convolutions()
    assert library is not None
    for_image, for_weight, for_bias = wanted
    slope = slope.contiguous()
    of_image = torch.empty_like(image) if for_image else None
    of_weight = torch.empty_like(weight) if for_weight else None
    of_bias = weight.new_empty(weight.shape[0]) if for_bias else None
    scratch = convolution.scratch_for(library.shardwise_conv2d_pooled_back_scratch, shape)
    done = library.shardwise_conv2d_pooled_back(
        image.data_ptr(), weight.data_ptr(), slope.data_ptr(), codes.data_ptr(), convolution.place(of_weight),
        convolution.place(of_bias), convolution.place(of_image), scratch.data_ptr(), shape,
    )  # fmt: skip
    return (of_image, of_weight, of_bias) if done else None


def pays(shape: Any) -> bool:
    """Whether both at once are faster than one after the other by the kernels that are chosen for each.

    Measured with one thread, in turns, forward and backward together (benchmarks/convolutions.py --pooled, docs/notes.md).

    Args:
        shape: of the convolution, from `convolution.sizes`.
    """
    samples, inside, outside, _, _, out_height, out_width, size, *_ = (int(value) for value in shape)
    work = 2 * samples * inside * outside * size * size * out_height * out_width
    return (
        work >= convolution.LEAST_WORK
        and LEAST_OUTSIDE <= outside <= MOST_OUTSIDE
        and min(out_height, out_width) >= 8
        and fuses(inside, size)
    )


def fuses(inside: int, size: int) -> bool:
    """Whether kernels of so many input channels and rows are compiled, and fill enough of their vectors."""
    stretch = -(-(size + 1) * inside // 16)
    return convolution.fills_lanes(inside, size) and stretch <= (3 if size == 7 else 4)


def may_pay(layer: nn.Module) -> bool:
    """Whether this layer's work can be put off, whatever the images."""
    return (
        isinstance(layer, nn.Conv2d)
        and (*layer.stride, *layer.dilation, layer.groups) == (1, 1, 1, 1, 1)
        and layer.kernel_size[0] == layer.kernel_size[1]
        and layer.kernel_size[0] in convolution.SIZES
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and LEAST_OUTSIDE <= layer.out_channels <= MOST_OUTSIDE
        and fuses(layer.in_channels, layer.kernel_size[0])
    )
