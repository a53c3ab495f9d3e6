"""Kernels that are put in place stay for the life of a process: each test here starts from torch's own convolution layer."""

import pytest
from torch import nn

from shardwise.kernels.install import TORCHS_FORWARD


@pytest.fixture(autouse=True)
def torchs_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a training of an earlier test has put off."""
    monkeypatch.setattr(nn.Conv2d, "forward", TORCHS_FORWARD)
