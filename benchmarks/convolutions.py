"""The compiled convolutions against torch's, over sizes drawn at random: where they pay, and whether the rule holds.

    python benchmarks/convolutions.py [--seconds 40] [--seed 1] [--all] [--pooled] [--out results.json]

Processor time of one thread, both sides in turns, second best of five, for each of forward pass, gradient of the input,
and gradient of weights and bias. Sizes that the rule (`shardwise.kernels.convolution.pays`) does not choose are left out
unless `--all` asks for them: a rule is made from `--all` with one seed, and tested without it, with another.

Gradients that are mostly zero, as much left of them as the rule accepts, are compared with the better of the others
that the rule chooses: "sparse weight" and "sparse image".

With `--pooled`: a convolution with max-pooling behind it, forward and backward at once, against one after the other by the
kernels that are chosen for each, ours or torch's (`shardwise.kernels.pooled.pays`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.kernels.convolution import (
    MOST_CHANNELS,
    MOST_INSIDE,
    convolve,
    fills_lanes,
    most_filled,
    pays,
    sizes,
    sparse_gradients,
    turned,
    weight_gradient,
)
from shardwise.kernels.install import use_all_kernels
from shardwise.kernels.library import load_convolutions
from shardwise.kernels.pooled import fuses, pooled, pooled_gradients
from shardwise.kernels.pooled import pays as fused

CALL_SECONDS = 15e-6
"""Added to ours: the way from torch's operator through Python, measured on a layer of no size (8 us forward, 20 backward)."""

MOST_OPERATIONS = 4e8


def _seconds(work: Callable[[], Any], times: int) -> float:
    began = time.thread_time()
    for _ in range(times):
        work()
    return (time.thread_time() - began) / times


def compare(theirs: Callable[[], Any], ours: Callable[[], Any], times: int) -> float:
    """Torch's time over ours."""
    theirs()
    ours()
    pairs = [(_seconds(theirs, times), _seconds(ours, times)) for _ in range(5)]
    first, second = (sorted(side)[1] for side in zip(*pairs, strict=True))
    ratio: float = first / (second + CALL_SECONDS)
    return ratio


def one_size(kernels: ctypes.CDLL, draw: random.Random, everything: bool, pooling: bool) -> dict[str, float]:
    """Draw a size; ratios of what was compared, none where the size makes no sense or is too large."""
    samples, size = draw.choice((1, 10, 32, 50, 128)), draw.choice((3, 5, 7))
    inside, outside = (draw.choice((1, 2, 3, 4, 6, 8, 12, 16, 24, 32)) for _ in range(2))
    width, padding = draw.choice((8, 12, 14, 16, 20, 28, 32, 40, 48, 64, 96)), draw.randrange(min(4, size))
    image, weight, bias = torch.randn(samples, inside, width, width), torch.randn(outside, inside, size, size), None
    shape = sizes(image, weight, (padding, padding))
    if shape is None:
        return {}
    operations = 2.0 * weight.numel() * samples * shape[5] * shape[6]
    if operations > MOST_OPERATIONS:
        return {}
    bias, slope = torch.randn(outside), torch.randn(samples, outside, shape[5], shape[6])
    rest = ([1, 1], [padding] * 2, [1, 1], False, [0, 0], 1)

    def back(*wanted: bool) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(slope, image, weight, [outside], *rest, wanted)

    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any], bool]] = {
        "forward": (
            lambda: torch.ops.aten.convolution(image, weight, bias, *rest),
            lambda: convolve(kernels, image, weight, bias, shape, back=False),
            outside <= MOST_CHANNELS,
        ),
        "image": (
            back(True, False, False),
            lambda: convolve(kernels, slope, weight, None, turned(shape), back=True),
            inside <= MOST_CHANNELS,
        ),
        "weight": (
            back(False, True, True),
            lambda: weight_gradient(kernels, image, weight, slope, shape, with_bias=True),
            True,
        ),
    }
    sides |= _sparse_sides(kernels, image, weight, slope, shape, rest, sides, everything)
    if pooling:
        sides = {"pooled": _pooled_sides(image, weight, bias, shape, rest)} if everything or fused(shape) else {}
    times = max(1, min(30, int(3e7 / operations)))
    found = {
        what: compare(theirs, ours, times)
        for what, (theirs, ours, possible) in sides.items()
        if possible and (everything or what == "pooled" or what.startswith("sparse") or pays(what, shape))
    }
    place = {"samples": samples, "inside": inside, "outside": outside, "width": width, "size": size, "padding": padding}
    return {**place, **found} if found else {}


def _pooled_sides(
    image: Tensor, weight: Tensor, bias: Tensor, shape: Any, rest: Any
) -> tuple[Callable[[], Any], Callable[[], Any], bool]:
    """Convolution, max-pooling and their gradients: one after the other, each by whichever kernel is chosen, and at once."""
    possible = fuses(shape[1], shape[7]) and min(shape[5], shape[6]) >= 2
    behind = torch.randn(shape[0], shape[2], shape[5] // 2, shape[6] // 2)
    wanted = (shape[1] > 3, True, True)  # of images only where they are no pictures
    window = ([2, 2], [2, 2], [0, 0], [1, 1], False)

    def apart() -> Any:
        out = torch.ops.aten.convolution(image, weight, bias, *rest)
        _, index = torch.ops.aten.max_pool2d_with_indices(out, *window)
        slope = torch.ops.aten.max_pool2d_with_indices_backward(behind, out, *window, index)
        return torch.ops.aten.convolution_backward(slope, image, weight, [weight.shape[0]], *rest, wanted)

    def at_once() -> Any:
        done = pooled(image, weight, bias, shape, relu=False)
        assert done is not None
        return pooled_gradients(image, weight, behind, done[1], shape, wanted)

    return apart, at_once, possible


def _sparse_sides(
    kernels: ctypes.CDLL,
    image: Tensor,
    weight: Tensor,
    slope: Tensor,
    shape: Any,
    rest: Any,
    dense: dict[str, Any],
    everything: bool,
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], bool]]:
    """What is left of a gradient, by our kernel for that; the other side takes what the rule chooses without it."""
    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any], bool]] = {}
    possible = shape[1] <= MOST_INSIDE and fills_lanes(shape[1], shape[7])
    kinds = ("weight", "image"), most_filled(shape), ((False, True, True), (True, False, False))
    for what, most, wanted in zip(*kinds, strict=True):
        left = (most if most > 0 else 0.25) - 0.01
        few = slope * (torch.rand(slope.shape) < left)

        def by_torch(few: Tensor = few, wanted: Any = wanted) -> Any:
            return torch.ops.aten.convolution_backward(few, image, weight, [weight.shape[0]], *rest, wanted)

        def by_ours(few: Tensor = few, wanted: Any = wanted) -> Any:
            return sparse_gradients(kernels, image, weight, few, shape, wanted, (1.0, 1.0))

        # Dense kernels take as long for zeros as for anything else.
        sides[f"sparse {what}"] = (
            dense[what][1] if pays(what, shape) else by_torch,
            by_ours,
            possible and (everything or most > 0),
        )
    return sides


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="also sizes that the rule does not choose")
    parser.add_argument("--pooled", action="store_true", help="convolutions with max-pooling behind them instead")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kernels = load_convolutions()
    if kernels is None:
        raise SystemExit("no compiled convolutions here: they need a C compiler at installation, and AVX-512")
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    if arguments.pooled:
        use_all_kernels()  # the other side is what there would be without them
    draw, rows, end = random.Random(arguments.seed), [], time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        row = one_size(kernels, draw, arguments.all, arguments.pooled)
        if row:
            rows.append(row)
    for what in ("forward", "image", "weight", "sparse image", "sparse weight", "pooled"):
        ratios = sorted(row[what] for row in rows if what in row)
        if ratios:
            print(
                f"{what:13s} {len(ratios):4d} sizes, times faster: least {ratios[0]:.2f}, 5 % {ratios[len(ratios) // 20]:.2f}, "
                f"median {statistics.median(ratios):.2f}, most {ratios[-1]:.1f}; slower {sum(r < 1 for r in ratios)}"
            )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
