"""Trainings with a pipeline in their plan, from the call to the weights on disk: the serial training, up to rounding."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise
import shardwise.parallel.pipeline.stages
import shardwise.parallel.shard
import shardwise.run.dcp  # once, before ranks are forked
from shardwise.errors import PlanError, UserError
from shardwise.run.result import Run
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

VOCABULARY, LENGTH, WIDTH = 11, 5, 7


class Gpt(nn.Module):
    """Tied embedding and head, a buffer that positions are looked up with, blocks with a skip around all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.4)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 15), nn.GELU(), nn.Linear(15, WIDTH)) for _ in range(4)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("index", torch.arange(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        first = x = self.tokens(tokens) + self.places(self.index)
        for block in self.blocks:
            x = x + block(x)
        return torch.as_tensor(self.head(self.norm(x + first)))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(7, 15), nn.BatchNorm1d(15), nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.norm(self.first(x)).relu()))


class Looped(nn.Module):
    """A layer that comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(7, 7), nn.Linear(7, 7)
        self.again.weight, self.again.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.again(self.first(x).relu()))


ROWS = {"data": (torch.zeros(20, 7), torch.zeros(20, 7)), "loss": F.mse_loss, "weight": None, "metrics": {}}


def _texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.where(tokens % 5 == 0, -100, tokens.roll(1, 1))


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)


def counted(target: Tensor) -> Tensor:
    return (target != -100).sum()


def right(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return ((output.argmax(-1) == target) & (target != -100)).sum(), counted(target)


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    output = model(batch[0]).flatten(0, 1)
    return F.cross_entropy(output, batch[1].flatten(), ignore_index=-100, reduction="sum"), counted(batch[1])


def by_name(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups; Adagrad makes its state at once."""
    tied = [p for name, p in model.named_parameters() if "tokens" in name]
    rest = [p for name, p in model.named_parameters() if "tokens" not in name]
    groups: list[dict[str, Any]] = [{"params": tied, "lr": 0.01}, {"params": rest}]
    return torch.optim.Adagrad(groups, lr=0.1)


def _job(**changes: Any) -> shardwise.Job:
    values: dict[str, Any] = {
        "name": "gpt",
        "model": Gpt,
        "data": {"train": _texts(31, 1), "test": _texts(17, 2)},  # 31: the last batch is short
        "loss": token_loss,
        "weight": counted,
        "optimizer": lambda params: torch.optim.AdamW(params, lr=0.03, eps=1e-3),
        "schedule": lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total or 1),
        "batch_size": 13,
        "epochs": 2,
        "micro_batch": 3,  # divides no share
        "clip_norm": 0.2,
        "metrics": {"right": right},
    }
    return shardwise.Job(**values | changes)


def _train(job: shardwise.Job, out: Path, plan: str | Plan, **options: Any) -> Run:
    return shardwise.train(job, plan=plan, out=out, threads=1, progress=False, **options)


def _same(run: Run, serial: Run, *, rtol: float = 2e-4) -> None:
    torch.testing.assert_close(run.history, serial.history, rtol=rtol, atol=1e-6)
    assert run.metrics.keys() == serial.metrics.keys()
    torch.testing.assert_close(run.metrics, serial.metrics, rtol=rtol, atol=1e-6)
    weights, expected = (load_file(each.folder.weights_path) for each in (run, serial))
    torch.testing.assert_close(weights, expected, rtol=rtol, atol=1e-5)
    assert run.summary["parameters"] == serial.summary["parameters"]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The training on one worker, which did train."""
    run = _train(_job(), tmp_path_factory.mktemp("serial") / "run", "serial")
    assert run.history[-1] < 0.95 * run.history[0]
    assert "head.weight" not in load_file(run.folder.weights_path)  # tied: stored once
    return run


@pytest.mark.parametrize(
    "plan",
    [
        Plan(layout=Layout(pipeline=2)),
        Plan(layout=Layout(pipeline=2, data=2), schedule="gpipe"),
        Plan(layout=Layout(pipeline=2, shard=2)),
        Plan(layout=Layout(pipeline=2), schedule="interleaved1f1b", cuts=("blocks.1", "blocks.2", "norm")),
        Plan(layout=Layout(pipeline=2), schedule="interleaved1f1b", virtual_stages=2, stage_layers=(1, 1, 1, 1)),
        Plan(layout=Layout(pipeline=3), schedule="zerobubble"),
        Plan(layout=Layout(pipeline=2, data=2), schedule="zerobubble"),
        Plan(
            layout=Layout(pipeline=2), schedule="zbv"
        ),  # tied weights and the loss on one rank; an embedding is not halved
        Plan(layout=Layout(pipeline=2, data=2), schedule="dualpipev", cuts=("blocks.1", "blocks.2", "norm")),
        Plan(layout=Layout(pipeline=2, tensor=2), cuts=("blocks.1.3",)),  # where tensor has its values in pieces
        Plan(layout=Layout(shard=2)),  # for what an evaluation between steps leaves behind
        Plan(layout=Layout(shard=2), zero_stage=2),
        Plan(layout=Layout(pipeline=2, shard=2), zero_stage=2),
    ],
    ids=str,
)
def test_training_is_the_serial_one(plan: Plan, serial: Run, tmp_path: Path) -> None:
    run = _train(_job(), tmp_path / "run", plan)
    _same(run, serial)
    inputs = _texts(5, 3)[0]
    torch.testing.assert_close(shardwise.predict(run, inputs), shardwise.predict(serial, inputs), rtol=1e-3, atol=1e-4)


def test_resume_is_exact_on_the_same_layout(tmp_path: Path) -> None:
    whole = _train(_job(schedule=None), tmp_path / "whole", "pipeline=2")
    _train(_job(schedule=None, epochs=1), tmp_path / "parts", "pipeline=2")
    parts = _train(_job(schedule=None), tmp_path / "parts", "pipeline=2", resume=True)
    assert parts.history == whole.history
    weights, expected = (load_file(run.folder.weights_path) for run in (parts, whole))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_resume_under_other_layouts(tmp_path: Path) -> None:
    """Optimizer state goes from stages to whole models to shards of stages and back."""
    job = _job(epochs=4, schedule=None)
    serial = _train(job, tmp_path / "serial", "serial")
    out = tmp_path / "run"
    _train(_job(epochs=1, schedule=None), out, "pipeline=3")
    _train(_job(epochs=2, schedule=None), out, "data=2", resume=True)
    _train(_job(epochs=3, schedule=None), out, "tensor=2,pipeline=2", resume=True)
    _same(_train(job, out, "serial", resume=True), serial)


def test_own_loss_and_groups_by_name(tmp_path: Path) -> None:
    """The loss is part of the last stage; groups of the optimizer mean the same though a stage holds few parameters."""
    job = _job(loss=None, weight=None, objective=objective, optimizer=by_name)
    serial = _train(job, tmp_path / "serial", "serial")
    _same(_train(job, tmp_path / "run", "data=2,pipeline=2"), serial)


def test_mean_objective_without_micro_batches(tmp_path: Path) -> None:
    """BatchNorm over the global batch; one micro-batch a step, and said so."""

    def mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(20, 7, generator=generator), torch.randn(20, 3, generator=generator)
    job = _job(
        name="normed",
        model=Normed,
        data={"train": data, "test": data},
        loss=None,
        weight=None,
        objective=mean,
        metrics={},
        micro_batch=None,
        batch_size=6,
    )
    serial = _train(job, tmp_path / "serial", "serial")
    run = _train(job, tmp_path / "run", "data=2,pipeline=2")
    _same(run, serial)
    assert "one micro-batch a step" in run.folder.events_path.read_text()


def test_bf16(tmp_path: Path) -> None:
    serial = _train(_job(precision="bf16"), tmp_path / "serial", "serial")
    assert serial.history != _train(_job(), tmp_path / "fp32", "serial").history
    run = _train(_job(precision="bf16"), tmp_path / "run", "pipeline=2")
    torch.testing.assert_close(run.history, serial.history, rtol=2e-2, atol=0)


def _own_loop(folder: str) -> tuple[list[float], dict[str, float]]:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
    with shardwise.start(_job(), plan="pipeline=2", device="cpu") as run:
        losses = [run.step(batch) for batch in run.batches()]
        metrics = run.evaluate()
        run.save_weights(f"{folder}/weights.safetensors")
    return losses, metrics


def test_own_loop(serial: Run, tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    (losses, metrics), other = ranks(2, _own_loop, str(tmp_path))
    assert other == (losses, metrics)
    torch.testing.assert_close(losses, serial.history, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(metrics, serial.metrics, rtol=2e-4, atol=1e-6)
    weights, expected = load_file(tmp_path / "weights.safetensors"), load_file(serial.folder.weights_path)
    torch.testing.assert_close(weights, expected, rtol=2e-4, atol=1e-5)


def test_layers_a_stage_are_blocks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('layout = "pipeline=2"\nstage_layers = "3,1"\nmicro_batch = 4\n')
    shardwise.train(_job(epochs=None, steps=2), plan=file, out=tmp_path / "run", threads=1)
    assert "1  blocks.3" in capfd.readouterr().err


def test_plan_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`cuts` and `schedule` of a plan file, and the table of stages that is printed."""
    file = tmp_path / "plan.toml"
    file.write_text('layout = "pipeline=2"\nschedule = "gpipe"\ncuts = ["blocks.3"]\nmicro_batch = 4\n')
    shardwise.train(_job(epochs=None, steps=2), plan=file, out=tmp_path / "run", threads=1)
    said = capfd.readouterr().err
    assert "1  blocks.3" in said
    assert "holds too: tokens.weight (gradients are summed over the stages)" in said


@pytest.mark.parametrize(
    ("changes", "plan", "words"),
    [
        ({}, Plan(layout=Layout(pipeline=2), cuts=("blocks.9",)), "no module 'blocks.9'; did you mean"),
        ({}, Plan(layout=Layout(pipeline=2), cuts=("norm", "head")), "makes 3 stages, but 2 are needed"),
        ({}, Plan(layout=Layout(pipeline=2), schedule="zbv", cuts=("norm",)), "makes 2 stages, but 4 are needed"),
        (
            {},
            Plan(layout=Layout(pipeline=2), stage_layers=(3, 2)),
            "for a model of 5 layers, but this one has 4 repeated blocks",
        ),
        ({}, Plan(layout=Layout(pipeline=2), stage_layers=(2, 1, 1)), "give one number for each of the 2 stages"),
        ({}, Plan(layout=Layout(pipeline=2), virtual_stages=2), "only interleaved1f1b has any number of stages"),
        ({}, Plan(layout=Layout(shard=2), zero_stage=1), "splits gradients too; write zero_stage=2, or data=2"),
        ({}, Plan(layout=Layout(data=2), zero_stage=2), "it belongs to a shard axis"),
        ({}, Plan(layout=Layout(data=2), precision="fp8"), "shardwise trains in fp32 or bf16"),
        (
            {},
            Plan(layout=Layout(pipeline=2), schedule="dualpipev", recompute="full"),
            "nor recompute go; use schedule='interleaved1f1b'",
        ),
        (
            {},
            Plan(layout=Layout(pipeline=2, shard=2), schedule="zerobubble"),
            "neither shard, tensor, context, expert nor recompute go",
        ),
        ({}, "pipeline=2,expert=2", "the model has no experts to split"),
        (
            {"model": Normed, "data": (torch.zeros(20, 7), torch.zeros(20, 3)), "loss": F.mse_loss, "weight": None},
            "pipeline=2",
            "BatchNorm layer 'norm' needs statistics of the whole global batch",
        ),
        ({"model": lambda: nn.Embedding(VOCABULARY, VOCABULARY)}, "pipeline=2", "cannot be cut into 2 stages"),
        (
            {"model": Looped, **ROWS},
            "pipeline=2",
            "every stage would hold all parameters, because they are tied",
        ),
        (
            {"model": lambda: torch.compile(Gpt(), backend="eager")},
            "pipeline=2",
            "the model was given to torch.compile, and a pipeline cuts it",
        ),
    ],
)
def test_refused_before_a_worker_starts(changes: dict[str, Any], plan: str | Plan, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        _train(_job(**changes), tmp_path / "run", plan)
    assert isinstance(caught.value, UserError)
    assert not (tmp_path / "run").exists()
