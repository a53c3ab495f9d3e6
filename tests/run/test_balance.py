"""Load balancing: a slow rank gets a smaller share of the global batch, and every step stays that of one worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwise.cli.main import _run
from shardwise.data.stream import Stream
from shardwise.errors import PlanError
from shardwise.run.balance import Balancer, proportional_sizes
from shardwise.run.train import train
from shardwise.spec.events import StepsEvent, read_events
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.observations import PHASES, BalanceEvent, RanksEvent
from shardwise.spec.plan import Plan

JOB = Path(__file__).with_name("planted.py")
STEPS = 40


def _event(sizes: list[int], costs: list[float], *, own_seconds: float, steps: int = STEPS) -> RanksEvent:
    """Settled steps in which rank r needs `costs[r]` seconds a sample; `own_seconds` is what differs from rank to rank."""
    ranks = len(sizes)
    work = [size * cost * steps for size, cost in zip(sizes, costs, strict=True)]
    table = {phase: [0.0] * ranks for phase in PHASES}
    table["forward"], table["backward"] = [0.4 * own for own in work], [0.6 * own for own in work]
    table["synchronisation"] = [max(work) - own for own in work]
    zeros = [0] * ranks
    return RanksEvent(
        first_step=0,
        steps=steps,
        seconds=own_seconds,
        timed_steps=steps,
        phase_seconds=table,
        late_seconds=[0.0] * ranks,
        samples=[size * steps for size in sizes],
        sent_bytes=zeros,
        memory_bytes=zeros,
        peak_memory_bytes=zeros,
        cpu_seconds=[0.0] * ranks,
        core_wait_seconds=[0.0] * ranks,
    )


def _walk(costs: list[float], batch: int, events: int, *, own_seconds: float = 1.0) -> list[list[int]]:
    balancer, changes = Balancer(batch, proportional_sizes(batch, [1.0] * len(costs))), []
    for _ in range(events):
        new = balancer.update(_event(balancer.sizes, costs, own_seconds=own_seconds))
        if new is not None:
            changes.append(new)
    return changes


def test_shares_follow_the_measured_speed_and_rest_once_they_do() -> None:
    assert _walk([0.001, 0.003, 0.001], 70, 40) == [[30, 10, 30]]
    assert _walk([0.001, 0.00105, 0.001], 90, 40) == []  # a small difference
    assert _walk([0.001, 1.0], 64, 40) == [[61, 3]]  # a tenth of an even share is left for its speed to be seen
    assert proportional_sizes(3, [1.0, 1e-9, 1e-9]) == [1, 1, 1]


def test_every_rank_decides_alike_whatever_its_own_clock_says() -> None:
    costs = [0.001, 0.002]
    assert _walk(costs, 30, 9, own_seconds=1e-6) == _walk(costs, 30, 9, own_seconds=1e6) == [[20, 10]]


def test_a_hiccup_changes_nothing() -> None:
    balancer = Balancer(60, [30, 30])
    for number in range(30):
        costs = [0.001, 0.02 if number == 12 else 0.001]
        assert balancer.update(_event([30, 30], costs, own_seconds=1.0)) is None


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _command(capfd: pytest.CaptureFixture[str], out: Path, *options: str, seconds: float = 0.002) -> dict[str, Any]:
    # 101 batches an epoch, the last of them short: batches are divided anew in the middle of an epoch.
    words = ["train", str(JOB), "--set", "trouble=sleep_samples", "--set", f"seconds={seconds}", "--set", "samples=806"]
    assert _run([*words, "--out", str(out), "--quiet", "--json", *options]) == 0
    answer: dict[str, Any] = json.loads(capfd.readouterr().out)
    return answer


def test_a_slow_rank_gets_a_smaller_share_and_the_run_stays_that_of_one_worker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "balanced"
    first = _command(capfd, out, "--plan", "data=2", "--steps", "150", "--balance")
    sizes = first["samples_per_rank"]
    assert sum(sizes) == 8 and sizes[0] > 4 > sizes[1], sizes  # rank 1 sleeps three times as long for each sample
    events = read_events(out / "events.jsonl")
    changes = [event for event in events if isinstance(event, BalanceEvent)]
    assert changes and changes[-1].samples == sizes and changes[0].step < 101, changes  # within the first epoch
    computed = [event.samples for event in events if isinstance(event, RanksEvent)]
    assert computed[-1][0] > computed[-1][1]  # the shares were taken, not only told
    again = _command(capfd, out, "--resume", "--steps", "155", "--balance")
    assert again["samples_per_rank"] == sizes  # it goes on as it was divided, also in its short batch
    serial = _command(capfd, tmp_path / "serial", "--plan", "serial", "--steps", "155", seconds=0.0)
    assert serial["samples_per_rank"] == [8]
    for name, value in _weights(tmp_path / "serial").items():
        assert torch.allclose(_weights(out)[name], value, rtol=1e-5, atol=1e-6), name

    def losses(folder: Path) -> list[float]:
        kept = [event for event in read_events(folder / "events.jsonl") if isinstance(event, StepsEvent)]
        return [loss for event in kept for loss in event.losses]

    assert losses(out) == pytest.approx(losses(tmp_path / "serial"), rel=1e-4)
    assert "divided anew: " + ", ".join(map(str, sizes)) in _text(out, capfd)


def _text(out: Path, capfd: pytest.CaptureFixture[str]) -> str:
    assert _run(["watch", str(out), "--text", "--once"]) == 0
    return " ".join(capfd.readouterr().out.replace("│", " ").split())


def test_balance_is_refused_where_it_could_not_be_exact_or_tell_anything(
    planted: Callable[..., Job], tmp_path: Path
) -> None:
    two = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    for plan in ("serial", "pipeline=2", "data=2,tensor=2"):
        with pytest.raises(PlanError, match="--balance with plan"):
            train(planted(model=lambda: two), plan=plan, balance=True, out=tmp_path / "run")
    with pytest.raises(PlanError, match="--balance with a stream"):
        train(planted(data={"train": Stream(lambda: iter([]))}), plan="data=2", balance=True, out=tmp_path / "run")
    with pytest.raises(PlanError, match="BatchNorm layer"):
        norm = torch.nn.Sequential(torch.nn.Linear(20, 2), torch.nn.BatchNorm1d(2))
        train(planted(model=lambda: norm, micro_batch=4), plan="data=2", balance=True, out=tmp_path / "run")
    for shares, balance in (((2.0, 1.0), False), ((), True)):
        with pytest.raises(PlanError, match="counts each worker the same"):
            local = Plan(layout=Layout(data=2), local_steps=4, shares=shares)
            train(planted(), plan=local, balance=balance, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def planted() -> Callable[..., Job]:
    """`planted(**changes)`: a small job without trouble, with fields changed."""

    def make(**changes: Any) -> Job:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(16, 20, generator=generator), torch.randint(0, 2, (16,), generator=generator)
        values: dict[str, Any] = {
            "model": lambda: torch.nn.Linear(20, 2),
            "data": {"train": rows},
            "loss": torch.nn.functional.cross_entropy,
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            "batch_size": 8,
            "epochs": 1,
        }
        return Job(**{**values, **changes})

    return make
