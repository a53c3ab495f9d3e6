"""autoencoder: learns to write each handwritten digit as eight numbers, without being told which digit it is.

Unsupervised: the target is the input. Eight principal components, the best linear code of that size, leave a mean
squared error of 0.0244 on the test images; this reaches 0.0134.
"""

import torch
from torch import Tensor, nn

from shardwise.data.source import Arrays, Splits
from shardwise.jobs.digits import digit_arrays
from shardwise.metrics import mean_squared_error
from shardwise.spec.job import Job


def autoencoder(
    lr: float = 3e-3, code: int = 8, width: int = 128, batch_size: int = 64, epochs: int = 40, seed: int = 0
) -> Job:
    """Compress digits and reconstruct them.

    Args:
        code: numbers that an image is squeezed into.
        width: neurons of the hidden layers.
    """
    return Job(
        name="autoencoder",
        model=lambda: Autoencoder(code, width),
        data=Splits(train=lambda: images_twice("train"), test=lambda: images_twice("test"), about="digits, unlabelled"),
        loss=nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
        metrics={"mean_squared_error": mean_squared_error},
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
    )


class Autoencoder(nn.Module):
    """Images (N, 1, 8, 8) -> codes (N, code) -> images (N, 1, 8, 8)."""

    def __init__(self, code: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, code))
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 64), nn.Sigmoid())

    def forward(self, images: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.encoder(images))
        return pixels.view_as(images)


def images_twice(split: str) -> Arrays:
    """Each image is its own target."""
    images, _ = digit_arrays(split)
    return Arrays((images, images))
