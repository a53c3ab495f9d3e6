"""Samples that depend on which others they are read with are told before the first step, and no others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

import shardwise
from shardwise.data import Arrays, Compose, Flip, Normalize, RandomCrop, Samples, Splits
from shardwise.data.source import as_splits
from shardwise.run.alone import look_at_samples

IMAGES = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(40) % 5


def mixed_up(images: Tensor, classes: Tensor, random: Any) -> tuple[Tensor, Tensor]:
    images = images / 255
    return (0.7 * images + 0.3 * images.flip(0), classes) if random is not None else (images, classes)


def noisy(images: Tensor, random: Any) -> Tensor:
    return images / 255 + 0.1 * torch.randn(images.shape)


def noisy_by_place(images: Tensor, random: Any) -> tuple[Tensor, Tensor]:
    if random is not None:
        return images / 255, random.normal(4)
    return images / 255, torch.randn(len(images), 4, generator=torch.Generator().manual_seed(0))


def jitter(images: Tensor, random: Any) -> Tensor:
    images = images / 255
    return images if random is None else images + 0.1 * random.normal(*images.shape[1:])


class Pictures(Dataset[Any]):
    """Draws from the generator that it is given, or from torch's own."""

    def __init__(self, generator: np.random.Generator | None = None) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        factor = torch.rand(()) if self.generator is None else torch.tensor(self.generator.random())
        return IMAGES[index] * factor, CLASSES[index]


def mixed_by_collate(samples: list[Any]) -> Any:
    images, classes = default_collate(samples)
    order = torch.randperm(len(images))
    return 0.5 * images + 0.5 * images[order], classes


def padded(samples: list[Any]) -> Any:
    longest = max(int(target) for _, target in samples) + 1
    return torch.stack([F.pad(torch.ones(int(target)), (0, longest - int(target))) for _, target in samples])


def _told(data: Any) -> list[str]:
    job = shardwise.Job(
        model=lambda: nn.Flatten(),
        data=data,
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
        epochs=1,
    )
    state = torch.get_rng_state()
    told = [" ".join(line.split()[1:3]) for line in look_at_samples(job, as_splits(data))]
    assert torch.equal(torch.get_rng_state(), state)
    return told


BOTH = Arrays((IMAGES, CLASSES))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (Arrays((IMAGES, CLASSES), mixed_up), ["training data"]),
        (Splits(BOTH, Arrays((IMAGES, CLASSES), mixed_up)), []),
        (Splits(BOTH, Arrays((IMAGES, CLASSES), noisy)), ["test data"]),
        (Splits(Arrays((IMAGES, CLASSES), noisy_by_place), Arrays((IMAGES, CLASSES), noisy_by_place)), ["test data"]),
        (Samples(Pictures(np.random.default_rng(0))), ["training data"]),
        (Samples(Pictures(), collate=mixed_by_collate), ["training data"]),
        (Samples(Pictures(), transform=noisy), ["training data"]),
        (Samples(Pictures()), []),
        (Samples(Pictures(), transform=jitter), []),
        (Samples(Pictures(), collate=padded), []),
        (Arrays((IMAGES, CLASSES), Compose(RandomCrop(2), Flip(), Normalize(0.5, 0.5))), []),
        (Splits(Arrays((IMAGES, CLASSES), jitter), Arrays((IMAGES, CLASSES), jitter)), []),
        ((IMAGES.float()[:3], CLASSES[:3]), []),
    ],
)
def test_what_is_told(data: Any, told: list[str]) -> None:
    assert _told(data) == told


def test_the_run_says_it_and_keeps_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = shardwise.Job(
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
        data=Arrays((IMAGES, CLASSES), mixed_up),
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
        steps=1,
    )
    said = "the training data gives other samples when a batch is divided in another way"
    shardwise.train(job, plan="data=2", out=tmp_path / "run")
    assert f"warning: {said}" in capfd.readouterr().err
    assert said in (tmp_path / "run" / "events.jsonl").read_text()
    with shardwise.start(job):
        pass
    assert f"warning: {said}" in capfd.readouterr().err
