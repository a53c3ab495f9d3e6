"""The compiled max-pooling against torch's own, bit for bit: values, indices, and what goes around it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardwise.kernels import install, library, pooling
from shardwise.kernels.install import replace, use_fast_kernels
from shardwise.kernels.library import built, open_library
from shardwise.kernels.pooling import pool

LEVELS = {"plain": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
SHAPES = [(2, 3, 28, 28), (3, 10, 10), (2, 2, 7, 15), (1, 1, 37, 70), (2, 1, 5, 3), (1, 2, 40, 33)]
# kernel, stride, padding, ceil_mode
WINDOWS = [
    ((2, 2), (2, 2), (0, 0), False),
    ((2, 2), (2, 2), (1, 1), True),
    ((3, 3), (2, 2), (1, 1), False),
    ((3, 3), (2, 2), (0, 0), True),
    ((3, 3), (1, 1), (1, 1), False),
    ((2, 3), (1, 2), (1, 0), False),
    ((5, 4), (3, 3), (2, 2), True),
    ((3, 1), (3, 1), (0, 0), False),
]


def native(image: Tensor, kernel: object, stride: object, padding: object, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "MOST_THREADS", 0)  # torch's kernel does it, also where ours was put in its place
        result: tuple[Tensor, Tensor] = torch.ops.aten.max_pool2d_with_indices(
            image, kernel, stride, padding, [1, 1], ceil_mode
        )
    return result


def images(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    plain = torch.randn(shape, generator=generator)
    ties = (plain * 2).round()
    special = ties.clone().view(-1)
    spots = torch.randperm(special.numel(), generator=generator)
    special[spots[: len(spots) // 6]] = float("nan")
    special[spots[len(spots) // 6 : len(spots) // 2]] = -float("inf")
    return [plain, ties, special.view(shape), torch.full(shape, -float("inf")), torch.zeros(shape) * -1]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


def windows_fit(shape: tuple[int, ...], kernel: tuple[int, int], padding: tuple[int, int]) -> bool:
    return all(size + 2 * pad >= side for size, pad, side in zip(shape[-2:], padding, kernel, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_every_build_gives_torchs_bits(level: str) -> None:
    path = built(level)
    able = CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) >= CAPABILITIES.index(LEVELS[level])
    if path is None or not able:
        pytest.skip(f"no {level} build, or a processor that cannot run it")
    kernels = open_library(path)
    compared = 0
    for shape, (kernel, stride, padding, ceil_mode) in itertools.product(SHAPES, WINDOWS):
        if not windows_fit(shape, kernel, padding):
            continue
        for image in images(shape):
            ours = pool(kernels, image, kernel, stride, padding, ceil_mode)
            values, index = native(image, list(kernel), list(stride), list(padding), ceil_mode)
            assert ours is not None
            assert same_bits(ours[0], values), (shape, kernel, stride, padding, ceil_mode)
            assert torch.equal(ours[1], index), (shape, kernel, stride, padding, ceil_mode)
            compared += 1
    assert compared > 200


@pytest.fixture
def in_place() -> torch.library.Library:
    if library.load() is None:
        pytest.skip("no compiled kernels: the package was installed without a C compiler")
    return replace("pooling")


def test_models_and_their_gradients_are_unchanged(in_place: torch.library.Library) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.ReLU(), nn.AdaptiveMaxPool2d(3), nn.MaxPool2d(3, 1, 1)
    )
    image = torch.randn(4, 3, 21, 18, generator=torch.Generator().manual_seed(0)).mul(2).round().requires_grad_()
    wanted = (image, *model.parameters())
    ours = torch.autograd.grad(model(image).square().sum(), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "MOST_THREADS", 0)  # torch's kernel does it all
        theirs = torch.autograd.grad(model(image).square().sum(), wanted)
    assert ours[0].any()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "image",
    [
        torch.arange(98, dtype=torch.float64).view(1, 2, 7, 7),
        torch.arange(98.0).view(1, 2, 7, 7).to(torch.bfloat16),
        torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last),
        torch.randn(1, 2, 7, 14)[..., ::2],
    ],
    ids=["float64", "bfloat16", "channels_last", "strided"],
)
def test_what_it_was_not_written_for_goes_to_torch(in_place: torch.library.Library, image: Tensor) -> None:
    kernels = library.load()
    assert kernels is not None
    assert pool(kernels, image, (2, 2), (2, 2), (0, 0), False) is None
    values, index = nn.functional.max_pool2d_with_indices(image, [2, 2])
    flat = image.flatten(2).gather(2, index.flatten(2)).view(values.shape)
    assert values.dtype == image.dtype
    assert torch.equal(flat, values)
    assert torch.equal(values, nn.functional.unfold(image.double(), 2, stride=2).to(image.dtype).view(
        *image.shape[:2], 4, *values.shape[2:]).amax(2))  # fmt: skip


def test_dilation_and_wrong_sizes_go_to_torch(in_place: torch.library.Library) -> None:
    image = torch.randn(1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    pooled = nn.functional.max_pool2d(image, 2, stride=2, dilation=3)
    assert torch.equal(pooled[0, 0, 0, 0], image[0, 0, [0, 0, 3, 3], [0, 3, 0, 3]].max())
    with pytest.raises(RuntimeError, match="pad should be"):
        nn.functional.max_pool2d(image, 2, padding=2)
    with pytest.raises(RuntimeError, match="too small"):
        nn.functional.max_pool2d(image, 9)


def test_without_a_build_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    replaced: list[str] = []
    monkeypatch.setattr(install, "replace", replaced.append)
    library.load.cache_clear()
    library.load_convolutions.cache_clear()
    try:
        use_fast_kernels(nn.Conv2d(3, 6, 5))
        assert not replaced
        (tmp_path / "_plain.abi3.so").write_bytes(b"of another machine")
        library.load.cache_clear()
        assert library.load() is None
    finally:
        library.load_convolutions.cache_clear()
        library.load.cache_clear()
