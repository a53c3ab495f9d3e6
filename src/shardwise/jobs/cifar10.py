"""cifar10: the LeNet of the PyTorch tutorial on 60,000 small colour photographs in ten classes.

The images are read from `--set data=DIR`, which holds the folder cifar-10-batches-py; `--set download=true` fetches it.
The tutorial's own training is `--set lr=0.001 --set schedule=constant`.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from shardwise.data.readers.cifar import cifar10 as cifar10_images
from shardwise.data.readers.packed import is_packed, packed
from shardwise.data.transforms import Compose, Flip, Normalize, RandomCrop
from shardwise.metrics import accuracy
from shardwise.spec.job import Job


def cifar10(
    data: str = "data/cifar10",
    download: bool = False,
    lr: float = 0.02,
    momentum: float = 0.9,
    schedule: Literal["cosine", "constant"] = "cosine",
    augment: bool = False,
    batch_size: int = 100,
    epochs: int = 10,
    seed: int = 0,
) -> Job:
    """Classify the photographs.

    Args:
        data: the folder that holds cifar-10-batches-py, or that folder itself; or the images as `shardwise data pack
            DIR OUT --size 32` wrote them.
        download: fetch the images (170 MB) into `data` when they are not there.
        schedule: `cosine` lowers the learning rate to zero over the run, `constant` keeps it.
        augment: mirror and shift the training images at random; pays in long runs of larger models.
    """
    scale = Normalize(mean=0.5, std=0.5)
    transform = Compose(Flip(), RandomCrop(padding=4), scale) if augment else scale
    return Job(
        name="cifar10",
        model=LeNet,
        data=packed(data, transform)
        if is_packed(data)
        else cifar10_images(data, download=download, transform=transform),
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum),
        schedule=(lambda optimizer, steps: CosineAnnealingLR(optimizer, steps or 1)) if schedule == "cosine" else None,
        metrics={"accuracy": accuracy},
        batch_size=batch_size,
        eval_batch_size=500,
        epochs=epochs,
        seed=seed,
    )


class LeNet(nn.Module):
    """Images (N, 3, 32, 32) -> scores (N, 10), after LeCun et al. 1998 with ReLU, max-pooling and colour."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        # relu(pool(x)) equals pool(relu(x)) and touches a quarter of the values.
        x = nn.functional.relu(self.pool(self.conv1(images)))
        x = nn.functional.relu(self.pool(self.conv2(x)))
        x = nn.functional.relu(self.fc1(x.flatten(1)))
        x = nn.functional.relu(self.fc2(x))
        scores: Tensor = self.fc3(x)
        return scores
