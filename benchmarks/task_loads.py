"""What the task benchmark runs: in a module of its own, so that every library sends it by name."""

from __future__ import annotations

from typing import Any

import numpy as np


def noop(x: int) -> int:
    return x


def total(array: np.ndarray[Any, Any]) -> float:
    """Reads every page once, as cheaply as can be: what is measured is how the array got here."""
    return float(array[::512].sum())


def total_with(array: np.ndarray[Any, Any], number: int) -> float:
    return total(array) + number


def train(epochs: int) -> float:
    """A small network on 2,000 samples; the loss after so many epochs. Torch is imported by the first call in a process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(2000, 64)
    targets = (inputs[:, :8].sum(1) > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    value = torch.zeros(())
    for _ in range(epochs):
        for start in range(0, 2000, 50):
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(model(inputs[start : start + 50]), targets[start : start + 50])
            value.backward()
            optimizer.step()
    return float(value.detach())
