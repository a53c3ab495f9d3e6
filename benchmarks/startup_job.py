"""A job that writes down when its first optimizer step has ended; `benchmarks/overhead.py` starts it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import shardwise


def startup(mark: str = "first-step") -> shardwise.Job:
    """A tiny network on a few random samples.

    Args:
        mark: file that gets the unix time of the end of the first step.
    """

    def schedule(optimizer: Optimizer, total_steps: int | None) -> LambdaLR:
        # The scheduler is stepped right after the optimizer: the cheapest place to notice the end of a step.
        def factor(step: int) -> float:
            if step == 1 and not Path(mark).exists():
                Path(mark).write_text(repr(time.time()), encoding="utf-8")
            return 1.0

        return LambdaLR(optimizer, factor)

    inputs, targets = torch.randn(64, 64), torch.randint(0, 10, (64,))
    return shardwise.Job(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)),
        data=(inputs, targets),
        loss=torch.nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        schedule=schedule,
        batch_size=32,
        steps=2,
    )
