"""Training with a tensor axis from start to end: the same run, kept, resumed under other layouts, and used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise
from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.errors import PlanError
from shardwise.jobs.charlm import CharGPT, bits_per_character, next_character_loss
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan


def _net() -> nn.Module:
    return CharGPT(17, 8, 16, 1, 4)


def _texts(samples: int, seed: int) -> Arrays:
    tokens = torch.randint(0, 17, (samples, 9), generator=torch.Generator().manual_seed(seed))
    return Arrays((tokens[:, :-1], tokens[:, 1:]))


def _job(**changes: Any) -> Job:
    settings: dict[str, Any] = {
        "name": "texts",
        "model": _net,
        "data": Splits(_texts(31, 1), _texts(11, 2)),
        "loss": next_character_loss,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9),
        "batch_size": 12,
        "steps": 6,
        "metrics": {"bits": bits_per_character},
        "clip_norm": 0.3,
        **changes,
    }
    return Job(**settings)


def _train(job: Job, out: Path, plan: Any, **options: Any) -> shardwise.Run:
    return shardwise.train(job, plan=plan, out=out, progress=False, **options)


def test_a_run_goes_on_under_other_layouts(tmp_path: Path) -> None:
    serial = _train(_job(), tmp_path / "serial", "serial")
    first = _train(_job(steps=2), tmp_path / "run", "tensor=2")
    assert "blocks.0.attention.qkv  Linear     column" in (first.folder.path / "tensor.txt").read_text()
    before = first.model.state_dict()  # read before the folder's weights are replaced
    for steps, plan in ((3, "data=2"), (4, "data=2,tensor=2"), (5, "shard=2,tensor=2"), (6, "tensor=2")):
        run = _train(_job(steps=steps), tmp_path / "run", plan, resume=True)
    assert not torch.equal(before["norm.weight"], run.model.state_dict()["norm.weight"])
    torch.testing.assert_close(run.history, serial.history, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run.model.state_dict(), serial.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert run.metrics["bits"] == pytest.approx(serial.metrics["bits"], rel=1e-5)
    bare = _net()
    load_model(bare, run.folder.weights_path)
    torch.testing.assert_close(bare.state_dict(), run.model.state_dict(), rtol=0, atol=0)
    assert shardwise.predict(run, torch.randint(0, 17, (11, 8))).shape == (11, 8, 17)


def test_killed_and_resumed_is_bit_for_bit(tmp_path: Path) -> None:
    whole = _train(_job(), tmp_path / "whole", "tensor=2")
    _train(_job(steps=3), tmp_path / "parts", "tensor=2")
    parts = _train(_job(), tmp_path / "parts", "tensor=2", resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor), name


def test_bf16_in_pieces(tmp_path: Path) -> None:
    """bf16 agrees to its three digits, and evaluation gives whole outputs to metrics."""
    serial = _train(_job(precision="bf16", micro_batch=5), tmp_path / "serial", "serial")
    run = _train(_job(precision="bf16", micro_batch=5), tmp_path / "run", "data=2,tensor=2")
    assert serial.history[-1] < serial.history[0]
    torch.testing.assert_close(run.history, serial.history, rtol=5e-3, atol=5e-3)
    assert run.metrics["bits"] == pytest.approx(serial.metrics["bits"], rel=1e-2)


def _own_loop(plan: Plan | None = None) -> list[float]:
    if (world := Group.world()).size > 1:  # as torchrun would say
        os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.rank))
        os.environ.update(LOCAL_WORLD_SIZE=str(world.size), MASTER_ADDR="localhost", MASTER_PORT="0")
    with shardwise.start(_job(), plan=plan) as run:
        losses = [run.step(batch) for batch, _ in zip(run.batches(), range(4), strict=False)]
        return [*losses, run.evaluate()["bits"]]


def test_a_loop_of_ones_own(ranks: Callable[..., list[Any]]) -> None:
    expected = _own_loop()
    for found in ranks(2, _own_loop, Plan(layout=Layout(tensor=2))):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class _Normed(nn.Module):
    """Every output is used whole at once: nothing to split."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(9, 15)
        self.recurrent = nn.GRU(15, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.recurrent(F.normalize(self.inner(x), dim=-1)[:, None])[0][:, 0])


def _compiled_inside(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return nn.Sequential(nn.Linear(9, 9), module)


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "nothing to split": (
        {"model": _Normed, "data": (torch.randn(9, 9), torch.zeros(9).long()), "loss": F.cross_entropy, "metrics": {}},
        "tensor=2",
        r"nothing in this model can be split.*inner \(Linear\).*recurrent \(GRU\)",
    ),
    "optimizer": (
        {"optimizer": lambda params: torch.optim.Rprop(params)},
        "tensor=2",
        "Rprop cannot step on parameters that are split",
    ),
    "optimizer switches": (
        {"optimizer": lambda params: torch.optim.AdamW(params, foreach=True)},
        "data=2,tensor=2",
        "holds whole and split parameters",
    ),
    "compile": ({}, Plan(layout=Layout(tensor=2), compile=True), "tensor=2 with compile"),
    "compiled module": (
        {"model": lambda: _compiled_inside(nn.Linear(9, 4))},
        "tensor=2",
        "tensor=2: module '1' was given to torch.compile, and compiled code does not ask how split weights are used",
    ),
    "compiled model": (
        {"model": lambda: torch.compile(nn.Linear(9, 4), backend="eager")},
        "tensor=2",
        "tensor=2: the model was given to torch.compile",
    ),
    "rule for nothing": (
        {},
        Plan(layout=Layout(tensor=2), tensor_rules={"blocks.7": "row"}),
        "the model has no module of that name",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_before_a_worker_starts(case: str, tmp_path: Path) -> None:
    changes, plan, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        _train(_job(**changes), tmp_path / "run", plan)
    assert not (tmp_path / "run").exists()


def test_rules_come_from_the_plan_file(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('layout = "tensor=2"\n[tensor_rules]\n"blocks.0.attention" = "replicate"\n')
    run = _train(_job(steps=1), tmp_path / "run", plan)
    table = (run.folder.path / "tensor.txt").read_text()
    assert "as its rule says" in table
    assert run.plan.tensor_rules == {"blocks.0.attention": "replicate"}
    assert Plan.from_dict(run.plan.to_dict()) == run.plan
    plan.write_text('layout = "tensor=2"\n[tensor_rules]\n"blocks.0.attention" = "columns"\n')
    with pytest.raises(
        PlanError, match=r"tensor_rules of 'blocks.0.attention'='columns': it must be one of column, row"
    ):
        Plan.read(plan)
