"""Recomputation under proof: with every kind of parallelism, and a fault in it is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shardwise.jobs.charlm import charlm
from shardwise.jobs.moe import moe
from shardwise.prove.proof import prove
from shardwise.run.assemble import Assembly
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

Jobs = Callable[..., Job]


def _small(make: Callable[..., Job]) -> Job:
    return make(width=16, layers=2, block=16, batch_size=12)


ALONE = ("shard=2", "tensor=2", "context=2", "expert=2", "pipeline=2")


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        *((layout, how) for layout in ALONE for how in ("full", "selective")),
        ("data=2,tensor=2", "full"),
        ("shard=2,tensor=2", "full"),
    ],
)
def test_proved(layout: str, how: Any) -> None:
    job = _small(moe if "expert" in layout else charlm)
    plan = Plan(layout=Layout.parse(layout), recompute=how, micro_batch=3 if "pipeline" in layout else None)
    verdict = prove(job, plan)
    assert verdict.proved, verdict
    assert any(guard.name == "recomputed" and guard.passed for guard in verdict.guards)


def test_batch_norm_over_replicas(job: Jobs) -> None:
    plan = Plan(layout=Layout(data=2), recompute="full", recompute_modules=("norm1", "conv2"))
    verdict = prove(job("conv", clip_norm=0.1), plan)
    assert verdict.proved, verdict


def never(a: Assembly) -> None:
    """The modules of the plan run as they are."""
    for module in a.model.modules():
        if type(vars(module).get("forward")).__name__ == "_Recomputation":
            module.forward = vars(module)["forward"].run


def test_a_plan_that_recomputes_nothing_is_not_proved() -> None:
    verdict = prove(_small(charlm), "data=2", recompute="full", fault=never)
    assert verdict.outcome == "refuted"
    assert [guard.name for guard in verdict.guards if not guard.passed] == ["recomputed"]


def test_other_weights_in_the_recomputation_are_found(job: Jobs) -> None:
    def plant(a: Assembly) -> None:
        for module in a.model.modules():
            again: Any = vars(module).get("forward")
            if type(again).__name__ == "_Recomputation":
                module.forward = replace(again, run=_scaled_in_backward(again.run))

    found = prove(_small(charlm), "data=2", recompute="full", fault=plant)
    assert found.outcome == "refuted", found
    assert any(item.kind == "gradient" for item in found.failed)


def _scaled_in_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    from shardwise.nn.experts import in_backward

    return lambda *args, **kwargs: run(*(arg * (1.01 if in_backward() else 1.0) for arg in args), **kwargs)
