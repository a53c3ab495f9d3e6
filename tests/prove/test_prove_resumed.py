"""A proof through a checkpoint: right plans pass, and what does not come back is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import UserError
from shardwise.prove import resumed
from shardwise.prove.proof import prove
from shardwise.run import session
from shardwise.run.assemble import Assembly
from shardwise.spec.job import Job

Jobs = Callable[..., Job]


class Averaging(nn.Module):
    """Keeps an average of its outputs in a buffer, on which the next outputs depend, and counts its calls in an attribute."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(7, 15), nn.Linear(15, 3)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(15))
        self.calls, self.counts = 0, counts

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x)) - self.mean
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(self.inner.bias, 0.5)
            self.calls += 1
        return torch.as_tensor(self.head(hidden)) * (1.0 + (self.calls if self.counts else 0))


def adam(job: Jobs, model: Callable[[], nn.Module] = Averaging, **changes: Any) -> Job:
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    return job("mlp", model=model, optimizer=optimizer, **changes)


def after_load(change: Callable[..., None]) -> Callable[[Assembly], None]:
    """A fault of the function that reads a checkpoint."""

    def plant(a: Assembly) -> None:
        module = vars(session)
        load = module["load"]

        def loaded(*given: Any, **parts: Any) -> Any:
            progress = load(*given, **parts)
            change(progress, **parts)
            return progress

        module["load"] = loaded

    return plant


def forget_moments(_: Any, *, optimizer: torch.optim.Optimizer, **__: Any) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].zero_()


def forget_average(_: Any, *, model: nn.Module, **__: Any) -> None:
    with torch.no_grad():
        model.get_buffer("mean").zero_()


@pytest.mark.parametrize("plan", ["data=2", "shard=2", "pipeline=2"])
def test_right_plans_are_proved_through_a_checkpoint(job: Jobs, schedule: Any, plan: str) -> None:
    verdict = prove(adam(job, job("mlp").model, schedule=schedule, clip_norm=0.5), plan, resume=True)
    assert verdict.proved, verdict
    (guard,) = [guard for guard in verdict.guards if guard.name == "checkpoint"]
    assert guard.text.startswith("a checkpoint after step 1 of 3 gave back ")


def test_what_does_not_come_back_is_named(job: Jobs, schedule: Any) -> None:
    def forget(progress: dict[str, Any], *, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        with torch.no_grad():
            model.get_buffer("mean").zero_()
        optimizer.state[next(model.parameters())]["exp_avg"].zero_()
        scheduler.last_epoch = 0
        progress["step"] -= 1

    given = adam(job, schedule=schedule)
    verdict = prove(given, "data=2", resume=True, fault=after_load(forget))
    assert verdict.outcome == "refuted", verdict
    (found,) = verdict.findings
    assert found.pattern == "checkpoint"
    assert found.parameters == ("model/mean", "optimizer/inner.weight/exp_avg", "schedule/last_epoch", "step")
    plain = prove(given, "data=2", fault=after_load(forget))
    assert plain.proved, "without a checkpoint there is nothing to see"
    assert not [guard for guard in plain.guards if guard.name == "checkpoint"]


@pytest.mark.parametrize("change", [forget_moments, forget_average])
def test_what_is_lost_changes_the_steps_that_follow(job: Jobs, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """The comparison sees it too, without a look at what was saved."""
    monkeypatch.setattr(resumed, "_digests", lambda _: {})
    verdict = prove(adam(job), "data=2", resume=True, fault=after_load(change))
    assert verdict.outcome == "refuted", verdict
    assert [finding.pattern for finding in verdict.findings] == ["checkpoint"]


def test_what_a_checkpoint_does_not_hold_is_told(job: Jobs) -> None:
    verdict = prove(adam(job, lambda: Averaging(counts=True)), "data=2", resume=True)
    assert verdict.outcome == "refuted", verdict
    (found,) = verdict.findings
    assert found.pattern == "checkpoint"
    assert "a Python attribute of a module" in found.message


def test_one_step_has_no_middle(job: Jobs) -> None:
    with pytest.raises(UserError, match="at least 2 optimizer steps"):
        prove(job("mlp"), "serial", steps=1, resume=True)
