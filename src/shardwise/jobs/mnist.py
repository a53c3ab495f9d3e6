"""mnist: a small convolutional network on 70,000 handwritten digits of 28x28 pixels.

The images are read from `--set data=DIR`, which holds the four idx files, plain or .gz; `--set download=true` fetches
them. Fashion-MNIST and other sets in the same four files can be read just as well.
"""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from shardwise.data.readers.mnist import mnist as mnist_images
from shardwise.metrics import accuracy
from shardwise.spec.job import Job


def mnist(
    data: str = "data/mnist",
    download: bool = False,
    lr: float = 0.1,
    width: int = 8,
    batch_size: int = 128,
    epochs: int = 3,
    seed: int = 0,
) -> Job:
    """Classify the digits.

    Args:
        data: the folder that holds the four files.
        download: fetch the files (12 MB) into `data` when they are not there.
        lr: learning rate of SGD with momentum 0.9, lowered to zero over the run.
        width: channels of the first convolution; the second has twice as many.
    """
    return Job(
        name="mnist",
        model=lambda: MnistNet(width),
        data=mnist_images(data, download=download),
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        schedule=lambda optimizer, steps: CosineAnnealingLR(optimizer, steps or 1),
        metrics={"accuracy": accuracy},
        batch_size=batch_size,
        eval_batch_size=500,
        epochs=epochs,
        seed=seed,
    )


class MnistNet(nn.Module):
    """Images (N, 1, 28, 28) -> scores (N, 10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 5)
        self.conv2 = nn.Conv2d(width, 2 * width, 5)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(2 * width * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(nn.functional.relu(self.conv1(images)))
        x = self.pool(nn.functional.relu(self.conv2(x)))
        scores: Tensor = self.head(x.flatten(1))
        return scores
