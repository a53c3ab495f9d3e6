"""Seconds of matrix products, attention and element-wise kernels on one device.

Letters: M, N, K are rows, columns and inner dimension of a product; T tokens of a micro-batch on this rank.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from shardwise.planner.case import BYTES, NARROW, Case
from shardwise.planner.constants import Constants
from shardwise.spec.machine import Accelerator

TILES = ((256, 128, 1.0), (128, 128, 0.94), (128, 64, 0.75), (64, 64, 0.55))
"""Output tiles of matrix kernels and the rate of each over the largest; a library picks the fastest for a shape."""

ALIGNMENT = 8
"""Elements of 2 bytes that make the 16 bytes one load moves (NVIDIA, Matrix Multiplication Background, 2023)."""

UNALIGNED_SHARE = 0.35
"""Rate of a product whose dimensions are not multiples of `ALIGNMENT`."""

CAST_BYTES = 2.0
"""Bytes moved per operand value of an fp8 product. A tensor is cast and transposed in one pass, reading 2 and writing 1 + 1,
and serves two of the three products of a linear map (Transformer Engine, fused cast and transpose)."""

A100_UNIT_FLOPS = 312e12 / 108
"""FLOP/s of one multiprocessor of the part for which `matmul_inner_half` is stated (NVIDIA A100 datasheet)."""

FEW_UNITS = 32
"""Parts with fewer units than this are not built of multiprocessors."""

SMALL_HEAD = 128
"""Width of a head below which fused attention loses rate (FlashAttention-2, figure 4: 64 against 128)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of one accelerator at one precision, with the constants applied: FLOP/s and bytes/s."""

    matmul_flops: float
    attention_flops: float
    batched_flops: float
    memory_bytes: float
    units: int
    inner_half: float
    kernel_seconds: float
    element: int
    cast_bytes: float


@dataclass(frozen=True)
class Work:
    """Time on the device and number of kernels, so that the host's launch time can be compared with it."""

    seconds: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.seconds + other.seconds, self.kernels + other.kernels)

    def times(self, factor: float) -> "Work":
        """So many repetitions."""
        return Work(self.seconds * factor, self.kernels * factor)


ENGINE_CASTS = 1.0 / 3.0
"""Share of the casts that Transformer Engine does by themselves: those of output gradients. Inputs are cast by the norm or the
activation before, weights once a step (its documentation, `fp8_autocast` and `is_first_microbatch`)."""

HOPPER = ("h100", "h200", "h800", "gh200")
"""Catalogue names of that generation."""

HOPPER_ENGINE_GAIN = 1.64
"""Attention of cuDNN over FlashAttention-2 on Hopper parts: 609 against 370 TFLOP/s at 4,096 tokens and head width 128
(FlashAttention-3, arXiv:2407.08608, figure 5)."""


def device_rates(accelerator: Accelerator, precision: str, constants: Constants, engine: bool = False) -> Device:
    """Rates of `accelerator` at `precision`; a part without fp4 units falls back to fp8, one without fp8 to bf16.

    Args:
        engine: attention runs in the kernels of cuDNN (`Case.engine`).
    """
    peaks = accelerator.peak_flops
    ladder = (precision, *NARROW[: 1 if precision == "fp4" else 0], "bf16")
    used = next(name for name in ladder if name in peaks)
    half = "bf16" if precision in NARROW else used
    half_rate = peaks[half].value * accelerator.matmul_fraction[half].value * constants.matmul_rate
    rate = peaks[used].value * accelerator.matmul_fraction[used].value * constants.matmul_rate
    gain = HOPPER_ENGINE_GAIN if engine and accelerator.name.startswith(HOPPER) else 1.0
    scale = peaks[half].value if precision != "fp32" else peaks["fp32"].value
    return Device(
        matmul_flops=rate,
        attention_flops=scale * accelerator.attention_fraction.value * constants.attention_rate * gain,
        batched_flops=half_rate,
        memory_bytes=accelerator.memory_bytes_per_second.value * constants.memory_rate,
        units=int(accelerator.multiprocessors.value),
        inner_half=constants.matmul_inner_half * _startup_factor(peaks[used].value, accelerator.multiprocessors.value),
        kernel_seconds=constants.kernel_seconds,
        element=BYTES[precision],
        cast_bytes=CAST_BYTES * (ENGINE_CASTS if engine else 1.0) if used in NARROW else 0.0,
    )


def _startup_factor(peak_flops: float, units: float) -> float:
    """Inner steps in which a tile starts up and drains, over those of an A100.

    That takes a constant time, in which a faster unit would do more steps. Between a half and three, and one for parts
    whose few units are systolic arrays: their products are not cut into such tiles.
    """
    return 1.0 if units < FEW_UNITS else min(3.0, max(0.5, peak_flops / units / A100_UNIT_FLOPS))


@lru_cache(maxsize=200_000)
def matmul_seconds(rows: int, columns: int, inner: int, device: Device, count: int = 1) -> float:
    """Seconds of `count` products (rows x inner) (inner x columns): waves of tiles over the multiprocessors, or memory.

    The last wave of tiles is as long as a full one; a tile starts up and drains in the time of `inner_half` inner steps.
    """
    unit_rate = device.matmul_flops / device.units
    startup = 1.0 + device.inner_half / inner
    best = math.inf
    for tile_rows, tile_columns, share in TILES:
        tiles = count * math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
        waves = _waves(tiles, device.units)
        best = min(best, waves * 2.0 * tile_rows * tile_columns * inner * startup / (unit_rate * share))
    if rows % ALIGNMENT or columns % ALIGNMENT or inner % ALIGNMENT:
        best /= UNALIGNED_SHARE
    moved = count * float(rows * inner + inner * columns + rows * columns) * device.element / device.memory_bytes
    casts = count * device.cast_bytes * float(rows * inner + inner * columns) / device.memory_bytes
    return max(best, moved, device.kernel_seconds) + casts


def _waves(tiles: int, units: int) -> float:
    """Rounds of tiles over the units: a last, partial round is full for half of the kernels, and split up by the others."""
    return max(1.0, 0.5 * (tiles / units + math.ceil(tiles / units)))


def product(rows: int, columns: int, inner: int, device: Device, count: int = 1) -> tuple[Work, Work]:
    """Forward and backward work of a linear map: the backward pass has one product for the input, one for the weight."""
    rows, columns, inner, count = max(1, rows), max(1, columns), max(1, inner), max(1, count)
    forward = matmul_seconds(rows, columns, inner, device, count)
    backward = matmul_seconds(rows, inner, columns, device, count) + matmul_seconds(inner, columns, rows, device, count)
    casts = 2 if device.cast_bytes else 0
    return Work(forward, 1 + casts), Work(backward, 2 + casts)


def traffic(moved_bytes: float, kernels: float, device: Device) -> Work:
    """Element-wise work: bytes through memory, at least the shortest kernel each."""
    return Work(max(moved_bytes / device.memory_bytes, kernels * device.kernel_seconds), kernels)


def attention_core(case: Case, device: Device) -> tuple[Work, Work]:
    """Forward and backward of scores, softmax and weighted values of one layer on one rank.

    Fused: 2 T S h FLOPs forward (causal half), 2.5 times that backward (FlashAttention-2, section 3).
    Materialised: both batched products in full plus the passes of softmax and dropout over the score matrix with the
    mask fused in: 8 bytes a score forward, 10 backward, beside what the products read and write.
    """
    model = case.model
    heads = max(1, math.ceil(model.heads / case.tensor))
    tokens, seq_len = case.tokens, case.seq_len
    width = heads * model.head_dim
    if case.attention == "flash":
        flops = 2.0 * tokens * seq_len * width
        narrow = min(1.0, model.head_dim / SMALL_HEAD) ** 0.25
        saturation = 1.0 + 512.0 / seq_len
        forward = flops * saturation / (device.attention_flops * narrow)
        moved = 4.0 * tokens * width * device.element / device.memory_bytes
        return Work(max(forward, moved, device.kernel_seconds), 1), Work(
            max(2.5 * forward, 3 * moved, 2 * device.kernel_seconds), 3
        )
    batch = case.micro_batch * heads
    rows = math.ceil(seq_len / case.context)
    scores = float(batch) * rows * seq_len
    first = matmul_seconds(rows, seq_len, model.head_dim, device, batch) + matmul_seconds(
        rows, model.head_dim, seq_len, device, batch
    )
    soft_forward = traffic(4.0 * device.element * scores, 2, device)
    soft_backward = traffic(5.0 * device.element * scores, 2, device)
    return Work(first, 2) + soft_forward, Work(2.0 * first, 4) + soft_backward


def adam_seconds(parameters: float, device: Device) -> float:
    """Seconds of one fused Adam step over `parameters` values on this rank.

    Per value: gradient 4 bytes read for the norm and 4 for the update, master weight and two moments 12 bytes read and
    12 written, working copy 2 written, gradient 4 cleared: 38 bytes.
    """
    return 38.0 * parameters / device.memory_bytes
