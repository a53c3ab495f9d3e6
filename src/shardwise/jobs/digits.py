"""digits: a small convolutional network on 1,797 real handwritten digits of 8x8 pixels.

The images come with shardwise (see files/SOURCES.md). Every fifth one is a test image: 1,438 train and 359 test.
Reaches 98-99 % test accuracy in a few seconds.
"""

from importlib.resources import files

import numpy as np
import torch
from torch import Tensor, nn

from shardwise.data.source import Arrays, Splits
from shardwise.metrics import accuracy
from shardwise.spec.job import Job


def digits(lr: float = 0.05, width: int = 16, batch_size: int = 64, epochs: int = 15, seed: int = 0) -> Job:
    """Classify the digits.

    Args:
        lr: learning rate of SGD with momentum 0.9.
        width: channels of the first convolution; the second has twice as many.
    """
    return Job(
        name="digits",
        model=lambda: DigitNet(width),
        data=digit_images(),
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        metrics={"accuracy": accuracy},
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
    )


class DigitNet(nn.Module):
    """Two convolutions and a linear layer: images (N, 1, 8, 8) -> scores (N, 10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(2 * width * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.relu(self.conv1(images))
        x = self.pool(nn.functional.relu(self.conv2(x)))
        scores: Tensor = self.head(x.flatten(1))
        return scores


def digit_images() -> Splits:
    """Images (N, 1, 8, 8) float32 from 0 to 1, targets (N,) int64 from 0 to 9."""
    return Splits(
        train=lambda: Arrays(digit_arrays("train")),
        test=lambda: Arrays(digit_arrays("test")),
        about="1,797 handwritten digits of 8x8 pixels (UCI, CC BY 4.0)",
        classes=tuple("0123456789"),
    )


def digit_arrays(split: str) -> tuple[Tensor, Tensor]:
    """The images and targets of the `train` or `test` split."""
    with (files("shardwise.jobs") / "files" / "digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    is_test = np.arange(len(images)) % 5 == 4
    chosen = is_test if split == "test" else ~is_test
    inputs = torch.from_numpy(images[chosen]).float().div(16).unsqueeze(1)  # counts of pen pixels, 0 to 16
    return inputs, torch.from_numpy(labels[chosen]).long()
