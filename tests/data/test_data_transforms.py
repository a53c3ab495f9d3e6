"""Whole-batch transforms and their randomness."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardwise.data.randomness import BatchRandom, fenced, seed_generators
from shardwise.data.transforms import Compose, Flip, Normalize, RandomCrop, ToFloat, as_transform
from shardwise.errors import JobError


def rng(indices: Any, seed: int = 1, epoch: int = 0) -> BatchRandom:
    return BatchRandom(seed, epoch, np.asarray(indices, dtype=np.int64))


def test_numbers_belong_to_samples() -> None:
    whole = rng(range(10))
    first, second, third = whole.uniform(), whole.uniform(2, 3), whole.integers(5, 9, 4)
    part = rng([7, 2])
    assert torch.equal(part.uniform(), first[[7, 2]])
    assert torch.equal(part.uniform(2, 3), second[[7, 2]])
    assert torch.equal(part.integers(5, 9, 4), third[[7, 2]])
    assert not torch.equal(rng(range(10), epoch=1).uniform(), first)
    assert not torch.equal(rng(range(10), seed=2).uniform(), first)
    assert second.unique().numel() == second.numel()


def test_numbers_are_uniform_and_normal() -> None:
    many = rng(range(20000))
    uniform, whole, normal = many.uniform(3), many.integers(-2, 3, 3), many.normal(3)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert torch.histc(uniform, 10, 0, 1).sub(6000).abs().max() < 6 * 6000**0.5
    assert torch.bincount(whole.flatten() + 2).sub(12000).abs().max() < 6 * 12000**0.5
    assert abs(normal.mean().item()) < 0.02
    assert abs(normal.std().item() - 1) < 0.02
    assert np.abs(np.corrcoef(uniform.T.numpy())[~np.eye(3, dtype=bool)]).max() < 0.03
    with pytest.raises(JobError):
        many.integers(3, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_normalize(dtype: torch.dtype) -> None:
    raw = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(dtype)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    scaled = raw.double() / (255 if dtype == torch.uint8 else 1)
    wanted = (scaled - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    got = Normalize(mean, std)(raw)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Normalize(0.1, 0.5)(raw).double(), (scaled - 0.1) / 0.5, rtol=1e-5, atol=1e-5)
    assert torch.equal(raw, torch.arange(96).reshape(2, 3, 4, 4).to(dtype))  # the input is left alone


def test_normalize_refuses() -> None:
    for mean, std in ((0.0, 0.0), ([0.1, 0.2], [1.0, 1.0, 1.0])):
        with pytest.raises(JobError):
            Normalize(mean, std)
    with pytest.raises(JobError, match="dim 1"):
        Normalize([0.1, 0.2], [1, 1])(torch.zeros(2, 3, 4, 4))


def test_to_float() -> None:
    assert ToFloat()(torch.tensor([255, 0], dtype=torch.uint8)).tolist() == [1.0, 0.0]
    assert ToFloat()(torch.tensor([255], dtype=torch.int64)).tolist() == [255.0]


@pytest.mark.parametrize("width", [5, 28, 32])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_mirrors_the_chosen_images(width: int, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (40, 2, 3, width)).to(dtype)
    before = raw.clone()
    chosen = rng(range(40)).uniform() < 0.3
    assert 0 < chosen.sum() < 40
    got = Flip(0.3)(raw, rng(range(40)))
    assert torch.equal(got, torch.where(chosen.view(-1, 1, 1, 1), raw.flip(-1), raw))
    assert torch.equal(raw, before)
    assert torch.equal(Flip()(raw, None), raw)


@pytest.mark.parametrize("shape", [(30, 3, 8, 9), (30, 8, 9)])
def test_crop_cuts_the_drawn_window(shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 256, shape, dtype=torch.uint8)
    corners = rng(range(30)).integers(0, 5, 2)
    assert len(corners.unique(dim=0)) > 10
    padded = torch.nn.functional.pad(raw, (2, 2, 2, 2), value=9)
    wanted = [image[..., y : y + 8, x : x + 9] for image, (y, x) in zip(padded, corners.tolist(), strict=True)]
    assert torch.equal(RandomCrop(2, fill=9)(raw, rng(range(30))), torch.stack(wanted))
    assert RandomCrop(2)(raw, None) is raw


@pytest.mark.parametrize("transform", [Flip(), RandomCrop(1)])
def test_image_transforms_refuse_other_inputs(transform: Any) -> None:
    for wrong in (torch.zeros(3, 4), {"x": torch.zeros(3, 4, 4)}):
        with pytest.raises(JobError, match="images"):
            transform(wrong, rng(range(3)))


NOT_GIVEN = rng([0])


def test_forms_of_transform() -> None:
    x, y = torch.ones(2), torch.zeros(2)

    def three(inputs: Tensor, targets: Tensor, random: BatchRandom | None) -> tuple[Tensor, Tensor]:
        return inputs + 1, targets + 2

    def two(inputs: Tensor, random: BatchRandom | None) -> Tensor:
        return inputs * 5 if random is None else inputs

    def scaled(inputs: Tensor, factor: float = 3) -> Tensor:
        return inputs * factor

    def optional(inputs: Tensor, random: BatchRandom | None = NOT_GIVEN) -> Tensor:
        assert random is None
        return inputs

    everything = Compose(lambda inputs: inputs + 1, two, scaled, optional, three, torch.nn.Identity(), torch.neg)
    inputs, targets = as_transform(everything)(x, y, None)
    assert inputs.tolist() == [-31.0, -31.0]
    assert targets.tolist() == [2.0, 2.0]
    for wrong in (3, lambda: 1, lambda a, b, c, d: a):
        with pytest.raises(JobError, match="transform"):
            as_transform(wrong)  # type: ignore[arg-type]


def test_fenced_randomness_leaves_the_training_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with fenced():
        seed_generators(1, 2)
        inside = torch.rand(2), np.random.rand(2)  # noqa: NPY002
    assert torch.equal(torch.rand(3), expected)
    with fenced():
        seed_generators(1, 2)
        assert torch.equal(torch.rand(2), inside[0])
        assert np.random.rand(2).tolist() == inside[1].tolist()  # noqa: NPY002
