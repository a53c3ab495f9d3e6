"""Seconds of matrix products, attention and element-wise kernels on one device.

Letters: M, N, K are rows, columns and inner dimension of a product; T tokens of a micro-batch on this rank.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from shardwise.planner.case import BYTES, NARROW, Case
from shardwise.planner.constants import Constants
from shardwise.spec.machine import Accelerator

TILES = ((256, 128, 1.0), (128, 128, 0.94), (128, 64, 0.75), (64, 64, 0.55))
"""Output tiles of matrix kernels and the rate of each over the largest; a library picks the fastest for a shape."""

ALIGNMENT = 8
"""Elements of 2 bytes that make the 16 bytes one load moves (NVIDIA, Matrix Multiplication Background, 2023)."""

UNALIGNED_SHARE = 0.35
"""Rate of a product whose dimensions are not multiples of `ALIGNMENT`; a requirement of units for matrices alone (the same guide,
"Tensor Core requirements")."""

TENSOR_SHARE = 0.2
"""Rate of fp32 over that of 16 bits above which fp32 products run on units for matrices."""

CAST_BYTES = 2.0
"""Bytes moved per operand value of an fp8 product. A tensor is cast and transposed in one pass, reading 2 and writing 1 + 1,
and serves two of the three products of a linear map (Transformer Engine, fused cast and transpose)."""

FP4_CAST_BYTES = 2.5
"""The same for fp4, whose scale for the whole tensor has to be known before the blocks are scaled: reading 2 for the maximum of
the rotated values, then reading 2 and writing 1/2 + 1/2 (arXiv:2509.25149, section 2 and 4; Transformer Engine,
`hadamard_transform_amax`)."""

A100_UNIT_FLOPS = 312e12 / 108
"""FLOP/s of one multiprocessor of the part for which `matmul_inner_half` is stated (NVIDIA A100 datasheet)."""

FEW_UNITS = 32
"""Parts with fewer units than this are not built of multiprocessors."""

ARRAY_WIDTH = 128
"""Rows and columns of a systolic array; kernels pad heads to multiples of it (JAX, splash attention, issues 26433 and 30861)."""

SMALL_HEAD = 128
"""Width of a head below which fused attention loses rate (FlashAttention-2, figure 4: 64 against 128)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of one accelerator at one precision, with the constants applied: FLOP/s and bytes/s.

    `batched_flops` and `batched_inner_half` are those of products that stay in 16 bits; `flash2_flops` is the attention of
    software that has FlashAttention-2; `aligned`: products lose rate where dimensions are no multiples of `ALIGNMENT`.
    """

    matmul_flops: float
    attention_flops: float
    flash2_flops: float
    batched_flops: float
    memory_bytes: float
    units: int
    inner_half: float
    batched_inner_half: float
    kernel_seconds: float
    element: int
    cast_bytes: float
    aligned: bool = True

    def unquantized(self) -> "Device":
        """The same for a product whose operands stay in 16 bits."""
        return replace(self, matmul_flops=self.batched_flops, inner_half=self.batched_inner_half, cast_bytes=0.0)


@dataclass(frozen=True)
class Work:
    """Time on the device and number of kernels, so that the host's launch time can be compared with it."""

    seconds: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.seconds + other.seconds, self.kernels + other.kernels)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.seconds - other.seconds, self.kernels - other.kernels)

    def times(self, factor: float) -> "Work":
        """So many repetitions."""
        return Work(self.seconds * factor, self.kernels * factor)

    def graphed(self) -> "Work":
        """The same in a graph that the host launches with one call."""
        return Work(self.seconds)


ENGINE_CASTS = {"fp8": 1.0 / 3.0, "fp4": 2.0 / 3.0}
"""Share of the casts that Transformer Engine does by themselves: those of output gradients. Inputs are cast by the norm or the
activation before, unless their scale depends on all of them; weights once a step (its documentation, `fp8_autocast` and
`is_first_microbatch`)."""

ENGINE_ATTENTION = {
    ("h100", "h200", "h800", "gh200"): 0.54,
    ("b100", "b200", "gb200"): 0.58,
    ("b300", "gb300"): 0.64,
}
"""Rate of cuDNN's attention, forward and backward, over the half-precision peak; generation by the start of the name.

Hopper: FlashAttention-2's rate there times 609/370, the ratio of both at 4,096 tokens and head width 128 (FlashAttention-3,
arXiv:2407.08608, figure 5). Blackwell: causal, head width 128, 4,096 to 16,384 tokens, 3.5 / (1 / forward + 2.5 / backward)
extended to endless sequences: 1,450 TFLOP/s on GB200, 1,600 on GB300, whose units for exponentials are twice as fast (NVIDIA,
cudnn-frontend, benchmark/sdpa_benchmark_training/results/llama3.1, 2026; the same gives 600 on H200)."""


FLASH2_PARTS = ("a100", "a800", "a30-", "a40-", "a10g", "a6000", "l4-", "l40s", "rtx", "ascend910b")
"""Parts on which the attention of software since FlashAttention-2 (July 2023) runs at the published rate of its kernel in
training too: Ampere, which it was written for, Ada, which runs the same code, and one whose kernels are of that time.
`attention_rate` is for the kernels before it (FlashAttention-2 is about twice as fast as the first: arXiv:2307.08691,
figure 4) and for younger parts, whose kernels do not reach their published rates in training."""


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
    attention = accelerator.attention_fraction.value
    if engine:
        known = (rate for names, rate in ENGINE_ATTENTION.items() if accelerator.name.startswith(names))
        attention = next(known, attention)
    flash2 = 1.0 if not engine and accelerator.name.startswith(FLASH2_PARTS) else constants.attention_rate
    units = int(accelerator.multiprocessors.value)
    scale = peaks[half].value if precision != "fp32" else peaks["fp32"].value
    return Device(
        matmul_flops=rate,
        attention_flops=scale * attention * constants.attention_rate,
        flash2_flops=scale * attention * flash2,
        batched_flops=half_rate,
        memory_bytes=accelerator.memory_bytes_per_second.value * constants.memory_rate,
        units=units,
        inner_half=constants.matmul_inner_half * _startup_factor(peaks[used].value, units),
        batched_inner_half=constants.matmul_inner_half * _startup_factor(peaks[half].value, units),
        kernel_seconds=constants.kernel_seconds,
        element=BYTES[precision],
        cast_bytes=_cast_bytes(used, engine),
        aligned=on_tensor_units(accelerator, used),
    )


def on_tensor_units(accelerator: Accelerator, precision: str) -> bool:
    """Whether products at `precision` run on units for matrices; fp32 on older parts and on AMD's runs on the ordinary ones.

    TF32 has half the rate of 16 bits (A100), the ordinary units an eighth or less, where units for matrices are there at all.
    """
    peaks = accelerator.peak_flops
    return precision != "fp32" or peaks["fp32"].value >= TENSOR_SHARE * max(one.value for one in peaks.values())


def _cast_bytes(precision: str, engine: bool) -> float:
    """Bytes moved per operand value of a product at `precision`."""
    if precision not in NARROW:
        return 0.0
    whole = FP4_CAST_BYTES if precision == "fp4" else CAST_BYTES
    return whole * (ENGINE_CASTS[precision] if engine else 1.0)


def _startup_factor(peak_flops: float, units: float) -> float:
    """Inner steps in which a tile starts up and drains, over those of an A100.

    That takes a constant time, in which a faster unit would do more steps and a slower one fewer. At most three, and one for
    parts whose few units are systolic arrays: their products are not cut into such tiles.
    """
    return 1.0 if units < FEW_UNITS else min(3.0, peak_flops / units / A100_UNIT_FLOPS)


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
    if device.aligned and (rows % ALIGNMENT or columns % ALIGNMENT or inner % ALIGNMENT):
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

    Fused: 2 T S h FLOPs forward (causal half), 2.5 times that backward (FlashAttention-2, section 3). Which fused kernel, only
    the age of the model tells: gated feed-forward layers came with Llama (February 2023), and what trains those has
    FlashAttention-2.
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
        if device.units < FEW_UNITS:
            narrow = model.head_dim / (ARRAY_WIDTH * math.ceil(model.head_dim / ARRAY_WIDTH))
        saturation = 1.0 + 512.0 / seq_len
        rate = device.flash2_flops if model.gated_ffn else device.attention_flops
        forward = flops * saturation / (rate * narrow)
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


def adam_seconds(parameters: float, device: Device, pure: bool = False) -> float:
    """Seconds of one fused Adam step over `parameters` values on this rank, `pure` in bf16 alone.

    Per value: gradient 4 bytes read for the norm and 4 for the update, master weight and two moments 12 bytes read and
    written, working copy 2 written, gradient 4 cleared: 38 bytes. In bf16 alone: gradient 2 and 2, weight and moments 6 read and
    6 written, gradient 2 cleared: 18.
    """
    return (18.0 if pure else 38.0) * parameters / device.memory_bytes
