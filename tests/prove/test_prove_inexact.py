"""Plans that are not the serial run by choice: their distance is measured, and what is no distance still refutes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.cli.main import main
from shardwise.errors import RunFailed
from shardwise.prove.matrix import prove_all
from shardwise.prove.proof import prove, prove_before_training
from shardwise.run.assemble import Assembly
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Verdict

Jobs = Callable[..., Job]
BF16 = Plan(layout=Layout(data=2), compression="bf16")


def test_the_distance_is_measured(job: Jobs) -> None:
    verdict = prove(job("mlp", clip_norm=0.5), BF16)
    assert (verdict.outcome, verdict.proved) == ("inexact", False), verdict
    assert "compression=bf16" in verdict.plan
    (found,) = verdict.findings
    gradient = next(item for item in verdict.worst if item.kind == "gradient")
    assert not gradient.passed  # a proof would have refuted it
    assert 1e-5 < gradient.distance / gradient.size < 2**-7
    assert found.pattern == "inexact" and found.factor is not None and 1e-5 < found.factor < 2**-7
    assert "INEXACT" in str(verdict) and "distance:" in str(verdict)
    assert Verdict.from_json(verdict.to_json()).outcome == "inexact"
    rough = prove(job("mlp"), Plan(layout=Layout(data=2), compression="powersgd", compression_rank=1))
    assert rough.findings[0].factor is not None and rough.findings[0].factor > 10 * found.factor


def drift(a: Assembly) -> None:
    """One worker's weights go their own way, where gradients are compressed."""
    sums = a.composed.gradients
    if type(sums).__name__ == "HalfSum" and a.world.rank == 1:
        finish = sums.finish

        def wrong(**given: Any) -> None:
            finish(**given)
            a.parameters[0].grad = torch.zeros_like(a.parameters[0])

        vars(sums)["finish"] = wrong


def gains_by_two(a: Assembly) -> None:
    """Wrong without the saver as well."""
    sums = a.composed.gradients
    finish = sums.finish

    def wrong(**given: Any) -> None:
        finish(**given)
        for parameter in a.parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(2)

    vars(sums)["finish"] = wrong


def test_copies_that_drift_are_refuted(job: Jobs) -> None:
    verdict = prove(job("mlp"), BF16, fault=drift)
    assert verdict.outcome == "refuted", verdict
    assert any("no longer equal" in finding.message for finding in verdict.findings)


def test_a_mistake_beside_the_saver_is_refuted(job: Jobs) -> None:
    verdict = prove(job("mlp"), BF16, fault=gains_by_two)
    assert verdict.outcome == "refuted", verdict
    assert "inexact" not in {finding.pattern for finding in verdict.findings}


def never_average(a: Assembly) -> None:
    """Workers that take steps of their own stay apart."""
    if a.composed.local is not None:
        vars(a)["average"] = lambda: None
        vars(a.composed.local)["after_step"] = lambda optimizer, step: None


def test_local_steps(job: Jobs) -> None:
    plan = Plan(layout=Layout(data=2), local_steps=2)
    verdict = prove(job("mlp"), plan, steps=4)
    assert verdict.outcome == "inexact", verdict
    factor = verdict.findings[0].factor
    assert factor is not None and 1e-5 < factor < 0.5
    assert not any("between averages" in text for text in verdict.not_covered)
    assert prove(job("mlp"), plan, steps=4, fault=never_average).outcome == "refuted"
    assert any("between averages" in text for text in prove(job("mlp"), plan, steps=1).not_covered)


def test_nothing_is_trained_as_proved(job: Jobs) -> None:
    with pytest.raises(RunFailed, match="INEXACT"):
        prove_before_training(job("mlp"), BF16)


def test_other_layouts_of_the_plan_are_refused_or_exact(job: Jobs) -> None:
    matrix = prove_all(job("mlp"), 2, plan=Plan(compression="bf16"))
    cells = {cell.layout: cell.result for cell in matrix.cells}
    assert cells["data=2"] == "inexact" and cells["serial"] == cells["shard=2"] == "proved"
    assert not matrix.sound


def test_the_command_says_no(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('layout = "data=2"\ncompression = "fp16"\n', encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["prove", "digits", "--plan", str(file), "--steps", "2", "--json", "--quiet"])
    assert ended.value.code == 1
    document = json.loads(capfd.readouterr().out)
    assert document["outcome"] == "inexact" and document["findings"][0]["pattern"] == "inexact"
