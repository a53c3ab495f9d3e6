"""Every planted fault is refuted, and the right culprit named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from shardwise.data.batch import Batch
from shardwise.dist.collectives import Group
from shardwise.dist.split import is_dtensor, local_part
from shardwise.errors import PlanError
from shardwise.parallel import data as parallel_data
from shardwise.parallel import norm as parallel_norm
from shardwise.parallel.clip import clip_by_global_norm
from shardwise.parallel.data import GradientSum
from shardwise.prove.proof import prove
from shardwise.run import loop, step
from shardwise.run.assemble import Assembly
from shardwise.spec.job import Job
from shardwise.spec.verdict import Finding, Verdict

Jobs = Callable[..., Job]


def _after_sum(change: Callable[[Assembly], None]) -> Callable[[Assembly], None]:
    """A fault that changes the gradients once they are summed."""

    def plant(a: Assembly) -> None:
        finish = a.composed.gradients.finish

        def finished(**options: Any) -> None:
            finish(**options)
            change(a)

        a.composed.gradients.finish = finished  # type: ignore[method-assign]

    return plant


def _before_sum(change: Callable[[Assembly], None]) -> Callable[[Assembly], None]:
    """A fault that changes each rank's own gradients."""

    def plant(a: Assembly) -> None:
        finish = a.composed.gradients.finish

        def finished(**options: Any) -> None:
            change(a)
            finish(**options)

        a.composed.gradients.finish = finished  # type: ignore[method-assign]

    return plant


def no_reduction(a: Assembly) -> None:
    gradients = a.composed.gradients
    assert isinstance(gradients, GradientSum)
    gradients._group = Group()


def _scale(factor: Callable[[Assembly], float], only: str = "") -> Callable[[Assembly], None]:
    def change(a: Assembly) -> None:
        for name, parameter in a.model.named_parameters():
            if parameter.grad is not None and only in name:
                parameter.grad.mul_(factor(a))

    return _after_sum(change)


def _clip_own(a: Assembly) -> None:
    clip_by_global_norm(a.model.parameters(), a.job.sole_clip_norm or 1.0)


def clip_per_part(a: Assembly) -> None:
    """As pipeline stages would that do not tell each other their norms."""

    def clip(parameters: Any, clip_norm: float, **_: Any) -> Tensor:
        every = list(parameters)
        clip_by_global_norm(every[:2], clip_norm)
        return clip_by_global_norm(every[2:], clip_norm)

    vars(step)["clip_by_global_norm"] = clip


def untie(a: Assembly) -> None:
    model: Any = a.model
    model.head.weight = nn.Parameter(model.tokens.weight.detach().clone())
    a.optimizer.add_param_group({"params": [model.head.weight]})
    a.composed.gradients = parallel_data.GradientSum(model.named_parameters(), a.world)


def drop_micro_batch(a: Assembly) -> None:
    """Rank 1 forgets the second piece of each of its batches."""
    if a.world.rank == 1:
        split = Batch.split
        patched: Any = Batch
        patched.split = lambda batch, micro_batch: split(batch, micro_batch)[:1] + split(batch, micro_batch)[2:]


def wrong_slice(a: Assembly) -> None:
    """Every rank reads the share of rank 0."""
    module = vars(loop)
    batches = module["batches"]
    module["batches"] = lambda *arguments, **options: batches(*arguments, **{**options, "rank": 0})


def local_batch_norm(a: Assembly) -> None:
    for _, module in parallel_norm.batch_norms(a.model):
        del module.forward


def stale_buffer(a: Assembly) -> None:
    parallel_norm._update_running = lambda *_: None


def other_start(a: Assembly) -> None:
    if a.world.rank == 1:
        with torch.no_grad():
            next(a.model.parameters()).mul_(1 + 1e-6)


def wrong_learning_rate(a: Assembly) -> None:
    a.optimizer.param_groups[0]["lr"] *= a.world.size


def scale_short_batch(a: Assembly) -> None:
    """A fault that only a batch of another size shows, under an optimizer that keeps nothing and hardly moves."""

    def change(assembly: Assembly) -> None:
        if assembly.step == 2:
            for parameter in assembly.model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(13 / 5)

    _after_sum(change)(a)


def clip_per_stage(a: Assembly) -> None:
    """Each stage takes the norm of its own gradients for that of the model."""
    a.composed.apart = ()


def keep_own_part(a: Assembly) -> None:
    """Stages do not tell each other the gradients of the weights they share."""
    gradients: Any = a.composed.gradients
    gradients._shared._shared = []


def no_reduction_of_stages(a: Assembly) -> None:
    gradients: Any = a.composed.gradients
    gradients._same_stages._group = Group()


def drop_second_of_pipeline(a: Assembly) -> None:
    """The schedule forgets a micro-batch, on all stages alike."""
    runner: Any = a.composed.stages and a.composed.stages.runner
    step_of = runner.step

    def step(inputs: Any, objective: Any, **options: Any) -> None:
        kept = [index for index in range(len(inputs)) if index != 1]
        step_of([inputs[index] for index in kept], lambda output, place: objective(output, kept[place]), **options)

    runner.__dict__["step"] = step


def sum_of_micro_batches(a: Assembly) -> None:
    """Pipeline libraries that leave it to their users to divide the losses do this."""
    runner: Any = a.composed.stages and a.composed.stages.runner
    step_of = runner.step

    def step(inputs: Any, objective: Any, **options: Any) -> None:
        step_of(inputs, lambda output, index: objective(output, index) * len(inputs), **options)

    runner.__dict__["step"] = step


def experts_summed_twice(a: Assembly) -> None:
    """As if their gradients were summed over the expert axis, along which they are complete already."""

    def change(assembly: Assembly) -> None:
        for parameter in assembly.parameters:
            if is_dtensor(parameter) and parameter.grad is not None:
                local_part(parameter.grad).mul_(assembly.plan.layout.expert)

    _after_sum(change)(a)


def _refuted(verdict: Verdict, pattern: str) -> Finding:
    assert verdict.outcome == "refuted", verdict
    patterns = [finding.pattern for finding in verdict.findings]
    assert pattern in patterns, verdict
    return verdict.findings[patterns.index(pattern)]


def test_no_reduction(job: Jobs) -> None:
    verdict = prove(job("mlp"), "data=3", fault=no_reduction)
    found = _refuted(verdict, "missing reduction")
    assert found.axes == ("data",)
    assert "all parameters" in found.message
    assert "inner.weight" in found.parameters
    assert "missing reduction over data" in str(verdict)


def test_no_reduction_with_batch_norm(job: Jobs) -> None:
    assert _refuted(prove(job("conv"), "data=2", fault=no_reduction), "missing reduction").axes == ("data",)


@pytest.mark.parametrize("kind", ["mlp", "conv", "gpt"])
def test_sum_for_mean(job: Jobs, kind: str) -> None:
    found = _refuted(prove(job(kind), "data=3", fault=_scale(lambda a: float(a.world.size))), "scaled gradients")
    assert found.factor == pytest.approx(3)
    assert "x3 on all parameters: the degree of data" in found.message


def test_mean_for_sum(job: Jobs) -> None:
    found = _refuted(prove(job("mlp"), "data=2", fault=_scale(lambda a: 1 / a.world.size)), "scaled gradients")
    assert found.factor == pytest.approx(0.5)
    assert "one over the degree of data" in found.message


def test_factor_on_some_modules(job: Jobs) -> None:
    """What expert gradients summed once too often look like."""
    found = _refuted(prove(job("mlp"), "data=2", fault=_scale(lambda a: 2.0, only="norm")), "scaled gradients")
    assert set(found.parameters) == {"norm.weight", "norm.bias"}
    assert "all parameters of LayerNorm" in found.message


def test_clipped_per_rank(job: Jobs) -> None:
    found = _refuted(prove(job("mlp", clip_norm=0.1), "data=2", fault=_before_sum(_clip_own)), "clipped per rank")
    assert "each worker's own gradient" in found.message


def test_clipped_per_part(job: Jobs) -> None:
    found = _refuted(prove(job("mlp", clip_norm=0.1), "data=2", fault=clip_per_part), "clipped per part")
    assert "not by the global norm" in found.message


def test_tied_weight_untied(job: Jobs) -> None:
    found = _refuted(prove(job("gpt"), "data=2", fault=untie), "tied weight untied")
    assert set(found.parameters) == {"tokens.weight", "head.weight"}
    assert "add up to the right one" in found.message


def test_clipped_per_stage(job: Jobs) -> None:
    found = _refuted(prove(job("mlp", clip_norm=0.1), "pipeline=2", fault=clip_per_stage), "clipped per part")
    assert "per stage" in found.message and found.axes == ("pipeline",)


def test_weight_of_two_stages_untied(job: Jobs) -> None:
    verdict = prove(job("gpt"), "pipeline=2", fault=keep_own_part)
    found = _refuted(verdict, "tied weight untied")
    assert found.parameters == ("tokens.weight",) and found.axes == ("pipeline",)
    assert "used on several pipeline stages" in str(verdict)


def test_no_reduction_over_the_replicas_of_a_stage(job: Jobs) -> None:
    found = _refuted(prove(job("mlp"), "data=2,pipeline=2", fault=no_reduction_of_stages), "missing reduction")
    assert found.axes == ("data",) and "all parameters" in found.message


def test_pipeline_drops_a_micro_batch(job: Jobs) -> None:
    verdict = prove(job("mlp", micro_batch=4), "pipeline=2", fault=drop_second_of_pipeline)
    assert "samples 4 to 7 of the global batch" in _refuted(verdict, "dropped micro-batch").message


def test_pipeline_sums_the_means_of_micro_batches(job: Jobs) -> None:
    verdict = prove(job("mlp", micro_batch=4), "pipeline=2", fault=sum_of_micro_batches)
    found = _refuted(verdict, "scaled gradients")
    assert found.factor == pytest.approx(4)
    assert "the number of micro-batches" in found.message


def test_expert_gradients_scaled_by_the_degree(job: Jobs) -> None:
    found = _refuted(prove(job("moe"), "expert=2", fault=experts_summed_twice), "scaled gradients")
    assert found.factor == pytest.approx(2)
    assert "x2 on all parameters of MoE" in found.message or "x2 on mixture" in found.message
    assert "the degree of expert, as if summed once too often" in found.message


def test_dropped_micro_batch(job: Jobs) -> None:
    found = _refuted(prove(job("mlp", micro_batch=3), "data=2", fault=drop_micro_batch), "dropped micro-batch")
    assert "micro-batch 1 of worker 1" in found.message
    assert "samples 10 to 12" in found.message


def test_wrong_slice(job: Jobs) -> None:
    verdict = prove(job("mlp"), "data=2", fault=wrong_slice)
    assert "rank 1" in _refuted(verdict, "wrong samples").message
    assert [guard.name for guard in verdict.guards if not guard.passed] == ["samples"]


def test_local_batch_norm(job: Jobs) -> None:
    found = _refuted(prove(job("conv"), "data=2", fault=local_batch_norm), "local BatchNorm statistics")
    assert found.axes == ("data",)


def test_stale_buffer(job: Jobs) -> None:
    verdict = prove(job("conv"), "data=2", fault=stale_buffer)
    found = _refuted(verdict, "stale buffer")
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert set(found.parameters) == {f"norm{number}.{kind}" for number in (1, 2) for kind in kinds}


class _Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)
        self.shift: Tensor
        self.register_buffer("shift", torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x + self.shift))


def move_buffer(a: Assembly) -> None:
    """After the last step rank 1 has another buffer, which no training changes."""
    average = a.average
    model: Any = a.model

    def averaged() -> None:
        average()
        model.shift.add_(a.world.rank)

    vars(a)["average"] = averaged


def test_a_constant_buffer_that_changes(job: Jobs) -> None:
    finding = _refuted(prove(job("mlp", model=_Shifted), "data=2", fault=move_buffer), "wrong buffer")
    assert finding.message.startswith("shift differs")


def test_other_start_on_one_rank(job: Jobs) -> None:
    found = _refuted(prove(job("mlp"), "data=2", fault=other_start), "other start")
    assert "on rank 1" in found.message
    assert found.parameters == ("inner.weight",)


def test_wrong_learning_rate(job: Jobs) -> None:
    """Gradients are right, the update is not."""
    assert "0 lr" in _refuted(prove(job("mlp"), "data=2", fault=wrong_learning_rate), "wrong update").parameters


def test_fault_of_the_short_batch(job: Jobs) -> None:
    """The weights would not show it: with this learning rate they move by less than their rounding."""
    slow = job("mlp", optimizer=lambda params: torch.optim.SGD(params, lr=1e-9))
    verdict = prove(slow, "data=2", fault=scale_short_batch)
    assert verdict.samples == (13, 13, 5)
    assert _refuted(verdict, "scaled gradients").factor == pytest.approx(2.6)


def test_missing_reduction_over_one_of_two_axes(job: Jobs) -> None:
    """Each replica has its own part of the gradient, put together over shard."""

    def keep_part(a: Assembly) -> None:
        part = 0.3 if a.world.rank < 2 else 0.7
        _scale(lambda _: part)(a)

    found = _refuted(prove(job("mlp"), "data=2,shard=2", fault=keep_part), "missing reduction")
    assert found.axes == ("data",)


def test_no_gradient(job: Jobs) -> None:
    """FSDP2 keeps what it has not summed over the replicas to itself."""

    def no_all_reduce(a: Assembly) -> None:
        for module in a.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(False)

    found = _refuted(prove(job("mlp"), "data=2,shard=2", fault=no_all_reduce), "no gradient")
    assert "inner.weight" in found.parameters
    assert found.axes == ("data", "shard")


def test_the_axis_to_blame_is_found_by_leaving_axes_out(job: Jobs) -> None:
    def only_with_shard(a: Assembly) -> None:
        if a.plan.layout.shard > 1:
            _scale(lambda _: 2.0)(a)

    verdict = prove(job("mlp"), "data=2,shard=2", fault=only_with_shard)
    assert _refuted(verdict, "scaled gradients").axes == ("shard",)

    def only_with_both(a: Assembly) -> None:
        if a.world.size == 4:
            _scale(lambda _: 2.0)(a)

    verdict = prove(job("mlp"), "data=2,shard=2", fault=only_with_both)
    assert "combination of data and shard" in _refuted(verdict, "axis").message


def test_coupled_loss_blames_the_job(job: Jobs) -> None:
    verdict = prove(job("towers"), "data=2")
    found = _refuted(verdict, "loss couples samples")
    assert "contrastive" in found.message
    assert prove(job("towers"), "serial").proved


def test_coupled_loss_in_micro_batches_blames_no_axis(job: Jobs) -> None:
    verdict = prove(replace(job("towers"), micro_batch=4), "data=2")
    assert _refuted(verdict, "loss couples samples").axes == ()
    assert "one worker fails as well" in _refuted(verdict, "axis").message


def test_unweighted_token_mean(job: Jobs) -> None:
    """A mean over unignored targets without Job.weight is no mean over samples, which the samples of the first step show."""
    with pytest.raises(PlanError, match=r"loss couples samples.*Job\.weight"):
        prove(job("gpt", weight=None), "data=2")
