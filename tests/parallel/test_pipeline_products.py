"""Pipelines beside expert and context: trainings from the call to the weights are the serial ones, losses of routers included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shardwise
import shardwise.parallel.pipeline.stages
import shardwise.parallel.shard
import shardwise.run.dcp  # once, before ranks are forked
from shardwise.errors import PlanError, ShardwiseError
from shardwise.jobs.charlm import CharGPT
from shardwise.jobs.moe import MixtureGPT
from shardwise.nn import MoE, auxiliary_loss, with_auxiliary_loss
from shardwise.parallel.compose import check_model
from shardwise.parallel.pipeline.part import split
from shardwise.run.result import Run
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

VOCABULARY, LENGTH, WIDTH = 11, 7, 12
CUTS = ("blocks.1", "blocks.2", "blocks.3")


def _texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def right(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).double().mean()


def _mixture(balance: float, layers: int = 2) -> Callable[[], MixtureGPT]:
    return lambda: MixtureGPT(VOCABULARY, LENGTH, WIDTH, layers, 3, experts=4, top_k=2, balance=balance)


def _job(**changes: Any) -> shardwise.Job:
    values: dict[str, Any] = {
        "name": "products",
        "model": _mixture(0.5),
        "data": {"train": _texts(11, 1), "test": _texts(7, 2)},  # 11: the last batch has one sample
        "objective": with_auxiliary_loss(token_loss),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
        "batch_size": 5,
        "epochs": 2,
        "clip_norm": 0.5,
        "metrics": {"right": right},
    }
    return shardwise.Job(**values | changes)


def _train(job: shardwise.Job, out: Path, plan: str | Plan, **options: Any) -> Run:
    return shardwise.train(job, plan=plan, out=out, threads=1, progress=False, **options)


def _loads(run: Run) -> dict[str, list[int]]:
    """Tokens of each expert over the whole training, from the events."""
    events = [json.loads(line) for line in run.folder.events_path.read_text(encoding="utf-8").splitlines()]
    tokens = [event["tokens"] for event in events if event["kind"] == "experts"]
    return {name: [sum(counts) for counts in zip(*(each[name] for each in tokens), strict=True)] for name in tokens[0]}


def _same(run: Run, serial: Run) -> None:
    assert serial.history[-1] != serial.history[0]
    torch.testing.assert_close(run.history, serial.history, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(run.metrics, serial.metrics, rtol=2e-4, atol=1e-6)
    weights, expected = (load_file(each.folder.weights_path) for each in (run, serial))
    torch.testing.assert_close(weights, expected, rtol=2e-4, atol=1e-5)
    if "mixture" in str(serial.job.model()):
        assert _loads(run) == _loads(serial)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = _train(_job(), tmp_path_factory.mktemp("balanced") / "run", "serial")
    assert sum(_loads(run)["blocks.1.mixture"]) == 2 * 2 * 11 * LENGTH  # epochs, experts a token, samples
    return run


def test_experts_inside_stages_with_a_balance_loss(balanced: Run, tmp_path: Path) -> None:
    """The last batch of one sample leaves the other expert rank with a pass that counts for nothing."""
    _same(_train(_job(), tmp_path / "run", "expert=2,pipeline=2"), balanced)


def test_resume_under_another_kind(balanced: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train(_job(epochs=1), out, "expert=2,pipeline=2")
    run = _train(_job(), out, "context=2", resume=True)
    torch.testing.assert_close(run.history, balanced.history, rtol=2e-4, atol=1e-6)
    weights, expected = (load_file(each.folder.weights_path) for each in (run, balanced))
    torch.testing.assert_close(weights, expected, rtol=2e-4, atol=1e-5)


def test_experts_and_micro_batches(tmp_path: Path) -> None:
    """Shares of 3 and 2 samples are two micro-batches and one, so that one pass of one rank is empty; recomputed as well."""
    job = _job(model=_mixture(0.0), micro_batch=2, objective=None, loss=token_loss)
    serial = _train(job, tmp_path / "serial", "serial")
    plan = Plan(layout=Layout(expert=2, pipeline=2), recompute="full")
    _same(_train(job, tmp_path / "run", plan), serial)


def test_sequences_inside_stages(tmp_path: Path) -> None:
    """7 tokens, 4 and 3 to a rank, through stages with micro-batches of two samples and one."""
    job = _job(model=lambda: CharGPT(VOCABULARY, LENGTH, WIDTH, 4, 3), objective=None, loss=token_loss, micro_batch=2)
    serial = _train(job, tmp_path / "serial", "serial")
    plan = Plan(layout=Layout(context=2, pipeline=2), schedule="interleaved1f1b", recompute="full", cuts=CUTS)
    _same(_train(job, tmp_path / "run", plan), serial)


def test_a_wrong_share_of_a_loss_is_seen(balanced: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: what layers keep for the objective reaches the last stage with another weight."""
    take = MoE.take_auxiliary
    monkeypatch.setattr(MoE, "take_auxiliary", lambda layer: [part * 1.02 for part in take(layer)])
    with pytest.raises(AssertionError):
        _same(_train(_job(), tmp_path / "run", "pipeline=2"), balanced)


def test_an_objective_that_forgets_the_loss_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ShardwiseError, match=r"auxiliary loss .* that is no part of the objective"):
        _train(_job(objective=None, loss=token_loss), tmp_path / "run", "pipeline=2")


def test_nothing_is_kept_for_an_objective_that_is_elsewhere() -> None:
    """Stages that do not compute the objective let go of the losses, and of the graphs behind them."""
    from shardwise.dist.collectives import Group
    from shardwise.parallel.pipeline.part import take_part
    from shardwise.parallel.pipeline.runner import PipelineRunner

    model = _mixture(0.5)()
    objective = with_auxiliary_loss(token_loss)
    batch = _texts(3, 1)
    part = take_part(split(model, batch, 2, forward=objective), model, 0, 1)
    runner = PipelineRunner(part, Group(), schedule="interleaved1f1b", device=torch.device("cpu"))
    runner.step([batch, batch], lambda loss, _: loss)
    assert [len(block.mixture._auxiliary) for block in model.blocks] == [0, 0]  # type: ignore[union-attr, arg-type]
    assert auxiliary_loss(model) == 0


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("pipeline=2,context=2", {"schedule": "zbv"}, "nor recompute go; use schedule='interleaved1f1b'"),
        ("pipeline=2,data=2", {"schedule": "zerobubble"}, "layers with experts cannot keep in step .* schedule='1f1b'"),
        ("pipeline=2,expert=2", {"micro_batch": 1}, "balance=0.5 looks at all tokens of the global batch"),
    ],
)
def test_refused_before_a_worker_starts(layout: str, changes: dict[str, Any], words: str) -> None:
    plan = Plan(layout=Layout.parse(layout), **changes)
    with pytest.raises(PlanError, match=words):
        check_model(_mixture(0.5)(), plan, batch_size=5, batch_norm="global")


def test_one_cut_at_a_block_and_another_inside_of_it() -> None:
    cuts = ("blocks.1", "blocks.1.up")
    assert split(CharGPT(VOCABULARY, LENGTH, WIDTH, 2, 3), _texts(2, 1)[0], 3, cuts).table.cuts == cuts


def test_no_cut_inside_of_experts() -> None:
    with pytest.raises(PlanError, match=r"'blocks.1.mixture.router' lies inside 'blocks.1.mixture', whose experts run"):
        split(_mixture(0.0)(), _texts(2, 1)[0], 2, ["blocks.1.mixture.router"])
