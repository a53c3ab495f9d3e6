"""Rates of operations by kind and size, on as many processes at once as share the machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from shardwise.dist.collectives import Group
from shardwise.kernels.install import use_all_kernels
from shardwise.parallel.norm import BatchState, globalize_batch_norm
from shardwise.probe.operations import by_flops, flops_of, moved_bytes, name_of, size_bytes, table_bytes, tensors_in
from shardwise.spec.measured import DIVIDED_NORMS, THIN_ROWS, KernelRate

aten = torch.ops.aten

ENOUGH_SECONDS = 0.012
"""Time spent on one figure, after the first call has warmed up; long enough for a clock of microseconds."""

BATCHES = 8
"""The fastest of so many batches counts: the one that other programs on the machine disturbed least."""


@dataclass(frozen=True)
class Sample:
    """One operation to time: `call()` runs it once; `size` is its FLOPs or the bytes it moves."""

    kind: str
    precision: str
    size: float
    call: Callable[[], object]


def samples(sizes: int = 3) -> Iterator[Sample]:
    """What is timed, smallest first: products, convolutions, recurrent layers, attention, and what only moves data."""
    yield from _products(sizes)
    yield from _convolutions(sizes)
    yield from _attention()
    for kind, call in _moving(sizes):
        yield _sample(kind, "fp32", *call)
    yield from _divided_norms(sizes)
    # last, so that the others are timed in a process that has done what it had before these were added (docs/notes.md)
    yield from _thin(sizes)


def kernel_rates(workers: int, threads: int, meet: Callable[[], None], sizes: int = 3) -> list[KernelRate]:
    """Rates of one process; `meet` is called before each figure and waits for the other processes.

    Args:
        workers: processes that call this at the same time.
        threads: compute threads of this one, set already.
        meet: a barrier over these processes.
        sizes: how many sizes of each kind, from the smallest.
    """
    use_all_kernels()
    rates = []
    with torch.no_grad():
        for sample in samples(sizes):
            seconds = seconds_of(sample.call, meet)
            rates.append(
                KernelRate(
                    kind=sample.kind,
                    precision=sample.precision,
                    size=sample.size,
                    workers=workers,
                    threads=threads,
                    per_second=sample.size / seconds,
                )
            )
    return rates


def seconds_of(
    call: Callable[[], object],
    meet: Callable[[], None] = lambda: None,
    enough_seconds: float = ENOUGH_SECONDS,
) -> float:
    """Seconds of one call."""
    call()
    began = time.perf_counter()
    call()
    once = max(1e-7, time.perf_counter() - began)
    repeats = max(1, min(2000, round(enough_seconds / BATCHES / once)))
    batches = BATCHES if repeats > 1 else max(2, min(BATCHES, round(enough_seconds / once)))
    meet()
    times = []
    for _ in range(batches):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - began) / repeats)
    return min(times)


def call_overheads() -> tuple[float, float]:
    """(seconds of the shortest operation, what its gradient adds: graph, engine and the accumulation of it)."""
    small = torch.ones(8)
    with torch.no_grad():
        forward = seconds_of(lambda: small * 1.0)
    length = 50
    leaf = torch.ones(8, requires_grad=True)

    def chain() -> None:
        value = leaf
        for _ in range(length):
            value = value * 1.0
        value.sum().backward()

    both = seconds_of(chain) / length
    return forward, max(1e-7, both - 2 * forward)


def _products(sizes: int) -> Iterator[Sample]:
    for precision, dtype, edges in (
        ("fp32", torch.float32, (16, 64, 128, 256, 512)[: sizes + 2]),
        ("bf16", torch.bfloat16, (64, 256)[:sizes]),
    ):
        for edge in edges:
            a, b = torch.ones(edge, edge, dtype=dtype), torch.ones(edge, edge, dtype=dtype)
            yield _sample("matmul", precision, aten.mm.default, a, b)


def _thin(sizes: int) -> Iterator[Sample]:
    """A layer's products for a handful of samples: forward, and the gradients of its inputs and weights, one a size."""
    for edge in (128, 512, 1536)[:sizes]:
        x, weight = torch.ones(THIN_ROWS, edge), torch.ones(edge, edge)
        yield _sample("thin", "fp32", aten.mm.default, x, weight.t())


def _convolutions(sizes: int) -> Iterator[Sample]:
    shapes = ((8, 3, 6, 32, 5, 0), (16, 16, 32, 16, 3, 1), (16, 64, 64, 16, 3, 1))[:sizes]
    for batch, inside, outside, edge, kernel, padding in shapes:
        x, weight = torch.ones(batch, inside, edge, edge), torch.ones(outside, inside, kernel, kernel)
        setting = ([1, 1], [padding, padding], [1, 1], False, [0, 0], 1)
        yield _sample("convolution", "fp32", aten.convolution.default, x, weight, None, *setting)
        out = F.conv2d(x, weight, padding=padding)
        masks = ([outside], *setting, [True, True, True])
        yield _sample("convolution_backward", "fp32", aten.convolution_backward.default, out, x, weight, *masks)


def _divided_norms(sizes: int) -> Iterator[Sample]:
    """BatchNorm as ranks compute it that take its statistics together, without their messages; forward and backward."""
    for shape in ((4, 64, 8, 8), (8, 16, 32, 32), (16, 64, 32, 32))[:sizes]:
        layer = nn.BatchNorm2d(shape[1])
        globalize_batch_norm(layer, Group(), BatchState())
        x, slope = torch.rand(shape, requires_grad=True), torch.rand(shape)
        with torch.enable_grad():
            out = layer(x)
        given = [x, *layer.parameters()]
        backward = functools.partial(torch.autograd.grad, out, given, slope, retain_graph=True)
        for kind, tensors, call in (
            ("native_batch_norm", 2, functools.partial(layer, x)),
            ("native_batch_norm_backward", 3, backward),
        ):
            yield Sample(DIVIDED_NORMS[kind], "fp32", float(tensors * size_bytes(x)), call)


def _attention() -> Iterator[Sample]:
    q = torch.ones(4, 4, 128, 32)
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    out, logsum = forward(q, q, q, 0.0, True)
    yield _sample("attention", "fp32", forward, q, q, q, 0.0, True)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    yield _sample("attention_backward", "fp32", backward, out, q, q, q, out, logsum, 0.0, True)


def _moving(sizes: int) -> Iterator[tuple[str, tuple[object, ...]]]:
    """(kind, operation and arguments): element-wise, normalisation, pooling, look-up, and their backward forms."""
    for count in (4 * 1024, 256 * 1024, 4 * 1024 * 1024)[:sizes]:
        x = torch.rand(count)
        yield "copy", (aten.add.Tensor, x, x)
    x = torch.rand(512, 256)
    rows, inverse = aten.native_layer_norm.default(x, [256], None, None, 1e-5)[1:]
    probabilities = torch.softmax(x, 1)
    ids = torch.arange(512) % 100
    images = torch.rand(8, 16, 32, 32)
    pool = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    pooled, places = aten.max_pool2d_with_indices.default(images, *pool)
    ones = torch.ones(16)
    norm = aten.native_batch_norm.default(images, ones, ones, None, None, True, 0.1, 1e-5)
    groups = aten.native_group_norm.default(images, ones, ones, 8, 16, 1024, 4, 1e-5)
    yield "gelu", (aten.gelu.default, x)
    yield "gelu_backward", (aten.gelu_backward.default, x, x)
    yield "tanh", (aten.tanh.default, x)
    yield "sigmoid", (aten.sigmoid.default, x)
    yield "bernoulli_", (aten.bernoulli_.float, x.clone(), 0.5)
    yield "_softmax", (aten._softmax.default, x, 1, False)
    yield "_softmax_backward_data", (aten._softmax_backward_data.default, x, probabilities, 1, torch.float32)
    yield "_log_softmax", (aten._log_softmax.default, x, 1, False)
    yield "_log_softmax_backward_data", (aten._log_softmax_backward_data.default, x, x, 1, torch.float32)
    yield "native_layer_norm", (aten.native_layer_norm.default, x, [256], None, None, 1e-5)
    masks = [True, False, False]
    yield (
        "native_layer_norm_backward",
        (aten.native_layer_norm_backward.default, x, x, [256], rows, inverse, None, None, masks),
    )
    yield "max_pool2d_with_indices", (aten.max_pool2d_with_indices.default, images, *pool)
    yield (
        "max_pool2d_with_indices_backward",
        (aten.max_pool2d_with_indices_backward.default, pooled, images, *pool, places),
    )
    yield "native_batch_norm", (aten.native_batch_norm.default, images, ones, ones, None, None, True, 0.1, 1e-5)
    saved = (ones, None, None, norm[1], norm[2], True, 1e-5, [True, True, True])
    yield "native_batch_norm_backward", (aten.native_batch_norm_backward.default, images, images, *saved)
    yield "native_group_norm", (aten.native_group_norm.default, images, ones, ones, 8, 16, 1024, 4, 1e-5)
    saved_groups = (groups[1], groups[2], ones, 8, 16, 1024, 4, [True, True, True])
    yield "native_group_norm_backward", (aten.native_group_norm_backward.default, images, images, *saved_groups)
    yield "embedding", (aten.embedding.default, x, ids)
    yield "embedding_dense_backward", (aten.embedding_dense_backward.default, x, ids, 100, -1, False)


def _sample(kind: str, precision: str, operation: object, *args: object) -> Sample:
    call: Callable[..., object] = operation  # type: ignore[assignment]  # an overload of torch, which has no type
    out = call(*args)
    name = name_of(operation)
    if by_flops(kind):
        size = flops_of(operation, name, args, {}, out)
    elif name == name.rstrip("_"):
        size = table_bytes(name, tensors_in(args), tensors_in(out))
    else:
        size = moved_bytes(tensors_in(args), tensors_in(out))
    return Sample(kind, precision, size, lambda: call(*args))
