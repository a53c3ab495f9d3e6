"""Where models are cut, and what is refused before anything runs: always with what to do instead."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.errors import PlanError, RunFailed
from shardwise.parallel.pipeline.part import split, take_part
from shardwise.parallel.pipeline.runner import PipelineRunner
from shardwise.spec.schedule import stages_for


class Layers(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (16, 16, 16, 16)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((16, *widths), widths, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


ROWS = torch.randn(3, 16)


def test_stages_have_equal_work_and_whole_blocks() -> None:
    table = split(Layers(), ROWS, 2).table
    assert table.cuts == ("layers.2",)
    assert [share.cost_share for share in table.stages] == pytest.approx([0.5, 0.5])
    assert table.stages[1].carried == (("float32[3, 16]", "torch.tanh"),)
    assert table.stages[1].carried_bytes == 3 * 16 * 4


def test_a_heavy_layer_gets_a_stage_of_its_own() -> None:
    table = split(Layers((16, 16, 800, 16)), ROWS, 3).table
    assert "layers.2" in table.cuts
    assert table.cuts != ("layers.1", "layers.2")


def test_fewest_bytes_cross_among_equal_cuts() -> None:
    """The narrow place is nearly as balanced as the wide one."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(*pair) for pair in [(64, 64), (64, 62), (62, 64), (64, 64)])
            self.wide = nn.Linear(62, 62 * 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.d(self.c(self.b(self.a(x))))
            return y

    assert split(Narrow(), torch.randn(3, 64), 2).table.cuts == ("c",)


def test_named_cuts_overrule() -> None:
    table = split(Layers(), ROWS, 3, ["layers.1", "layers.2"]).table
    assert table.cuts == ("layers.1", "layers.2")
    assert "layers.2" in str(table)


@pytest.mark.parametrize(
    ("cuts", "says"),
    [
        (["layers.9"], "no module 'layers.9'; did you mean layers."),
        (["layers.2", "layers.1"], "the order in which they are called"),
        (["layers"], "never called"),
        (["layers.0"], "nothing to do"),
        (["layers.1", "layers.1"], "one stage only"),
    ],
)
def test_cuts_that_cannot_be(cuts: list[str], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        split(Layers(), ROWS, len(cuts) + 1, cuts)


def test_a_wrong_number_of_cuts() -> None:
    with pytest.raises(PlanError, match="makes 2 stages, but 4 are needed"):
        split(Layers(), ROWS, 4, ["layers.1"])


def test_too_many_stages_name_the_places() -> None:
    with pytest.raises(PlanError, match=r"cannot be cut into 5 stages.*layers\.1, layers\.2, layers\.3"):
        split(Layers(), ROWS, 5)


class Reads(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if x.sum() > 0:
            x = x * 2
        return super().forward(x)


class Hides(nn.Module):
    """The second layer reads what the first left in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.reader = Writer(), Reader()
        self.reader.source = [self.writer]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.reader(self.writer(x))
        return y


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.left: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.left = self.linear(x)
        return self.left + 1


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.source: list[Writer] = []

    def forward(self, x: Tensor) -> Tensor:
        left = self.source[0].left
        assert left is not None
        y: Tensor = self.linear(x + left)
        return y


class SharedNorm(nn.Module):
    """One BatchNorm at both ends: its running statistics would live on two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layers = nn.BatchNorm1d(16), Layers()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layers(self.norm(x)))
        return y


class SparseTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Embedding(7, 16, sparse=True), Layers()

    def forward(self, rows: Tensor) -> Tensor:
        tokens = rows[:, 0].long().clamp(0, 6)
        y: Tensor = self.middle(self.first(tokens)) @ self.first.weight.t()
        return y


class Locked(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("model", "cuts", "says"),
    [
        (Locked, [], "copy.deepcopy of Locked failed"),
        (Reads, [], "looks at the values of an activation"),
        (Hides, ["reader"], "not through its arguments"),
        (SharedNorm, [], "changes 'norm.num_batches_tracked'"),
        (SparseTied, [], "sparse=False"),
    ],
)
def test_models_that_cannot_be_pipelined(model: Callable[[], nn.Module], cuts: list[str], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        split(model(), ROWS, 2, cuts)


def test_one_stage_is_no_pipeline() -> None:
    with pytest.raises(PlanError, match="at least 2"):
        split(Layers(), ROWS, 1)


def test_splitting_changes_nothing() -> None:
    model = Layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    split(model, ROWS, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model(ROWS).shape == (3, 16)


class LayerDrop(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() < 0.5:
                x = torch.tanh(x)
            x = layer(x)
        return x


def _random_branch() -> str:
    """All on one rank: interleaved stages without messages."""
    group = Group.world()
    random.seed(1)
    model = LayerDrop()
    part = take_part(split(model, ROWS, stages_for("interleaved1f1b", group.size)), model, 0, 1)
    runner = PipelineRunner(part, group, schedule="interleaved1f1b", device=torch.device("cpu"))
    try:
        runner.step([ROWS] * 8, lambda output, _: output.sum())
    except RunFailed as error:
        return str(error)
    return "no error"


def test_another_way_through_the_model_is_an_error() -> None:
    assert "All stages must take the same way" in _random_branch()
