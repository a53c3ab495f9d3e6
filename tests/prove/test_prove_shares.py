"""Shares of the global batch that a plan sets: the same step however uneven they are, and what goes wrong with them is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.data.batch import Batch
from shardwise.data.stream import Stream
from shardwise.errors import PlanError
from shardwise.prove.proof import prove
from shardwise.run import step
from shardwise.run.assemble import Assembly
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

Jobs = Callable[..., Job]


@pytest.mark.parametrize(
    ("kind", "changes", "layout", "shares", "first"),
    [
        # Clipping, accumulation with micro-batches that not every rank has, and a short last batch of 5.
        ("mlp", {"clip_norm": 0.1, "micro_batch": 2}, Layout(data=3), (6.0, 1.0, 2.5), "8, 1, 4"),
        # Statistics over a global batch of which one rank has nearly all; nothing of the short batch is left for it.
        ("conv", {}, Layout(data=2), (12.0, 1.0), "12, 1"),
        # A mean over tokens, of which ranks have very different numbers; parameters are split, too.
        ("gpt", {"clip_norm": 0.1}, Layout(shard=2), (1.0, 3.0), "3, 10"),
    ],
)
def test_uneven_shares_prove(
    job: Jobs, kind: str, changes: dict[str, Any], layout: Layout, shares: tuple[float, ...], first: str
) -> None:
    verdict = prove(job(kind, **changes), Plan(layout=layout, shares=shares))
    assert verdict.outcome == "proved", verdict
    guards = {guard.name: guard for guard in verdict.guards}
    assert guards["samples"].passed and f"shared out as {first}" in guards["samples"].text


def weigh_evenly(a: Assembly) -> None:
    """As if every rank's mean counted alike, which is right for even shares only."""
    weigh = step._weigh

    def weighed(assembly: Assembly, batch: Batch, parts: list[Batch]) -> tuple[list[float], float]:
        weights, total = weigh(assembly, batch, parts)
        return [total / assembly.samples.size / len(weights) for _ in weights], total

    vars(step)["_weigh"] = weighed


def ignore_shares(a: Assembly) -> None:
    a.division = None


def test_a_loss_weighted_by_equal_shares_is_refuted(job: Jobs) -> None:
    assert prove(job("mlp"), Plan(layout=Layout(data=2), shares=(10.0, 3.0)), fault=weigh_evenly).outcome == "refuted"


def test_shares_that_are_ignored_are_refuted(job: Jobs) -> None:
    verdict = prove(job("mlp"), Plan(layout=Layout(data=2), shares=(10.0, 3.0)), fault=ignore_shares)
    assert verdict.outcome == "refuted"
    assert verdict.findings[0].pattern == "wrong samples"
    assert "not its share of 10" in verdict.findings[0].message


def test_shares_that_cannot_be_are_refused(job: Jobs, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="13, 0 samples of a global batch: each needs at least 1"):
        prove(job("mlp"), Plan(layout=Layout(data=2), shares=(100.0, 1.0)))
    with pytest.raises(PlanError, match="a worker's 12 samples, but BatchNorm"):
        prove(job("conv", micro_batch=7), Plan(layout=Layout(data=2), shares=(12.0, 1.0)))
    stream = Stream(lambda rank, ranks: iter([]), sharded=True)
    with pytest.raises(PlanError, match="plan shares with a sharded stream"):
        prove(job("mlp", data={"train": stream}), Plan(layout=Layout(data=2), shares=(2.0, 1.0)))
