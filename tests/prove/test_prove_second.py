"""What float32 rounding or luck could hide: decided in float64, or not comparable."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from shardwise.prove.proof import prove
from shardwise.spec.job import Job

Jobs = Callable[..., Job]


class Coarse(nn.Module):
    """The gradient of `side` is off by some percent in float32, and of `main`, which is most of the whole, is not."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(7, 3)
        self.norm = nn.LayerNorm(7)
        self.side = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.main(x) + 0.02 * self.side(self.norm(x + 3e5)))


class Drawing(nn.Module):
    """Its output has a factor that it draws."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x) * (1 + self.draw()))


class DrawnRate(torch.optim.SGD):
    """Its learning rate is another after each step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = random.uniform(0.1, 0.2)
        return super().step(closure)


class SignSGD(torch.optim.SGD):
    """Goes a whole step where the gradient of a bias in front of BatchNorm is rounding only."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.sign_()
        return super().step(closure)


class Spectral(nn.Module):
    """A step of power iteration in each forward pass: micro-batches take more of them than whole batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = spectral_norm(nn.Linear(7, 15))
        self.head = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.relu(self.inner(x))))


class Averaging(nn.Module):
    """Keeps an average of its weights, a step of it in each forward pass, which no gradient shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)
        self.average = nn.Linear(7, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.average.weight.lerp_(self.layer.weight, 0.1)
        return torch.as_tensor(self.layer(x))


def _average_off(a: Any) -> None:
    ((name, turn),) = a.turns.items()

    def updated() -> None:
        turn.update()
        with torch.no_grad():
            a.model.average.weight.mul_(1.002)

    a.turns = {name: replace(turn, update=updated)}


def _five_percent(a: Any) -> None:
    finish = a.composed.gradients.finish

    def finished(**options: Any) -> None:
        finish(**options)
        a.model.side.weight.grad.mul_(1.05)

    a.composed.gradients.finish = finished


def test_a_mistake_behind_coarse_rounding_is_found_in_float64(job: Jobs) -> None:
    """Eight times what serial float32 is off is more than this mistake."""
    coarse = job("mlp", model=Coarse)
    refuted = prove(coarse, "data=2", fault=_five_percent, steps=1)
    assert refuted.outcome == "refuted"
    assert {item.name.split(" ")[0] for item in refuted.failed if item.kind == "gradient"} == {"side.weight"}
    assert any("compared in float64" in note for note in refuted.notes)
    assert refuted.findings[0].factor == pytest.approx(1.05)
    proved = prove(coarse, "data=2", steps=1)
    assert proved.proved, proved
    assert any("in float64 as well" in note for note in proved.notes)


@pytest.mark.parametrize(
    "draw, name",
    [(lambda: float(np.random.rand()), "numpy.random"), (random.random, "Python's random")],  # noqa: NPY002
    ids=["numpy", "python"],
)
def test_a_model_that_draws_from_other_generators(job: Jobs, draw: Callable[[], float], name: str) -> None:
    """Forked workers would draw the same NumPy numbers, and those of a training need not."""
    verdict = prove(job("mlp", model=lambda: Drawing(draw)), "data=2")
    assert verdict.outcome == "not comparable"
    assert name in verdict.findings[0].message


@pytest.mark.parametrize(
    "draw, name, matters",
    [
        (lambda: float(torch.randint(0, 1000, ()) == 0), "randint", True),
        (lambda: float(torch.rand(()) < 0.001), "rand", True),
        (lambda: float(torch.rand(()) < 0.0), "rand", False),
        (lambda: float(torch.empty(()).bernoulli_(0.999)), "bernoulli_", True),
        (lambda: float(torch.bernoulli(torch.ones(()))), "bernoulli", False),
        (lambda: float(torch.empty(()).uniform_(2.0, 3.0) >= 2.0), "uniform_", False),
    ],
)
def test_draws_that_seldom_matter(job: Jobs, draw: Callable[[], float], name: str, matters: bool) -> None:
    """No step of a proof need take a branch that one step in a thousand takes."""
    verdict = prove(job("mlp", model=lambda: Drawing(draw)), "data=2", steps=1)
    if matters:
        assert verdict.outcome == "not comparable" and name in verdict.findings[0].message
    else:
        assert verdict.proved and any(name in text for text in verdict.not_covered), verdict


def test_an_optimizer_that_draws(job: Jobs) -> None:
    """The first gradients agree, and nothing after them."""
    verdict = prove(job("mlp", optimizer=lambda parameters: DrawnRate(parameters, lr=0.1)), "data=2")
    assert verdict.outcome == "not comparable"
    assert "Python's random" in verdict.findings[0].message


def test_steps_by_the_sign_of_rounding_are_no_disagreement(job: Jobs) -> None:
    """Weights and running statistics drift in any arithmetic; losses and gradients do not."""
    verdict = prove(job("conv", optimizer=lambda parameters: SignSGD(parameters, lr=0.01)), "data=2")
    assert verdict.proved, verdict
    assert any("buffer norm1.running_mean" in note for note in verdict.notes)


def test_micro_batches_that_are_another_computation_are_no_yardstick(job: Jobs) -> None:
    """They differ by little, from layers that keep something in each forward pass, and no sum of the plan is to blame."""
    verdict = prove(job("mlp", model=Spectral), "data=2")
    assert verdict.proved, verdict
    assert any("micro-batches is another computation" in note for note in verdict.notes)
    assert prove(job("mlp", model=Averaging), "data=2").proved
    verdict = prove(job("mlp", model=Averaging), "data=2", fault=_average_off)
    assert verdict.outcome == "refuted" and verdict.failed[0].name == "average.weight", verdict
