"""Operations of a step are counted, not guessed: on fake tensors, in a real step, for models of every kind."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.data.source import Stream, as_splits
from shardwise.dist.collectives import Group
from shardwise.errors import ShardwiseError
from shardwise.nn.moe import MoE
from shardwise.parallel.compress import LowRankSum
from shardwise.planner.jobmessages import low_rank_bytes
from shardwise.planner.jobstages import stages_of
from shardwise.probe import facts as counting
from shardwise.probe.facts import facts_apart
from shardwise.run.build import build_model
from shardwise.run.tryout import find_cut
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.work import JobFacts


def job_of(
    model: Callable[[], nn.Module], inputs: Any, targets: Tensor, *, loss: Any = F.cross_entropy, batch_size: int = 6
) -> Job:
    return Job(
        model=model,
        data=(inputs, targets),
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        batch_size=batch_size,
        epochs=2,
    )


def facts(job: Job, *, fake: bool) -> JobFacts:
    splits = as_splits(job.data)
    _ = splits.train
    return facts_apart(job, splits, fake=fake, timeout_seconds=60)


def classes(count: int, of: int = 4) -> Tensor:
    return torch.arange(count) % of


def flops(found: JobFacts, phase: str, samples: int) -> float:
    return sum(item.calls * item.flops(samples) for item in found.operations if item.phase == phase)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        out: Tensor = self.head((x + self.inner(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize("fake", [True, False], ids=["fake", "real"])
def test_a_residual_network_is_counted_by_hand(fake: bool) -> None:
    found = facts(job_of(Residual, torch.randn(12, 3, 10, 10), classes(12)), fake=fake)
    convolutions = [2 * 3 * 8 * 9 * 100, 2 * 8 * 8 * 9 * 100]
    linear = 2 * 8 * 4
    assert flops(found, "forward", 6) == pytest.approx(6 * (sum(convolutions) + linear))
    # The gradient of the input of the first layer is not asked for.
    assert flops(found, "backward", 6) == pytest.approx(6 * (convolutions[0] + 2 * convolutions[1] + 2 * linear))
    assert flops(found, "forward", 1) == pytest.approx(sum(convolutions) + linear)
    blocks = {block.name: block for block in found.model.blocks}
    assert found.model.parameters == sum(p.numel() for p in Residual().parameters())
    assert blocks["stem"].output_bytes == 8 * 100 * 4
    assert blocks["norm"].batch_coupled
    assert not blocks["head"].batch_coupled
    stochastic = [name for name, block in blocks.items() if block.stochastic]
    assert stochastic == [name for name in blocks if name == "inner" or name == "inner.2"]
    assert found.norm_layers == 1
    assert found.gradient_bytes == 4 * found.model.parameters
    assert found.optimizer_bytes == found.gradient_bytes
    assert found.steps == 4
    # The normalised images are kept for the backward pass: at least theirs and the convolutions' inputs.
    assert found.peak_sample_bytes > 3 * 8 * 100 * 4
    assert bool(found.seen) is not fake


def test_fake_and_real_steps_call_the_same() -> None:
    job = job_of(Residual, torch.randn(12, 3, 10, 10), classes(12))
    one, other = facts(job, fake=True), facts(job, fake=False)

    def table(found: JobFacts) -> list[tuple[str, str, int, float]]:
        return sorted((i.phase, i.kind, i.calls, round(i.flops(6))) for i in found.operations)

    assert one.model.origin == "counted on fake tensors"
    assert other.model.origin == "counted in a real step"
    assert table(one) == table(other)
    assert one.peak_sample_bytes == pytest.approx(other.peak_sample_bytes, rel=0.05)
    assert JobFacts.from_dict(one.to_dict()) == one


def test_a_model_larger_than_the_machine_is_counted_without_memory() -> None:
    width = 60_000
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    job = job_of(
        lambda: nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)),
        torch.randn(6, 8),
        classes(6),
    )
    found = facts(job, fake=True)
    assert found.model.origin == "counted on fake tensors"
    assert found.parameter_bytes > 14e9
    assert flops(found, "forward", 1) == pytest.approx(2 * (8 * width + width * width + width * 4))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < max(before, 2_000_000)  # KiB


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cells(x)[0][:, -1])
        return out


def test_a_recurrent_layer_counts_its_steps() -> None:
    found = facts(job_of(Recurrent, torch.randn(12, 9, 5), classes(12)), fake=True)
    each = 2 * 9 * 4 * 7 * (5 + 7)
    assert flops(found, "forward", 1) == pytest.approx(each + 2 * 7 * 4, rel=0.01)
    assert flops(found, "backward", 1) == pytest.approx(2 * each + 4 * 7 * 4, rel=0.02)


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(5000, 8), nn.Embedding(300, 8)
        self.items.weight.requires_grad_(False)
        self.mix = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.mix(torch.cat([self.users(ids[:, 0]), self.items(ids[:, 1])], 1))
        return out


def test_a_recommender_is_counted_by_what_it_moves() -> None:
    found = facts(job_of(Recommender, torch.arange(24).reshape(12, 2), classes(12)), fake=True)
    # The gradient of a table is as large as the table, whatever the batch.
    table = next(i for i in found.operations if i.kind == "embedding_dense_backward")
    assert table.fixed_bytes >= 5000 * 8 * 4
    frozen = next(block for block in found.model.blocks if block.name == "items")
    assert (frozen.parameters, frozen.frozen_parameters) == (0, 2400)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.out(x)
        return scores


def test_tied_weights_count_once_and_equal_layers_are_seen() -> None:
    found = facts(job_of(Tied, torch.arange(12) % 11, classes(12)), fake=True)
    assert found.model.tied_groups == (("table.weight", "out.weight"),)
    assert found.model.parameters == 11 * 6 + 3 * 42
    assert ("layers.0", "layers.1", "layers.2") in found.model.repeated


def test_experts_need_a_real_step_and_say_so() -> None:
    def mixture() -> nn.Module:
        return nn.Sequential(MoE(8, 16, experts=4, top_k=2, balance=0), nn.Linear(8, 4))

    found = facts(job_of(mixture, torch.randn(12, 8), classes(12)), fake=True)
    assert found.model.origin == "counted in a real step"
    assert any("fake tensors did not work" in note for note in found.model.notes)
    assert found.expert_bytes > 0.5 * found.parameter_bytes
    # Two of four experts a token, two products each.
    assert flops(found, "forward", 6) >= 6 * 2 * 2 * 2 * 8 * 16


def test_a_step_of_two_sizes_that_differ_counts_the_larger() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.small(x) if len(x) < 5 else self.large(x).relu().relu()
            return out

    found = facts(job_of(Branching, torch.randn(12, 3), classes(12)), fake=True)
    assert any("different operations" in note for note in found.model.notes)
    assert flops(found, "forward", 6) == pytest.approx(6 * 2 * 3 * 4)


def test_a_job_that_fails_fails_here_with_its_own_words() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of paint")

    with pytest.raises(ShardwiseError, match="out of paint"):
        facts(job_of(Broken, torch.randn(12, 3), classes(12)), fake=False)


def test_a_step_that_never_ends_is_ended() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            while True:
                x = x + 1

    job = job_of(Slow, torch.randn(12, 3), classes(12))
    splits = as_splits(job.data)
    with pytest.raises(ShardwiseError, match="within 1 s"):
        facts_apart(job, splits, timeout_seconds=1)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_what_powersgd_sends_is_counted_as_it_is_sent(rank: int) -> None:
    job = job_of(Residual, torch.randn(12, 3, 10, 10), classes(12))
    sent = LowRankSum(job.model().named_parameters(), Group(), rank=rank).bytes_per_step
    counted = facts(job, fake=False)
    assert sum(low_rank_bytes(counted, rank)) == pytest.approx(sent, abs=128)  # buckets are padded
    assert sum(item.count * item.bytes for item in counted.gradients) == counted.gradient_bytes


class Marked(nn.Module):
    """A skip over all layers, and marks that are made of an activation and used at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 11)

    def forward(self, ids: Tensor) -> Tensor:
        first = self.tokens(ids)
        kept = first
        marks = first.argmax(-1)
        for layer in self.layers:
            kept = torch.tanh(layer(kept))
        kept = (kept + first) * marks.unsqueeze(-1)
        output: Tensor = F.linear(self.head(kept) @ self.tokens.weight, self.tokens.weight).mean(1)
        return output


@pytest.mark.parametrize("fake", [True, False])
def test_a_cut_is_priced_by_all_that_crosses_it(fake: bool) -> None:
    job = job_of(Marked, torch.randint(0, 11, (12, 5)), classes(12))
    cuts = {cut.name: cut for cut in facts(job, fake=fake).cuts}
    # five tokens of a sample: the layer's output and the skip in fp32, the marks as whole numbers without a gradient
    middle = cuts["layers.2"]
    assert middle.sent_bytes == 5 * (2 * 16 * 4 + 8)
    assert middle.returned_bytes == 5 * 2 * 16 * 4
    assert middle.shared_bytes == 11 * 16 * 4
    works = [cut.work for cut in cuts.values()]
    assert works == sorted(works) and 0 < works[0] < works[-1] <= 1


@pytest.mark.parametrize("model", [Marked, Residual])
def test_a_plan_is_priced_with_the_cuts_that_training_makes(model: Callable[[], nn.Module]) -> None:
    inputs = torch.randint(0, 11, (12, 5)) if model is Marked else torch.randn(12, 3, 10, 10)
    job = job_of(model, inputs, classes(12))
    counted = facts(job, fake=False)
    for stages in (2, 3, 4):
        plan = Plan(layout=Layout(pipeline=stages))
        cut = find_cut(job, plan, build_model(job, torch.device("cpu")), torch.device("cpu"))
        assert cut is not None
        arriving = [share.carried_bytes / 4 for share in cut.split.table.stages[1:]]  # it is tried out on four samples
        priced = stages_of(counted, plan)
        assert list(priced.sent_bytes) == arriving
        # every block is done once, in one stage or in parts
        done = [sum(parts.get(block, 0.0) for parts in priced.parts) for block in range(len(counted.model.blocks))]
        assert done == pytest.approx([1.0] * len(done))


def test_a_stream_is_read_whole_by_every_rank_unless_it_is_sharded() -> None:
    samples = [(torch.randn(6), index % 3) for index in range(16)]
    kinds = {
        "list": (torch.randn(16, 6), classes(16, 3)),
        "whole": Stream(samples),
        "parts": Stream(lambda rank, ranks: samples[rank::ranks], sharded=True),
    }
    plain = job_of(lambda: nn.Linear(6, 3), torch.randn(2, 6), classes(2, 3), batch_size=4)
    found = {}
    for name, data in kinds.items():
        job = replace(plain, data=data, epochs=None, steps=2)
        found[name] = facts_apart(job, as_splits(data), thorough=False).data_whole
    assert found == {"list": False, "whole": True, "parts": False}


def test_steps_that_others_disturbed_are_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [SimpleNamespace(count=count) for count in (8, 16)]
    times = iter([0.10, 0.40, 0.10, 0.18])

    def seconds(assembly: object, batch: object) -> float:
        return next(times)

    monkeypatch.setattr(counting, "_seconds", seconds)
    seen = counting._steps_seen(None, batches)  # type: ignore[arg-type]
    assert [(one.samples, one.seconds) for one in seen] == [(8, 0.10), (16, 0.18)]
    times = iter([0.10, 0.40] + 6 * [0.1, 0.40])  # a larger step may not fit into the cache
    assert [one.seconds for one in counting._steps_seen(None, batches)] == [0.1, 0.4]  # type: ignore[arg-type]
    assert len(list(times)) == 6


def first_part(model: Any, batch: Any) -> Tensor:
    return model[0](batch[0]).square().mean()  # type: ignore[no-any-return]


def both_parts(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model[1](model[0](batch[0]).detach()), batch[1])


@pytest.mark.parametrize("fake", [True, False], ids=["fake", "real"])
def test_a_step_of_several_objectives_is_counted_whole(fake: bool) -> None:
    one = job_of(lambda: nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4)), torch.randn(12, 5), classes(12))
    found = facts(replace(one, loss=None, objective={"first": first_part, "both": both_parts}), fake=fake)
    assert flops(found, "forward", 6) == 6 * 2 * (2 * 5 * 8 + 8 * 4)
    assert found.cuts == ()  # a pipeline follows one objective
    assert flops(found, "backward", 6) == 6 * 2 * (5 * 8 + 8 * 4)  # for weights alone
    assert flops(found, "optimizer", 6) == 0
