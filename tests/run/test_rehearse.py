"""Mistakes in a job's own functions are wrong input, told before a worker starts and before a run folder is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import shardwise
from shardwise.advise.advice import _refusals
from shardwise.errors import DataError, JobError, PlanError
from shardwise.parallel.context.check import check_context
from shardwise.run import tryout
from shardwise.run.assemble import check_job, check_updates
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank

INPUTS, CLASSES = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
SPLITS = {"train": (INPUTS, CLASSES), "test": (INPUTS, CLASSES)}


class _Broken(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise KeyError(f"no sample {index}")


class _ForOneSize(nn.Module):
    """Written for batches of eight, and for training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        output: Tensor = self.layer(x.reshape(8, 7))
        return output


def _job(**changes: Any) -> shardwise.Job:
    values: dict[str, Any] = {
        "model": lambda: nn.Linear(7, 3),
        "data": SPLITS,
        "loss": F.cross_entropy,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "batch_size": 8,
        "epochs": 1,
    }
    values |= changes
    return shardwise.Job(**values | ({"loss": None} if "objective" in changes else {}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": lambda: nn.Linear(5, 3)},
            r"(?s)the model fails on the first 4 samples of the training.*float32 \(4, 7\)",
        ),
        ({"data": (INPUTS.double(), CLASSES)}, "(?s)the model fails.*inputs are float64: give float32"),
        ({"data": (INPUTS, CLASSES.int())}, r"(?s)Job.loss fails.*int32 \(4,\) from 0 to 2.*Class numbers are int64"),
        ({"data": (INPUTS, CLASSES + 1)}, "(?s)Job.loss fails.*an output of 3 classes takes 0 to 2"),
        ({"loss": lambda output, target: 1 / 0}, r"(?s)Job.loss fails.*test_rehearse.py.*ZeroDivisionError"),
        (
            {"loss": lambda output, target: F.cross_entropy(output.detach(), target)},
            "not depend on the model's parameters",
        ),
        ({"objective": lambda model, batch: model(batch)}, "(?s)Job.objective fails.*TypeError"),
        (
            {"metrics": {"f1": lambda output, target: output.f1}},
            "(?s)metric 'f1' fails on the first 4 samples of the test",
        ),
        ({"metrics": {"hits": lambda output, target: output.argmax(1) == target}}, r"metric 'hits' returned .*\(4,\)"),
        ({"data": {"train": (INPUTS, CLASSES), "test": (INPUTS[:, :5], CLASSES)}}, "first 4 samples of the test data"),
        ({"data": _Broken()}, "(?s)first samples of the training data cannot be read.*no sample 0"),
        ({"model": lambda: 1 / 0}, "(?s)Job.model failed.*ZeroDivisionError"),
        ({"model": nn.Linear(7, 3)}, "Job.model is a Linear: give a function"),
    ],
)
def test_told_with_what_met(changes: dict[str, Any], words: str) -> None:
    for plan in (Plan(), Plan(layout=Layout(data=2))):
        with pytest.raises(JobError, match=words) as told:
            check_job(_job(**changes), plan, rehearsal=True)
        assert "shardwise/run" not in str(told.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": _ForOneSize, "data": (INPUTS, CLASSES)},
        {"model": lambda: nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3)), "data": (INPUTS[:1], CLASSES[:1])},
        {"loss": lambda output, target: F.cross_entropy(output, target) + 0 * torch.distributed.get_rank()},
    ],
)
def test_no_verdict_where_few_samples_tell_nothing(changes: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    check_job(_job(**changes), Plan(), rehearsal=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"Job\.loss fails"):
        shardwise.train(_job(data=(INPUTS, CLASSES.float())), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_fields_that_cannot_be_called() -> None:
    with pytest.raises(JobError, match=r"the class CrossEntropyLoss: make one of it, CrossEntropyLoss\(\)"):
        _job(loss=nn.CrossEntropyLoss)
    with pytest.raises(JobError, match=r"Job\.metrics is a list: give a dict"):
        _job(metrics=[shardwise.metrics.accuracy])
    with pytest.raises(JobError, match=r"(?s)Job\.schedule failed.*positional argument"):
        check_updates(_job(schedule=lambda optimizer: None), 3)
    with pytest.raises(JobError, match=r"(?s)Job\.optimizer failed.*ZeroDivisionError"):
        check_updates(_job(optimizer=lambda params: 1 / 0), 3)
    with pytest.raises(JobError, match=r"DataLoader: give its data set, data=loader\.dataset"):
        check_job(_job(data=DataLoader(TensorDataset(INPUTS, CLASSES))), Plan(), rehearsal=True)


def test_a_sum_is_called_a_sum() -> None:
    job = _job(loss=nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(PlanError, match="the loss is a sum over the samples and not their mean"):
        check_job(job, Plan(layout=Layout(data=2)))


def test_an_error_of_the_data_keeps_its_class() -> None:
    with pytest.raises(DataError, match="cannot be read"):
        check_job(_job(data=shardwise.data.cifar10("/nowhere")), Plan(), rehearsal=True)


class _Squeezes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x).squeeze()
        return output


@pytest.mark.parametrize(
    ("model", "split"), [(lambda: nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3)), "training"), (_Squeezes, "test")]
)
def test_one_sample_left_over_for_the_last_batch(model: Any, split: str) -> None:
    rest = {"train": (INPUTS[:17], CLASSES[:17])} if split == "training" else {"train": (INPUTS, CLASSES)}
    data = rest | {"test": (INPUTS[:17], CLASSES[:17])}
    metrics = {"accuracy": lambda output, target: (output.argmax(1) == target).float().mean()}
    words = (
        f"the {split} data do not fail, but 17 samples in batches of 8 leave one over, and step 3 is one sample alone"
    )
    job = _job(model=model, data=data, metrics=metrics)
    with pytest.raises(JobError, match=words):
        check_job(job, Plan(), rehearsal=True)
    check_job(_job(model=model, data=SPLITS, metrics=metrics), Plan(), rehearsal=True)
    if split == "training":
        check_job(_job(model=model, data=data, metrics=metrics, steps=2, epochs=None), Plan(), rehearsal=True)


def test_sequences_are_tried_once_for_all_plans_with_as_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found depends on the degree alone, and trying costs passes of the whole model."""
    asked: list[int] = []

    def counting(model: nn.Module, degree: int, *rest: Any) -> Any:
        asked.append(degree)
        return check_context(model, degree, *rest)

    monkeypatch.setattr(tryout, "check_context", counting)
    layouts = [Layout(context=2), Layout(context=4), Layout(data=2, context=2), Layout(), Layout(data=2, context=4)]
    answers = _refusals(
        Rank(rank=0, local_rank=0, workers=1, local_workers=1),
        job=_job(),
        plans=[Plan(layout=layout) for layout in layouts],
    )
    assert asked == [2, 4]
    told = [(answer or "")[:10] for answer in answers]
    assert told == ["context=2 ", "context=4 ", "context=2 ", "", "context=4 "]
