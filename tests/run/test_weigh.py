"""The loss of a batch in parts is that of the whole, whatever it is a mean over; where it is not, the run ends and says so."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise
from shardwise.data.batch import Batch
from shardwise.errors import DataError, JobError, RunFailed, UserError
from shardwise.prove.proof import prove
from shardwise.run.weigh import LARGEST_BYTES, check_mean, weight_function
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

INPUTS = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
SORTED = torch.arange(60) // 20
"""As a folder of images gives them: the first samples are all of one class."""


def _job(**changes: Any) -> shardwise.Job:
    values: dict[str, Any] = {
        "model": lambda: nn.Linear(7, 3),
        "data": (INPUTS, SORTED),
        "loss": F.cross_entropy,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "batch_size": 8,
        "epochs": 2,
    }
    return shardwise.Job(**values | changes)


def _trained(job: shardwise.Job, plan: str, out: Path) -> list[float]:
    return shardwise.train(job, plan=plan, out=out / plan, progress=False).history


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 9.0])), nn.CrossEntropyLoss(ignore_index=2)],
    ids=["weights", "ignored"],
)
def test_losses_of_torch_count_their_classes(loss: nn.Module, tmp_path: Path) -> None:
    serial = _trained(_job(loss=loss), "serial", tmp_path)
    torch.testing.assert_close(_trained(_job(loss=loss), "data=2", tmp_path), serial, rtol=1e-5, atol=1e-6)


def test_what_they_count() -> None:
    weights = torch.tensor([1.0, 3.0, 9.0])
    target = torch.tensor([[0, 1, -100], [2, -100, 2]])
    count = weight_function(_job(loss=nn.CrossEntropyLoss(weight=weights)))
    assert count is not None
    assert float(count(target)) == 22.0
    assert float(count(torch.ones(4, 3) / 3)) == 4.0  # probabilities: a mean over the samples
    ignoring = weight_function(_job(loss=nn.NLLLoss(ignore_index=2)))
    assert ignoring is not None
    assert float(ignoring(target)) == 4.0
    assert weight_function(_job(loss=nn.CrossEntropyLoss())) is None  # nothing to send
    assert weight_function(_job(loss=nn.CrossEntropyLoss(weight=weights, reduction="sum"))) is None
    assert weight_function(_job(weight=len)) is len


def test_a_proof_of_class_weights_runs() -> None:
    job = _job(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 9.0])))
    assert prove(job, Plan(layout=Layout(data=2)), steps=2).proved


def test_ignored_targets_that_come_late_end_the_run(tmp_path: Path) -> None:
    """The first samples show nothing: those of the third step are the first with a target that does not count."""
    classes = SORTED.clone()
    classes[17] = classes[20] = -100
    job = _job(data=(INPUTS, classes), shuffle=False)
    with pytest.raises(JobError, match=r"step 3: the loss is no mean over samples.*weight=lambda target"):
        _trained(job, "data=2", tmp_path)
    counted = _job(data=(INPUTS, classes), shuffle=False, weight=lambda target: (target != -100).sum())
    serial = _trained(counted, "serial", tmp_path)
    torch.testing.assert_close(_trained(counted, "data=2", tmp_path / "b"), serial, rtol=1e-5, atol=1e-6)


def _part(count: int = 6) -> tuple[Tensor, Batch]:
    output = torch.randn(count, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.arange(count) % 3
    return output, Batch(inputs=output, targets=targets, count=count, global_count=count, index=0, largest=count)


class _Keeps(nn.Module):
    """Counts its calls, which must not be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(output, target)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        _Keeps(),
        lambda output, target: F.cross_entropy(F.dropout(output, 0.5), target),  # cannot be known
        lambda output, target: F.cross_entropy(
            output, target, torch.arange(3.0 if len(output) > 1 else 2.0)
        ),  # nor this
        lambda output, target: F.cross_entropy(output, target) * float("nan"),
        lambda output, target: F.cross_entropy(output.clamp_(-1, 1), target),  # writes to its argument
        lambda output, target: (output[:, 0] + torch.tensor([1e4, -1e4, 0.1])[target]).mean(),  # cancels
    ],
)
def test_says_nothing_of_others(loss: Any) -> None:
    output, part = _part()
    before, state = output.detach().clone(), torch.get_rng_state()
    check_mean(_job(loss=loss), output, part, 0)
    assert torch.equal(output, before)
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(loss, _Keeps):
        assert loss.calls == 0


def test_rounding_of_bfloat16_is_no_coupling() -> None:
    output, part = _part()
    check_mean(_job(loss=lambda output, target: output[:, 0].square().mean()), output.bfloat16(), part, 0)


def test_a_loss_with_weights_in_float32_is_refused_too() -> None:
    output, part = _part()
    weights = torch.tensor([1.0, 3.0, 9.0])
    with pytest.raises(JobError, match=r"Job\.weight, which counts them"):
        check_mean(_job(loss=lambda o, t: F.cross_entropy(o, t, weight=weights)), output, part, 0)


@dataclass
class _Plain:
    """A model's answer, as many libraries give it."""

    logits: Tensor
    cache: object = None


@dataclass
class _Both(OrderedDict[str, Any]):
    """As transformers do it: a mapping without what is None, with attributes."""

    logits: Tensor
    cache: object = None

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) is not None:
                self[item.name] = getattr(self, item.name)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, item.name) for item in fields(self))


class _Named(NamedTuple):
    logits: Tensor
    cache: object = None


class _Answers(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.net = kind, nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Any:
        return self.kind(self.net(inputs), object())


@pytest.mark.parametrize("kind", [_Plain, _Both, _Named])
@pytest.mark.parametrize("first", [0, 40], ids=["from the start", "later"])
def test_answers_of_libraries_are_looked_into(kind: Any, first: int, tmp_path: Path) -> None:
    def loss(answer: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(answer.logits, target)

    job, classes = _job(model=lambda: _Answers(kind), loss=loss, shuffle=False), SORTED.clone()
    _trained(job, "data=2", tmp_path)  # all is well
    if kind is _Plain:
        run = shardwise.train(
            _job(model=job.model, loss=loss, data=(INPUTS[:41], SORTED[:41])),
            plan="data=2",
            out=tmp_path / "one left",
            progress=False,
        )
        assert run.summary["steps"] == 12  # in the last step of an epoch one worker has no sample
    classes[first : first + 2] = -100
    with pytest.raises((UserError, RunFailed), match=r"Job\.weight"):
        shardwise.train(
            _job(**{**vars(job), "data": (INPUTS, classes)}), plan="data=2", out=tmp_path / "ignored", progress=False
        )


def test_a_weight_that_is_no_sum_is_refused() -> None:
    output, part = _part()
    with pytest.raises(JobError, match=r"as Job\.weight counts them"):
        check_mean(_job(weight=lambda target: 1.0), output, part, 0)


def test_large_outputs_are_not_copied() -> None:
    count = 4
    output = torch.zeros(1).expand(count, LARGEST_BYTES // 4)
    part = Batch(inputs=output, targets=torch.zeros(count), count=count, global_count=count, index=0, largest=count)
    check_mean(_job(loss=lambda output, target: 1 / 0), output, part, 0)


def test_a_message_says_what_a_failing_step_was_given(tmp_path: Path) -> None:
    classes = SORTED.clone()
    classes[33] = 7
    with pytest.raises(
        RunFailed, match=r"targets int64 \(4,\) from \d to 7; the largest target is 7, first of sample 33"
    ):
        _trained(_job(data=(INPUTS, classes)), "data=2", tmp_path)
    with pytest.raises(IndexError) as caught:
        _trained(_job(data=(INPUTS, classes)), "serial", tmp_path)
    assert "so 8 outputs would be needed" in caught.value.__notes__[-1]


def test_samples_that_are_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = INPUTS.clone()
    inputs[33, 2] = float("nan")
    shardwise.train(_job(data=(inputs, SORTED)), plan="serial", out=tmp_path / "bad")
    words = "because the inputs of sample 33 of the training data hold nan or infinity: the training goes on, but leave them out"
    assert words in capsys.readouterr().err
    lost = _job(loss=lambda output, target: F.cross_entropy(output, target) * float("inf"))
    shardwise.train(lost, plan="serial", out=tmp_path / "lost")
    assert "the loss became inf at step 1: the training goes on, but lower the learning rate" in capsys.readouterr().err


class _Pictures(torch.utils.data.Dataset[Any]):
    """One of them cannot be read, another is left out by a collate function, as many scripts do."""

    def __init__(self, missing: bool) -> None:
        self.missing = missing

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int) -> Any:
        if index == 33:
            if self.missing:
                return None
            raise OSError("truncated file")
        return INPUTS[index], SORTED[index]


def _without_none(samples: list[Any]) -> Any:
    return torch.utils.data.default_collate([sample for sample in samples if sample is not None])


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(loader_workers: int, tmp_path: Path) -> None:
    pictures = shardwise.data.Samples(_Pictures(missing=False), loader_workers=loader_workers)
    with pytest.raises(RunFailed) as caught:
        _trained(_job(data=pictures), "data=2", tmp_path)
    assert str(caught.value).split("with ")[1] == "OSError: truncated file; in sample 33 of the data set _Pictures"
    dropping = shardwise.data.Samples(_Pictures(missing=True), loader_workers, collate=_without_none)
    with pytest.raises(DataError, match=r"sample 33 of the data set _Pictures is None: every sample counts"):
        _trained(_job(data=dropping), "data=2", tmp_path / "none")


def test_a_schedule_that_needs_a_length_the_data_lacks(tmp_path: Path) -> None:
    def rows() -> Any:
        return iter(zip(INPUTS, SORTED, strict=True))

    def cosine(optimizer: Any, total: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    job = _job(data=shardwise.data.Stream(rows), schedule=cosine)
    with pytest.raises(JobError, match=r"total_steps is None: the data has no known length; give Job\.steps"):
        _trained(job, "serial", tmp_path)
    _trained(_job(data=shardwise.data.Stream(rows), schedule=cosine, steps=3, epochs=None), "serial", tmp_path)
