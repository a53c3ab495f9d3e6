"""Losses that couple samples are refused before a worker starts, and no others are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise
from shardwise.data.order import epoch_order
from shardwise.errors import PlanError
from shardwise.run.assemble import check_job
from shardwise.run.coupled import MOST_BYTES
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, CLASSES = torch.randn(20, 7, generator=GENERATOR), torch.arange(20) % 3


def contrastive(output: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(output @ output.T, torch.arange(len(output)))


def class_weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=torch.tensor([1.0, 2.0, 5.0]))


def counts_classes(target: Tensor) -> Tensor:
    return torch.tensor([1.0, 2.0, 5.0])[target].sum()


def some_ignored(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.where(target == 1, -100, target))


def own_contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return contrastive(model(batch[0]), batch[1])


def scaled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of one sample there is no deviation: a part of it gives no number."""
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (each * (each.detach() - each.detach().mean()) / each.detach().std()).mean()


def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(F.dropout(model(batch[0]), 0.5), batch[1])


def in_few_digits(output: Tensor, target: Tensor) -> Tensor:
    """A mean that rounding alone makes another one than the mean of its parts."""
    return F.cross_entropy(output.bfloat16(), target)


def _job(**changes: Any) -> shardwise.Job:
    values: dict[str, Any] = {
        "model": lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)),
        "data": (INPUTS, CLASSES),
        "loss": F.cross_entropy,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "batch_size": 8,
        "epochs": 1,
    }
    values |= changes
    return shardwise.Job(**values | ({"loss": None} if "objective" in changes else {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": contrastive},
        {"loss": class_weighted},
        {"loss": some_ignored},
        {"loss": lambda output, target: contrastive(output.bfloat16(), target)},
        {"objective": own_contrastive},
        {"objective": scaled},
    ],
)
def test_refused_where_batches_are_split(changes: dict[str, Any], tmp_path: Path) -> None:
    words = "splits samples between workers, but the loss couples samples: for 4 samples"
    with pytest.raises(PlanError, match=words):
        shardwise.train(_job(**changes), plan="data=2", out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    pieces = Plan(micro_batch=3)
    with pytest.raises(PlanError, match=r"splits a batch into pieces \(micro_batch=3\), but the loss couples"):
        check_job(_job(model=lambda: nn.Linear(7, 3), **changes), pieces)
    check_job(_job(**changes), Plan())
    check_job(_job(**changes), Plan(layout=Layout(pipeline=2)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": class_weighted, "weight": counts_classes},
        {"objective": noisy},
        {"loss": in_few_digits},
        {"objective": lambda model, batch: in_few_digits(model(batch[0]), batch[1])},
        {"loss": lambda output, target: F.cross_entropy(output, target) * float("nan")},
        {"loss": lambda output, target: 1 / 0},  # says so itself when it is trained with
    ],
)
def test_not_refused(changes: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    check_job(_job(**changes), Plan(layout=Layout(data=2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sorted_data_set_shows_its_classes() -> None:
    """The first samples in the order of the training are not all of one class."""
    with pytest.raises(PlanError, match="the loss couples samples"):
        check_job(_job(data=(INPUTS, CLASSES.sort().values), loss=class_weighted), Plan(layout=Layout(data=2)))


def test_an_objective_that_compares_samples_of_one_class() -> None:
    """The first 4 samples of the training are of 4 classes."""
    order = epoch_order(20, seed=0, epoch=0)
    classes = torch.zeros(20, dtype=torch.int64)
    classes[torch.from_numpy(order)] = torch.arange(20) % 6

    def furthest_of_class(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        output: Tensor = model(batch[0])
        same = batch[1][:, None] == batch[1]
        furthest = (torch.cdist(output, output) * same).amax(1)
        return furthest.mean() + output.square().mean()

    with pytest.raises(PlanError, match="the loss couples samples: for 8 samples"):
        check_job(_job(data=(INPUTS, classes), objective=furthest_of_class), Plan(layout=Layout(data=2)))
    check_job(_job(data=(INPUTS, torch.arange(20)), objective=furthest_of_class), Plan(layout=Layout(data=2)))


class _Counts(nn.Module):
    """Counts its samples in training, or its calls."""

    def __init__(self, *, rows: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.rows = nn.Linear(7, 3), nn.BatchNorm1d(3), rows
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.shape[0] if self.rows else 1
        output: Tensor = self.norm(self.layer(x))
        return output


def test_a_buffer_that_is_filled_from_samples_is_refused() -> None:
    """Two workers with as many samples each would agree on half of the count."""
    with pytest.raises(PlanError, match=r"fills the buffer 'seen' from its samples: after 4 samples"):
        check_job(_job(model=lambda: _Counts(rows=True)), Plan(layout=Layout(data=2)))
    check_job(_job(model=lambda: _Counts(rows=True)), Plan())
    check_job(_job(model=lambda: _Counts(rows=False)), Plan(layout=Layout(data=2)))


class _Follower(nn.Module):
    """Keeps a slow copy of a layer, which it updates in its forward pass, past what counts versions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 4)
        self.slow = copy.deepcopy(self.layer).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.slow.weight.data.lerp_(self.layer.weight.data, 0.1)
        output: Tensor = self.layer(x) - self.slow(x)
        return output


def test_weights_that_the_forward_pass_writes_into() -> None:
    """FSDP2 drops what is written into gathered weights: such a model trained something else, without a word."""
    for layout in (Layout(shard=2), Layout(tensor=2)):
        with pytest.raises(PlanError, match=r"writes into its weight 'slow.weight' in the forward pass"):
            check_job(_job(model=_Follower), Plan(layout=layout))
    check_job(_job(model=_Follower), Plan(layout=Layout(data=2)))
    model = _Follower()
    start = model.slow.weight.clone()
    check_job(_job(model=lambda: model), Plan(layout=Layout(data=2)), rehearsal=True)
    assert torch.equal(model.slow.weight, start)


def test_weights_that_are_written_by_the_samples_are_refused() -> None:
    """Only the rows that are looked up are made shorter."""
    data = (torch.arange(80).reshape(20, 4) % 31, CLASSES)

    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(31, 5, max_norm=1.0), nn.Flatten(), nn.Linear(20, 3))

    with pytest.raises(PlanError, match=r"writes into its weight '0.weight' by its samples: after 4 samples"):
        check_job(_job(model=model, data=data), Plan(layout=Layout(data=2)))
    check_job(_job(model=model, data=data), Plan())


def test_a_model_of_the_users_own_stays_in_training_mode() -> None:
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    net[1].eval()  # frozen statistics stay frozen
    values: dict[str, Any] = {"data": (INPUTS, CLASSES), "loss": F.cross_entropy, "batch_norm": "local"}
    with shardwise.start(
        model=net, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), batch_size=8, micro_batch=4, **values
    ) as run:
        assert [module.training for module in run.model.children()] == [True, False, True, True]


def test_a_large_model_is_not_built_for_it() -> None:
    built: list[str] = []

    def model() -> nn.Module:
        made = nn.Linear(7, MOST_BYTES // 4 // 7)
        built.append(made.weight.device.type)
        return made

    check_job(_job(model=model, loss=contrastive), Plan(layout=Layout(data=2)))
    assert built == ["meta"]


def test_streams_are_not_opened_for_it() -> None:
    opened: list[int] = []

    def rows() -> Any:
        opened.append(1)
        return iter(zip(INPUTS, CLASSES, strict=True))

    make: Callable[[], Any] = rows
    check_job(_job(data=shardwise.data.Stream(make), loss=contrastive), Plan(layout=Layout(data=2)))
    assert opened == []
