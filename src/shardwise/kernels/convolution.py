"""2-d convolutions with few channels on CPU by our own kernel: forward pass and both gradients.

oneDNN's kernels want the channels of a layer to fill vectors. A small net's first layers do not, and take most of its
step. Ours (`conv2d.c`) fill vectors with neighbouring columns. They take the place of torch's under the operators
themselves, so models stay as they are, and are chosen by size: `pays` below, from measurements. The rest (other
dtypes and memory formats, strides, groups, several threads) goes to torch's kernels as before.

Behind a max-pooling most of the output's gradient is zero. Where it is, `conv2d_sparse.c` computes with the rest alone.

The values are torch's up to rounding, not bit for bit; the same sizes and zeros always get the same kernel and the same
order of sums, so that a run that resumes, or is repeated, stays the same bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.kernels.library import Kernel, load_convolutions

FORWARD = "convolution"
BACKWARD = "convolution_backward"

THREADS = 1
"""Threads with which ours are chosen: they use one, and gain less over torch's than a second thread does."""

LEAST_WORK = 2_000_000
"""Operations (a multiply-add is two) below which a call of Python costs more than is gained."""

MOST_CHANNELS = 8
"""Channels of a result that `conv2d.c` computes together, as many as it can."""

SIZES = (3, 5, 7)
"""Height and width of the kernels."""

MOST_INSIDE, MOST_OUTSIDE = 16, 64
"""Input channels for which `conv2d_sparse.c` is compiled, and output channels up to which it was measured."""

NEVER = -1.0

LEAST_LANES = 0.6
"""Part of the lanes that the rows of a kernel must fill there."""

_SHAPE = ctypes.c_int64 * 10
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def convolution(native: Kernel) -> Kernel:
    """The operator `convolution`: ours where it pays, else `native`."""
    library = load_convolutions()
    assert library is not None

    def forward(
        image: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    ) -> Tensor:  # fmt: skip
        if (
            weight.shape[0] <= MOST_CHANNELS
            and torch.get_num_threads() == THREADS
            and plain(image, weight, stride, dilation, transposed, groups)
            and (bias is None or (fits(bias) and bias.shape == weight.shape[:1]))
            and (shape := sizes(image, weight, padding)) is not None
            and pays("forward", shape)
        ):
            done = convolve(library, image, weight, bias, shape, back=False)
            if done is not None:
                return done
        result: Tensor = native(image, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        return result

    return forward


def gradients(native: Kernel) -> Kernel:
    """The operator `convolution_backward`: each gradient that ours pays for from ours, the others from `native`."""
    library = load_convolutions()
    assert library is not None

    def backward(
        slope: Tensor, image: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
        wanted: Sequence[bool],
    ) -> Gradients:  # fmt: skip
        of_image: Tensor | None = None
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        for_image, for_weight, for_bias = wanted
        if (
            weight.shape[1] <= MOST_INSIDE
            and torch.get_num_threads() == THREADS
            and plain(image, weight, stride, dilation, transposed, groups)
            and (shape := sizes(image, weight, padding)) is not None
            and fits(slope)
            and slope.shape == (shape[0], shape[2], shape[5], shape[6])
        ):
            most = most_filled(shape)
            if (for_weight and most[0] > 0) or (for_image and most[1] > 0):
                of_image, of_weight, of_bias = sparse_gradients(library, image, weight, slope, shape, wanted, most)
            if for_weight and of_weight is None and pays("weight", shape):
                of_weight, of_bias = weight_gradient(library, image, weight, slope, shape, for_bias) or (None, None)
            if for_image and of_image is None and pays("image", shape):
                of_image = convolve(library, slope, weight, None, turned(shape), back=True)
        left = (for_image and of_image is None, for_weight and of_weight is None, for_bias and of_bias is None)
        if any(left):
            others = native(
                slope, image, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, left
            )
            ours = (of_image, of_weight, of_bias)
            of_image, of_weight, of_bias = (b if need else a for a, b, need in zip(ours, others, left, strict=True))
        return of_image, of_weight, of_bias

    return backward


def pays(what: str, shape: Any) -> bool:
    """Whether ours are faster than torch's: for sizes drawn at random, 1.1 to 60 times where this says so.

    Measured with one thread, in turns with torch's, the cost of getting here counted (benchmarks/convolutions.py, docs/notes.md).

    Args:
        what: is computed: "forward", "image" (gradient of the input) or "weight" (gradient of weights and bias).
        shape: of the convolution, from `sizes`.
    """
    samples, inside, outside, _, width, out_height, out_width, size, *_ = (int(value) for value in shape)
    work = 2 * samples * inside * outside * size * size * out_height * out_width
    if work < LEAST_WORK or min(width, out_width) < 8:
        return False
    if what == "forward":
        return outside <= MOST_CHANNELS and inside <= 4 * MOST_CHANNELS
    if what == "image":
        return inside <= MOST_CHANNELS and outside <= 2 * MOST_CHANNELS
    if out_width < 10 or inside > MOST_CHANNELS or size == 7:
        return False
    return outside <= MOST_CHANNELS or (size == 5 and inside >= 4 and outside <= 2 * MOST_CHANNELS)


def most_filled(shape: Any) -> tuple[float, float]:
    """Up to which part of the output's gradient that is not zero `conv2d_sparse.c` pays: for weights, and for images.

    Windows of 2 x 2 leave 0.25, a ReLU less. Where `pays` has our dense kernels, which a zero costs little, less may be left.

    Args:
        shape: of the convolution, from `sizes`.
    """
    samples, inside, outside, _, _, out_height, out_width, size, *_ = (int(value) for value in shape)
    work = 2 * samples * inside * outside * size * size * out_height * out_width
    if work < LEAST_WORK or outside > MOST_OUTSIDE or not fills_lanes(inside, size):
        return NEVER, NEVER
    for_image = NEVER if pays("image", shape) else 0.19
    if not pays("weight", shape):
        return 0.26, for_image
    return (0.2 if work >= 5 * LEAST_WORK and out_width < 36 else NEVER), for_image


def fills_lanes(inside: int, size: int) -> bool:
    """Whether the rows of a kernel, with the channels innermost, fill enough of their vectors, and are compiled."""
    row = inside * size
    vectors = -(-row // 16)
    return inside <= MOST_INSIDE and size * vectors <= 28 and row >= LEAST_LANES * 16 * vectors


def may_pay(layer: nn.Module, pools: bool = False) -> bool:
    """Whether ours can be chosen for this layer, whatever the images.

    Args:
        layer: any module.
        pools: whether there is a max-pooling in the same model.
    """
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or layer.kernel_size[0] not in SIZES:
        return False
    if (*layer.stride, *layer.dilation) != (1, 1, 1, 1) or layer.kernel_size[0] != layer.kernel_size[1]:
        return False
    inside, outside = layer.in_channels, layer.out_channels
    forward = outside <= MOST_CHANNELS and inside <= 4 * MOST_CHANNELS
    if pools and outside <= MOST_OUTSIDE and fills_lanes(inside, layer.kernel_size[0]):
        return True
    # Of a first layer with more outputs than that, all that could pay is the gradient of images, which nobody asks for.
    return forward or (4 <= inside <= MOST_CHANNELS and outside <= 2 * MOST_CHANNELS)


def plain(
    image: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int
) -> bool:
    """Whether this is the kind of convolution that the kernels were written for."""
    return (
        groups == 1
        and not transposed
        and weight.dim() == 4
        and weight.shape[2] == weight.shape[3]
        and weight.shape[2] in SIZES
        and all(step == 1 for step in (*stride, *dilation))
        and image.dim() == 4
        and image.shape[1] == weight.shape[1]
        and fits(image)
        and fits(weight)
    )


def sizes(image: Tensor, weight: Tensor, padding: Sequence[int]) -> Any:
    """The sizes the kernels are called with, as an array of C; None for empty ones, or a padding as wide as the kernel."""
    samples, inside, height, width = image.shape
    outside, size = weight.shape[0], weight.shape[2]
    high, wide = padding[0], padding[-1]
    out_height, out_width = height + 2 * high - size + 1, width + 2 * wide - size + 1
    if min(samples, inside, outside, height, width, out_height, out_width) < 1:
        return None
    if not (0 <= high < size and 0 <= wide < size):
        return None
    return _SHAPE(samples, inside, outside, height, width, out_height, out_width, size, high, wide)


def turned(shape: Any) -> Any:
    """Sizes of the convolution that turns the gradient of an output into that of the input."""
    samples, inside, outside, height, width, out_height, out_width, size, high, wide = shape
    return _SHAPE(
        samples, outside, inside, out_height, out_width, height, width, size, size - 1 - high, size - 1 - wide
    )


def convolve(
    library: ctypes.CDLL, image: Tensor, weight: Tensor, bias: Tensor | None, shape: Any, back: bool
) -> Tensor | None:
    """Convolve; None where a weight is not finite.

    Args:
        library: from `load_convolutions`.
        image: (N, C, H, W).
        weight: (outputs, C, size, size); with `back` that of the convolution to go back through.
        bias: (outputs,), or None.
        shape: from `sizes`.
        back: whether this turns a gradient of an output into that of an input.
    """
    out = image.new_empty((shape[0], shape[2], shape[5], shape[6]))
    scratch = scratch_for(library.shardwise_conv2d_scratch, shape)
    done = library.shardwise_conv2d(
        image.data_ptr(), weight.data_ptr(), place(bias), out.data_ptr(), scratch.data_ptr(), shape, back
    )
    return out if done else None


def weight_gradient(
    library: ctypes.CDLL, image: Tensor, weight: Tensor, slope: Tensor, shape: Any, with_bias: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Gradients of the weights and, if asked for, of the bias; None where one is not finite, for torch to look at.

    Args:
        library: from `load_convolutions`.
        image: (N, C, H, W), the convolution's input.
        weight: (outputs, C, size, size).
        slope: the gradient of its output.
        shape: from `sizes`.
        with_bias: whether there is a bias that needs one.
    """
    of_weight = torch.empty_like(weight)
    of_bias = weight.new_empty(weight.shape[0]) if with_bias else None
    scratch = scratch_for(library.shardwise_conv2d_scratch, shape)
    done = library.shardwise_conv2d_weight(
        image.data_ptr(), slope.data_ptr(), of_weight.data_ptr(), place(of_bias), scratch.data_ptr(), shape
    )
    return (of_weight, of_bias) if done else None


def sparse_gradients(
    library: ctypes.CDLL, image: Tensor, weight: Tensor, slope: Tensor, shape: Any, wanted: Sequence[bool],
    most: tuple[float, float],
) -> Gradients:  # fmt: skip
    """Those gradients of image, weights and bias that are wanted and that the zeros of `slope` make cheap; None for others.

    Args:
        library: from `load_convolutions`.
        image: (N, C, H, W), the convolution's input.
        weight: (outputs, C, size, size).
        slope: the gradient of its output.
        shape: from `sizes`.
        wanted: of image, weights and bias. The bias comes with the weights alone.
        most: what may be left of `slope`, see `most_filled`.
    """
    for_image, for_weight, for_bias = wanted
    of_image = torch.empty_like(image) if for_image and most[1] > 0 else None
    of_weight = torch.empty_like(weight) if for_weight and most[0] > 0 else None
    of_bias = weight.new_empty(weight.shape[0]) if of_weight is not None and for_bias else None
    scratch = scratch_for(library.shardwise_conv2d_sparse_scratch, shape)
    done = library.shardwise_conv2d_sparse(
        image.data_ptr(), weight.data_ptr(), slope.data_ptr(), place(of_weight), place(of_bias), place(of_image),
        scratch.data_ptr(), shape, *most,
    )  # fmt: skip
    return of_image if done & 1 else None, of_weight if done & 2 else None, of_bias if done & 2 else None


def scratch_for(floats: Callable[[Any], int], shape: Any) -> Tensor:
    """The memory that a kernel works in, zeros.

    Args:
        floats: the library's function that says how much.
        shape: from `sizes`.
    """
    return torch.zeros(floats(shape), dtype=torch.float32)


def place(tensor: Tensor | None) -> int | None:
    """Where a tensor's values are, for C; None for none."""
    return None if tensor is None else tensor.data_ptr()


def fits(tensor: Tensor) -> bool:
    """Planar float32 on the CPU. With one channel a tensor can be planar and channels_last at once; its stride says which."""
    if not tensor.is_cpu or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        return False
    return tensor.dim() != 4 or tensor.stride(1) == tensor.shape[2] * tensor.shape[3]
