"""How wide each training of a sweep is: by predicted time and memory, or by the number of cores, and always with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.run.choose import Priced
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.tasks.need import Capacity, Need
from shardwise.tasks.options import Options
from shardwise.tasks.pool import Pool
from shardwise.tasks.ready import Group, Statistics
from shardwise.tasks.sweep.settle import SweepOptions
from shardwise.tasks.sweep.sweep import run_sweep
from shardwise.tasks.sweep.width import Width, choose_width

MIB = 1 << 20


def made_job() -> Job:
    data = {"train": (torch.randn(64, 3), torch.zeros(64, dtype=torch.long))}
    return Job(
        model=lambda: nn.Linear(3, 2), data=data, loss=nn.functional.cross_entropy, batch_size=64, epochs=1,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )  # fmt: skip


def decided(
    seconds: dict[int, float], *, trainings: int, cores: int = 2, memory: int = 1 << 40, own: int = MIB, **given: Any
) -> Width:
    """The decision where a step on so many workers takes so long."""

    def pricer(job: Job, *, widths: Sequence[int], cores: int, trainings: int) -> list[Priced]:
        return [
            Priced(Plan(layout=Layout(data=width), threads=1), seconds[width], own)
            for width in widths
            if width in seconds
        ]

    settings: dict[str, Any] = {
        "device": "cpu", "plan": None, "started_as": None, "at_once": trainings, "trainings": trainings,
        "pricer": pricer, "elsewhere": False,
    }  # fmt: skip
    return choose_width(made_job(), Capacity(cores=cores, memory_bytes=memory), **{**settings, **given})


def test_an_uneven_number_of_trainings_is_made_wide_where_that_is_faster() -> None:
    # Three trainings on two cores: two rounds of 10 ms side by side, or three of 6 ms one after the other.
    wide = decided({1: 0.010, 2: 0.006}, trainings=3)
    assert str(wide.plan.layout) == "data=2"
    assert (
        "one at a time on 2 workers: 167 steps/s, against 2 side by side on one worker each: 150 steps/s"
        in wide.reasons[0]
    )
    assert any("up to rounding" in reason for reason in wide.reasons)
    # Four fill both cores twice: nothing is left over.
    narrow = decided({1: 0.010, 2: 0.006}, trainings=4)
    assert str(narrow.plan.layout) == "serial" and narrow.memory_bytes == MIB
    assert (
        "2 side by side on one worker each: 200 steps/s, against one at a time on 2 workers: 167" in narrow.reasons[0]
    )


def test_a_gain_that_no_prediction_can_tell_is_not_taken() -> None:
    assert str(decided({1: 0.010, 2: 0.0066}, trainings=3).plan.layout) == "serial"
    assert str(decided({1: 0.010, 2: 0.0060}, trainings=3).plan.layout) == "data=2"


def test_trainings_that_do_not_fit_side_by_side_are_made_wide() -> None:
    roomy = decided({1: 0.010, 2: 0.006}, trainings=4, own=600 * MIB, memory=2000 * MIB)
    assert str(roomy.plan.layout) == "serial"
    tight = decided({1: 0.010, 2: 0.006}, trainings=4, own=600 * MIB, memory=1000 * MIB)
    assert str(tight.plan.layout) == "data=2"
    assert "no more fit in memory" in tight.reasons[0]


def test_what_is_not_priced_goes_by_cores_and_says_why() -> None:
    short = decided({}, trainings=4, pricer=lambda job, **given: "all of it takes about 2 s")
    assert str(short.plan.layout) == "serial" and short.memory_bytes == 0
    assert short.reasons[-1] == "not priced: all of it takes about 2 s"
    one = decided({}, trainings=1, pricer=None)
    assert str(one.plan.layout) == "data=2" and "each on 2" in one.reasons[0]
    ray = decided({1: 1.0, 2: 0.1}, trainings=4, elsewhere=True)
    assert str(ray.plan.layout) == "serial" and "this machine" in ray.reasons[-1]
    assert str(decided({1: 0.01}, trainings=4, plan="data=2").plan.layout) == "data=2"


def test_expected_memory_holds_until_tasks_were_measured() -> None:
    need = Need.make(expected_memory=100 * MIB)
    statistics = Statistics(0, len)
    group = Group(need, statistics)
    assert group.memory_bytes == 100 * MIB
    statistics.note(1.0, 40 * MIB)
    assert group.memory_bytes == pytest.approx(44 * MIB, rel=1e-6)
    # What the processes of a wide one take is not measured: the expectation stays the least.
    assert Group(Need.make(cores=2, expected_memory=100 * MIB), statistics).memory_bytes == 100 * MIB
    assert Group(Need.make(memory=10 * MIB, expected_memory=100 * MIB), statistics).memory_bytes == 10 * MIB


def at_once(item: tuple[str, int]) -> int:
    """How many tasks run now, itself included."""
    import time

    folder, number = Path(item[0]), item[1]
    mark = folder / str(number)
    mark.touch()
    time.sleep(0.2)
    count = len(list(folder.iterdir()))
    mark.unlink()
    return count


@pytest.mark.parametrize(("expected", "together"), [(10 * MIB, 2), (700 * MIB, 1)])
def test_tasks_are_not_packed_into_an_out_of_memory(expected: int, together: int, tmp_path: Path) -> None:
    with Pool(workers=2, memory="1GiB") as pool:
        items = [(str(tmp_path), number) for number in range(2)]
        assert max(pool.map(at_once, items, options=Options(expected_memory=expected))) == together


JOB = """
import torch
from torch import nn
import shardwise


def small(lr: float = 0.1, width: int = 2) -> shardwise.Job:
    if width > 3:
        raise ValueError("too wide")
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    return shardwise.Job(
        model=lambda: nn.Linear(5, width),
        data={"train": (inputs, (inputs.sum(1) > 0).long()), "test": (inputs, (inputs.sum(1) > 0).long())},
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        batch_size=32,
        epochs=1,
    )
"""


def test_a_resumed_sweep_keeps_its_width_whatever_is_predicted_now(tmp_path: Path) -> None:
    path = tmp_path / "job_of_width.py"
    path.write_text(JOB)
    seen: list[int] = []

    def pricer(job: Job, *, widths: Sequence[int], cores: int, trainings: int) -> list[Priced]:
        seen.append(sum(parameter.numel() for parameter in job.model().parameters()))
        return [Priced(Plan(layout=Layout(data=width), threads=1), 1.0 / width**2, MIB) for width in widths]

    given: dict[str, Any] = {"job": str(path), "workers": 2, "out": tmp_path / "out", "progress": False}
    first = run_sweep(SweepOptions(over=("lr=0.1,0.2", "width=2:3"), pricer=pricer, **given))
    assert first.summary["plan"] == "data=2" and first.summary["failed"] == 0
    assert first.summary["predicted_memory_bytes"] == MIB
    assert seen == [18]  # the larger of the two models, once
    again = run_sweep(SweepOptions(over=("lr=0.1,0.2", "width=2:3"), resume=True, **given))
    assert again.summary["plan"] == "data=2" and again.summary["reasons"] == ["each training runs as data=2, as before"]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["plan"].startswith("data=2")
    # A corner that cannot be built is a trial that fails, not the end of the sweep.
    given["out"] = tmp_path / "other"
    assert run_sweep(SweepOptions(over=("width=2,9",), pricer=pricer, **given)).summary["failed"] == 1
