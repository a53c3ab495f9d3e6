"""What a plan says about a model beforehand."""

from __future__ import annotations

import pytest
from torch import nn

from shardwise.dist.mesh import Mesh
from shardwise.parallel.compose import compose
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan


@pytest.mark.parametrize(
    ("module", "drops"),
    [
        (nn.Dropout(0.1), True),
        (nn.Dropout(0.0), False),
        (nn.RReLU(), True),
        (nn.RReLU(0.2, 0.2), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.1), True),
        (nn.GRU(4, 4, num_layers=2), False),
        (nn.TransformerEncoderLayer(4, 2, dropout=0.1), True),
        (nn.TransformerEncoderLayer(4, 2, dropout=0.0), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_every_kind_of_dropout_is_said(module: nn.Module, drops: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), module)
    composed = compose(model, Plan(micro_batch=2), Mesh(Layout(), 0, "cpu"), batch_norm="global")
    found = [remark for remark in composed.remarks if remark.startswith("dropout (1")]
    assert len(found) == int(drops)
