"""Training from weights that were made in parts: the run that whole weights give, in less memory, or said why not."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once, not in every rank; nor is its code the memory that is looked at
from torch import Tensor, nn

import shardwise
from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.dist.split import local_part, whole_tensor
from shardwise.errors import PlanError
from shardwise.run.assemble import assemble, check_job
from shardwise.run.build import build_model
from shardwise.spec.events import WarningEvent, read_events
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

Ranks = Callable[..., list[Any]]
CPU = torch.device("cpu")


class Net(nn.Module):
    """Large linear layers in blocks, small ones around them."""

    def __init__(self, kind: str, width: int, blocks: int) -> None:
        super().__init__()
        self.into = nn.Linear(9, 512)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(512, width), nn.GELU(), nn.Linear(width, 512)) for _ in range(blocks)
        )
        self.norm = nn.BatchNorm1d(512)
        self.out = nn.Linear(512, 4)
        self.apply(self._draw)
        named = dict(self.blocks.named_parameters())
        first = named["0.0.weight"]
        with torch.no_grad():
            for name, parameter in named.items():
                if name.endswith("2.weight"):
                    parameter.mul_(1 / math.sqrt(6))
            if kind == "array":
                first.detach().numpy()[:] *= 2
            if kind == "process":  # other weights in each process
                first.mul_(os.getpid())

    @staticmethod
    def _draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.out(self.norm(x))
        return y


def _job(kind: str = "plain", *, width: int = 520, blocks: int = 2) -> Job:
    inputs = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    data = Arrays((inputs, inputs[:, :4].argmax(1)))
    return Job(
        name="net",
        model=lambda: Net(kind, width, blocks),
        data=Splits(data, data),
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        batch_size=27,
        epochs=2,
        clip_norm=1.0,
    )


def _plan(build: Any, **degrees: int) -> Plan:
    return Plan(layout=Layout(**degrees), build=build)


def _warnings(folder: Path) -> list[str]:
    return [event.message for event in read_events(folder / "events.jsonl") if isinstance(event, WarningEvent)]


def _assembled(plan: Plan, job: Job) -> dict[str, Any]:
    """What a rank has before its first step, and the most memory that it took to get there."""
    world = Group.world()
    assemble(_job(blocks=1), plan, world, CPU, total_steps=None)  # touches the code, which counts as memory
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM tells the peak
    before = _status("VmRSS")
    assembly = assemble(job, plan, world, CPU, total_steps=None)
    peak = _status("VmHWM") - before
    held = sum(local_part(p).numel() * p.element_size() for p in assembly.model.parameters())
    return {
        "weights": {name: _bits(whole_tensor(p.detach())) for name, p in assembly.model.named_parameters()},
        "peak": peak,
        "held": held,
        "remarks": assembly.composed.remarks,
    }


def _bits(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()


def _serial(job: Job) -> dict[str, str]:
    return {name: _bits(p.detach()) for name, p in build_model(job, CPU).named_parameters()}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def test_serial_weights_in_less_memory(ranks: Ranks) -> None:
    job = _job(width=2048, blocks=10)  # 10 blocks of 8 MiB
    serial = ranks(1, _serial, job)[0]  # not here, where it would leave room that the ranks inherit
    with torch.device("meta"):
        size = sum(p.numel() * p.element_size() for p in job.model().parameters())
    whole = ranks(2, _assembled, _plan("whole", shard=2), job)
    parts = ranks(2, _assembled, _plan("deferred", shard=2), job)
    for rank in (*whole, *parts):
        assert rank["remarks"] == ()
        assert rank["held"] < 0.51 * size
        assert rank["weights"] == serial
    # Whole, a rank has all weights, and once more where copies are made equal; in parts, half of them and one block. What
    # else an assembly takes is the same for both.
    least, most = min(rank["peak"] for rank in whole), max(rank["peak"] for rank in parts)
    assert most < least - 0.6 * size


def test_copies_of_shards_are_equal(ranks: Ranks) -> None:
    job = _job()
    for rank in ranks(4, _assembled, _plan("auto", data=2, shard=2), job):
        assert rank["remarks"] == ()
        assert rank["weights"] == _serial(job)


def test_the_same_training_resumed(tmp_path: Path) -> None:
    whole = shardwise.train(_job(), plan=_plan("whole", shard=2), out=tmp_path / "whole", progress=False)
    plan = _plan("deferred", shard=2)
    shardwise.train(_job(), plan=plan, out=tmp_path / "parts", progress=False, pause_after=1)
    parts = shardwise.train(_job(), out=tmp_path / "parts", progress=False, resume=True)
    assert "build=deferred" in parts.summary["plan"]
    assert _warnings(tmp_path / "parts") == []
    other = parts.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "reason"), [("array", "asks for the memory"), ("process", "would get different weights")]
)
def test_built_whole_where_it_must_be(kind: str, reason: str, tmp_path: Path) -> None:
    """Said, and the ranks start from the same weights: rank 0's, in the one case where they would not."""
    shardwise.train(_job(kind), plan="shard=2", out=tmp_path / "run", progress=False)
    said = _warnings(tmp_path / "run")
    assert len(said) == 1
    assert reason in said[0]
    assert "built the whole model" in said[0]


def test_refused_when_asked_for() -> None:
    with pytest.raises(PlanError, match="asks for the memory of a large tensor"):
        check_job(_job("array"), _plan("deferred", shard=2))
    with pytest.raises(PlanError, match="shard axis"):
        check_job(_job(), _plan("deferred", data=2))
    with pytest.raises(PlanError, match="shard axis"):
        check_job(_job(), _plan("deferred", shard=2, tensor=2))
    with pytest.raises(PlanError, match="build='half'"):
        _plan("half", shard=2)
    assert _plan("deferred", shard=2).with_layout(Layout(data=2)).build == "auto"
