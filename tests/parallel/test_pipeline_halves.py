"""Backward passes in halves: the same gradients, or whole passes where torch's halves would not be the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardwise.parallel.pipeline import halves
from shardwise.parallel.pipeline.halves import Halves


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 15), nn.Linear(15, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.b(self.a(x).tanh()) + x,)


class HandsThrough(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.b(self.a(x).tanh()), x


class NeedsAgain(Plain):
    """The backward pass needs an output itself."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x).exp()
        return y, self.b(y)


class Tied(Plain):
    """Weights used twice below an output that is used again: torch's halves fail."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.b(self.a(x).tanh())
        return self.b(self.a(y).tanh()), y


class LooksUp(Plain):
    """An output that no input leads to: torch's halves leave its embedding out, and say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a(x), self.table(torch.tensor([1, 3, 3]))


class Recurrent(nn.Module):
    """Its output is a view, which cannot be detached in place as torch wants to."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 5, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.lstm(x.unsqueeze(1))[0],)


def _whole(model: nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of inputs and weights, by a whole backward pass for each of the micro-batches."""
    model.zero_grad()
    returned = []
    for x in inputs:
        leaf = x.clone().requires_grad_()
        torch.autograd.backward(model(leaf), [torch.ones_like(y) for y in model(leaf)])
        assert leaf.grad is not None
        returned.append(leaf.grad)
    return returned, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("kind", "halved"),
    [
        (Plain, True),
        (HandsThrough, True),
        (NeedsAgain, True),
        (Tied, False),
        (LooksUp, False),
        (Recurrent, True),
    ],
)
def test_gradients_are_those_of_whole_passes(kind: type[nn.Module], halved: bool) -> None:
    torch.manual_seed(0)
    model = kind().double()
    inputs = list(torch.randn(3, 3, 7, dtype=torch.float64).unbind())
    wanted, weights = _whole(model, inputs)
    model.zero_grad()
    runner = Halves(list(model.parameters()))
    later = []
    for index, x in enumerate(inputs):
        leaf = x.clone().requires_grad_()
        outputs = list(model(leaf))
        rest = runner.inputs(0, outputs, [torch.ones_like(y) for y in outputs], [leaf])
        torch.testing.assert_close(leaf.grad, wanted[index])
        assert leaf.requires_grad
        # The first one is compared, and is whole on that account.
        assert (rest is not None) == (halved and index > 0)
        if rest is not None:
            later.append(rest)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert not later or any(not torch.allclose(a, b) for a, b in zip(found, weights, strict=True))
    for rest in later:
        rest()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], weights)


def test_a_graph_of_another_shape_is_compared_again() -> None:
    model = Plain().double()
    runner = Halves(list(model.parameters()))
    for twice in (False, False, True, True):
        leaf = torch.randn(3, 7, dtype=torch.float64).requires_grad_()
        (y,) = model(leaf)
        outputs = [y.exp() if twice else y]
        rest = runner.inputs(0, outputs, [torch.ones_like(y) for y in outputs], [leaf])
        if rest is not None:
            rest()
    assert list(runner._sound.values()) == [True, True]


def test_what_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the second half does nothing."""
    monkeypatch.setattr(halves, "stage_backward_weight", lambda *_: None)
    model = Plain()
    runner = Halves(list(model.parameters()))
    leaf = torch.randn(3, 7).requires_grad_()
    outputs = list(model(leaf))
    assert runner.inputs(0, outputs, [torch.ones_like(y) for y in outputs], [leaf]) is None
    assert list(runner._sound.values()) == [False]
    assert all(parameter.grad is not None for parameter in model.parameters())
