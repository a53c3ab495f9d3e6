"""Honest plans are proved; what cannot be compared is said to be so; what cannot run is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise
from shardwise.data.gather import Arrays
from shardwise.errors import JobError, PlanError, RunFailed, UserError
from shardwise.jobs.charlm import charlm
from shardwise.jobs.cifar10 import cifar10
from shardwise.jobs.digits import digits
from shardwise.prove import compare, proof
from shardwise.prove.matrix import prove_all
from shardwise.prove.proof import prove, prove_before_training
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout, layouts
from shardwise.spec.plan import Plan
from shardwise.testing import assert_parallel_equals_serial

Jobs = Callable[..., Job]


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


@pytest.mark.parametrize("plan", ["data=2", "data=3"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mlp", {}),
        ("mlp", {"clip_norm": 0.1, "optimizer": _adamw}),
        ("mlp", {"micro_batch": 2, "clip_norm": 0.1}),
        ("conv", {"clip_norm": 0.3}),
        ("conv", {"optimizer": _adamw}),
        ("gpt", {"clip_norm": 0.3, "micro_batch": 2}),
        ("bag", {"clip_norm": 0.2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_honest_plans_are_proved(job: Jobs, kind: str, changes: dict[str, Any], plan: str) -> None:
    verdict = prove(job(kind, **changes), plan)
    assert verdict.proved, verdict
    assert verdict.findings == () and verdict.failed == ()
    assert all(guard.passed for guard in verdict.guards)
    # Something of everything was compared, the short batch at the end of the epoch included.
    kinds = {"initial weight", "loss", "gradient", "applied gradient", "last gradient", "gradient norm", "parameter"}
    assert kinds <= set(verdict.compared)
    assert ("buffer" in verdict.compared) == (kind in ("conv", "gpt"))
    assert verdict.compared["loss"] == verdict.steps == 3
    assert min(verdict.samples) < 13


@pytest.mark.parametrize("plan", ["shard=3", "data=2,shard=2"])
def test_split_parameters_are_proved(job: Jobs, plan: str) -> None:
    verdict = prove(job("gpt", clip_norm=0.3, micro_batch=2), plan)
    assert verdict.proved, verdict
    assert "parameters split" in [guard.name for guard in verdict.guards]


class _Tempered(nn.Module):
    """FSDP2 takes no parameter that is a single number, such as a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.logarithm = nn.Linear(7, 3), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x) * self.logarithm.exp())


def test_a_parameter_of_one_number_beside_split_ones(job: Jobs) -> None:
    verdict = prove(job("mlp", model=_Tempered, clip_norm=0.3), "shard=2")
    assert verdict.proved, verdict


class _FirstAgain(nn.Module):
    """The first stage of two uses all parameters; the second what is tied to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.again = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.again.weight, self.again.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.again(self.inner(self.first(x).relu()).relu()))


def test_a_stage_that_holds_all_parameters_is_proved(job: Jobs) -> None:
    rows = torch.randn(27, 7, generator=torch.Generator().manual_seed(1))
    tied = job("mlp", model=_FirstAgain, data=Arrays((rows, rows.argmax(1))), loss=F.cross_entropy)
    verdict = prove(tied, Plan(layout=Layout(pipeline=2), cuts=("again",)))
    assert verdict.proved, verdict
    assert "ranks hold 56 to 112 of 112 parameter elements, split over pipeline" in [
        each.text for each in verdict.guards
    ]


def test_objective_and_schedule(job: Jobs, objective: Any, schedule: Any) -> None:
    own = job("gpt", loss=None, weight=None, objective=objective, schedule=schedule, micro_batch=3)
    assert assert_parallel_equals_serial(own, plan="data=2").compared["option"] > 1


def test_real_digits_in_five_workers() -> None:
    verdict = prove(digits(), "data=5")
    assert verdict.proved, verdict
    assert verdict.samples == (64, 64, 30)
    assert "the first batch was shared out as 13, 13, 13, 13, 12" in str(verdict)


def test_real_photos(shared_data: Path) -> None:
    verdict = prove(cifar10(data=str(shared_data / "cifar10-official-6k"), augment=True), "data=2")
    assert verdict.proved, verdict
    assert verdict.compared["gradient"] >= 10


def test_real_text() -> None:
    verdict = prove(replace(charlm(), batch_size=17), "data=2")
    assert verdict.proved, verdict


def test_dropout_is_switched_off_and_said(job: Jobs) -> None:
    verdict = prove(job("gpt"), "data=2")
    assert any("blocks.0.attention" in text and "random layers" in text for text in verdict.not_covered)
    assert not any("random layers" in text for text in prove(job("mlp"), "data=2").not_covered)


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x + torch.randn_like(x)))


def test_noise_of_its_own_is_not_comparable(job: Jobs) -> None:
    verdict = prove(job("mlp", model=_Noisy), "data=2")
    assert verdict.outcome == "not comparable"
    assert "randn_like" in verdict.findings[0].message


def test_local_batch_norm_is_not_comparable(job: Jobs) -> None:
    verdict = prove(job("conv", batch_norm="local"), "data=2")
    assert verdict.outcome == "not comparable"
    assert "by design" in str(verdict)
    assert prove(job("conv", batch_norm="local"), "serial").proved


def test_precision_and_compile_are_not_covered(job: Jobs) -> None:
    verdict = prove(job("mlp", precision="bf16"), Plan(layout=Layout(data=2), compile=True))
    assert verdict.proved
    assert [text.split(":")[0] for text in verdict.not_covered[:2]] == ["bf16", "torch.compile"]


def test_plans_that_cannot_run_are_refused_before_anything_starts(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "measure", lambda *_: pytest.fail("something was started"))
    with pytest.raises(PlanError, match="micro_batch"):
        prove(job("conv", micro_batch=2), "data=2")
    with pytest.raises(PlanError, match="no sample"):
        prove(job("mlp", batch_size=2), "data=3")
    with pytest.raises(UserError, match="at least 1"):
        prove(job("mlp"), "data=2", steps=0)


class _OnlyFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(torch.from_numpy(x.detach().numpy().astype("float32"))))


def test_a_model_that_does_not_run_in_float64(job: Jobs) -> None:
    with pytest.raises(JobError, match="float64 reference"):
        prove(job("mlp", model=_OnlyFloat32), "data=2")


def test_float32_casts_in_the_model_do_not_spoil_the_reference(job: Jobs) -> None:
    """Gpt casts its scores to float32; left alone that would make the reference as coarse as what it judges."""
    verdict = prove(job("gpt"), "data=2")
    distances = [item.serial_distance / item.size for item in verdict.worst if item.kind == "gradient"]
    assert distances and all(0 < distance < 1e-5 for distance in distances)


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.randn(5, 7, dtype=torch.complex64))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head((x.to(self.waves.dtype) @ self.waves.T).abs()))


def _doubled_waves(a: Any) -> None:
    finish = a.composed.gradients.finish

    def finished(**options: Any) -> None:
        finish(**options)
        a.model.waves.grad.mul_(2)

    a.composed.gradients.finish = finished


def test_complex_weights(job: Jobs) -> None:
    assert prove(job("mlp", model=_Complex), "data=2").proved
    verdict = prove(job("mlp", model=_Complex), "data=2", fault=_doubled_waves)
    assert "gradients x2" in verdict.findings[0].message, verdict


def test_a_failing_worker_is_reported_with_its_traceback(job: Jobs) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("this worker has had enough")

    said: list[str] = []
    with pytest.raises(RunFailed):
        prove(job("mlp"), "data=2", fault=fail, report=said.append)
    assert "this worker has had enough" in "".join(said)


def test_the_calling_process_stays_as_it_was(job: Jobs) -> None:
    torch.manual_seed(5)
    state, dtype, threads = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    before = _threads()
    assert prove(job("mlp"), "serial").proved
    assert prove(job("mlp"), "data=2").proved
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype and torch.get_num_threads() == threads
    assert _threads() <= before + 1  # one of torch's own may have come to stay


def _threads() -> int:
    return len(list(Path(f"/proc/{os.getpid()}/task").iterdir()))


def test_small_differences_must_come_back(job: Jobs) -> None:
    """A difference as a tipped ReLU makes it refutes only when it is there in float64, or from other seeds too."""

    def in_float32(a: Any) -> None:
        if a.parameters[0].dtype == torch.float32:
            _nudge(a)

    def of_one_seed(a: Any) -> None:
        if a.job.seed == 0:
            _nudge(a)

    def tipped(a: Any) -> None:
        if a.job.seed == 0:
            in_float32(a)

    forgiven = prove(job("mlp"), "data=2", fault=tipped)
    assert forgiven.proved and any("tipped" in note for note in forgiven.notes)
    refuted = prove(job("mlp"), "data=2", fault=in_float32)
    assert refuted.outcome == "refuted"
    assert any("came back" in note for note in refuted.notes)
    refuted = prove(job("mlp"), "data=2", fault=of_one_seed)
    assert refuted.outcome == "refuted"
    assert any("in float64" in note for note in refuted.notes)


def _nudge(a: Any) -> None:
    finish = a.composed.gradients.finish

    def finished(**options: Any) -> None:
        finish(**options)
        for parameter in a.model.parameters():
            parameter.grad.add_(parameter.grad.roll(1) * 5e-5)

    a.composed.gradients.finish = finished


def test_prove_before_training(job: Jobs) -> None:
    assert prove_before_training(job("mlp"), "data=2").proved
    with pytest.raises(RunFailed, match="nothing was trained"):
        prove_before_training(job("towers"), "data=2")


def test_testing_raises_the_verdict(job: Jobs) -> None:
    assert shardwise.testing.assert_parallel_equals_serial(job("mlp"), batch_size=6).samples == (6, 6, 1)
    with pytest.raises(AssertionError, match=r"REFUTED.*\n(.*\n)*.*couples samples"):
        shardwise.testing.assert_parallel_equals_serial(job("towers"), plan="data=2")


def test_matrix(job: Jobs) -> None:
    seen: list[str] = []
    matrix = prove_all(job("mlp"), 3, on_cell=lambda cell: seen.append(cell.layout))
    results = {cell.layout: cell.result for cell in matrix.cells}
    assert list(results) == seen == [str(layout) for layout in layouts(3)]
    assert {results[layout] for layout in ("serial", "data=2", "data=3")} == {"proved"}
    assert set(results.values()) <= {"proved", "refused"}
    assert matrix.sound
    assert all(cell.reason for cell in matrix.cells if cell.result == "refused")
    assert not prove_all(job("towers"), 2).sound


def test_layouts_are_all_there_once() -> None:
    for workers in (1, 2, 4, 6, 8):
        found = layouts(workers)
        assert len(set(found)) == len(found)
        exactly = [layout for layout in found if layout.workers == workers]
        # A number p^a q^b of workers goes onto 6 axes in C(a + 5, 5) C(b + 5, 5) ways.
        assert len(exactly) == {1: 1, 2: 6, 4: 21, 6: 36, 8: 56}[workers]


def test_distances_see_what_norms_miss() -> None:
    exact = torch.tensor([1.0, float("inf"), float("nan")], dtype=torch.float64)
    assert compare._distance(exact.float(), exact) == 0
    assert compare._distance(torch.tensor([1.0, float("nan"), float("nan")]), exact) == float("inf")
    assert compare._distance(torch.tensor([1.0]), exact) == float("inf")
    assert compare._distance(torch.tensor([1.0, float("inf"), 0.0]), exact) == float("inf")


def test_regression_with_float_targets(job: Jobs) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = Arrays((torch.randn(20, 7, generator=generator), torch.randn(20, 3, generator=generator)))
    own = replace(job("mlp"), data=pairs, loss=F.mse_loss, batch_size=7)
    assert prove(own, "data=2").proved
