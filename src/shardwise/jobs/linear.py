"""linear: ten linear classifiers, one for each handwritten digit against the rest.

The model is one linear layer, so gradient descent can be watched bare: least squares or, with `--set loss=hinge`, a
linear support vector machine; the whole training set a step (`batch_size=full`), one image a step (`batch_size=1`), or
anything between. Both reach 93-94 % test accuracy; the exact least-squares solution has 93 %.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from shardwise.data.source import Arrays, Splits
from shardwise.jobs.digits import digit_arrays
from shardwise.metrics import accuracy
from shardwise.spec.job import Job


def linear(
    loss: Literal["squares", "hinge"] = "squares",
    lr: float = 0.05,
    l2: float = 1e-4,
    batch_size: int | Literal["full"] = 32,
    epochs: int = 30,
    seed: int = 0,
) -> Job:
    """Tell each digit from the rest.

    Args:
        loss: `squares` for (score - sign)^2 / 2, `hinge` for max(0, 1 - score * sign), where the sign is +1 for the digit
            in the image and -1 for the nine others; summed over the ten scores.
        l2: weight of |w|^2 / 2 in what is minimised, not on the biases.
        lr: of SGD; steps over single images need a smaller one (0.01), the full batch bears a larger one (0.1).
        batch_size: images a step, or `full` for all of them: plain gradient descent.
    """
    data = flat_digits()
    return Job(
        name="linear",
        model=lambda: nn.Linear(64, 10),
        data=data,
        loss=squares_loss if loss == "squares" else hinge_loss,
        optimizer=lambda model: torch.optim.SGD(
            [{"params": [model.weight], "weight_decay": l2}, {"params": [model.bias], "weight_decay": 0.0}], lr=lr
        ),
        metrics={"accuracy": accuracy},
        batch_size=data.train.length or 1 if batch_size == "full" else batch_size,
        epochs=epochs,
        seed=seed,
    )


def squares_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Scores (N, 10), digits (N,) -> mean over N of the sum over the ten classifiers."""
    return (scores - signs(target)).square().sum(dim=1).mean() / 2


def hinge_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Scores (N, 10), digits (N,) -> mean over N of the sum over the ten classifiers."""
    return (1 - scores * signs(target)).clamp(min=0).sum(dim=1).mean()


def signs(target: Tensor) -> Tensor:
    """Digits (N,) -> (N, 10): +1 where the class is the digit, otherwise -1."""
    return nn.functional.one_hot(target, 10) * 2.0 - 1.0


def flat_digits() -> Splits:
    """The digits of the `digits` job as rows of 64 numbers from 0 to 1."""

    def flat(split: str) -> Arrays:
        images, labels = digit_arrays(split)
        return Arrays((images.flatten(1), labels))

    return Splits(train=lambda: flat("train"), test=lambda: flat("test"), about="handwritten digits, 64 numbers each")
