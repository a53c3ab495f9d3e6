"""The built-in mixture-of-experts job learns, and its experts are all used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shardwise.data.batch import Batch
from shardwise.data.loader import batches, eval_batches
from shardwise.data.source import Source
from shardwise.jobs.charlm import bits_per_character
from shardwise.jobs.moe import moe
from shardwise.nn.experts import expert_load


def test_moe_learns_more_than_letter_frequencies_with_all_experts() -> None:
    job = moe(layers=1, block=32)
    assert callable(job.objective)
    torch.manual_seed(0)
    model = job.model()
    optimizer = job.optimizer(model.parameters())
    schedule = job.schedule(optimizer, 120) if callable(job.schedule) else None
    for step, batch in zip(range(120), _endless(job.data.train, job.batch_size), strict=False):
        optimizer.zero_grad()
        objective = job.objective(model, (batch.inputs, batch.targets))
        assert isinstance(objective, torch.Tensor)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert schedule is not None
        schedule.step()
        if step == 99:
            expert_load(model)
    model.eval()
    totals = torch.zeros(2)
    with torch.no_grad():
        for batch in eval_batches(job.data.test, batch_size=64):
            assert isinstance(batch.targets, torch.Tensor)
            totals += torch.stack(bits_per_character(model(batch.inputs), batch.targets))
    assert 1 < (totals[0] / totals[1]).item() < 4.1  # 4.6 is what letter frequencies alone give
    shares = torch.tensor(expert_load(model)["blocks.0.mixture"].tokens, dtype=torch.float64)
    assert shares.sum() == 20 * 32 * 32 * 2
    assert (shares / shares.sum()).min() > 0.1  # a quarter each, were they used evenly


def _endless(source: Source, batch_size: int) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from batches(source, batch_size=batch_size, seed=0, epoch=epoch)
        epoch += 1
