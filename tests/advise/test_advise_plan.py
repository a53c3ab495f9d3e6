"""`shardwise plan JOB` from end to end: the table, the JSON, the plan file, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shardwise.advise import advice
from shardwise.cli.main import shardwise
from shardwise.errors import PlanError, UserError
from shardwise.probe.place import cached_path, this_place
from shardwise.run.jobfile import find_job
from shardwise.run.options import TrainOptions, resolve_plan
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan


@pytest.fixture(scope="module", autouse=True)
def figures(tmp_path_factory: pytest.TempPathFactory, machine: Machine) -> Iterator[Path]:
    """This machine's figures, in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        path = cached_path(this_place())
        path.parent.mkdir(parents=True)
        machine.write(path)
        yield path


def run(*words: str) -> Result:
    return CliRunner().invoke(shardwise, ["plan", *words])


def test_the_answer_in_json_has_plans_and_rejected_ones() -> None:
    answer = run("digits", "--workers", "2", "--json", "--why-not", "shard=2")
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert document["parameters"] == 9930
    best = document["plans"][0]
    assert best["fits"] is True
    assert best["step_seconds"] == min(item["step_seconds"] for item in document["plans"])
    assert best["step_seconds"] == pytest.approx(sum(best["breakdown"]["seconds"].values()))
    assert best["memory_bytes"] == pytest.approx(sum(best["breakdown"]["bytes"].values()), rel=1e-3)
    assert set(best["layout"]) == {"data", "shard", "tensor", "pipeline", "context", "expert"}
    layouts = {str(item["layout"]) for item in document["rejected"]}
    assert "context=2" in layouts
    assert all(item["reason"] for item in document["rejected"])
    assert "shard" in document["why_not"]["layout"]
    assert document["why_not"]["reason"]
    for item in document["plans"]:
        Plan.from_dict(item["plan"])


def test_a_table_with_words_and_a_plan_file_that_train_takes(tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    answer = run("digits", "--workers", "2", "-o", str(out))
    assert answer.exit_code == 0, answer.output
    assert "samples/s" in answer.stdout
    assert "serial" in answer.stdout
    plan = Plan.read(out)
    assert plan.prediction is not None
    assert plan.threads is not None
    trained = CliRunner().invoke(
        shardwise,
        ["train", "digits", "--plan", str(out), "--steps", "2", "--quiet", "--out", str(tmp_path / "run")],
    )
    assert trained.exit_code == 0, trained.output


def test_an_edited_plan_is_not_compared_with_the_prediction_of_another(tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    assert run("linear", "--workers", "2", "-o", str(out)).exit_code == 0
    job = find_job("linear").call({}).job
    kept = resolve_plan(job, TrainOptions(plan=str(out)), device="cpu", world=None)
    assert kept.prediction is not None and kept.reasons
    other = replace(job, batch_size=job.batch_size + 1)
    assert resolve_plan(other, TrainOptions(plan=str(out)), device="cpu", world=None).prediction is None
    threads = Plan.read(out).threads
    assert threads is not None
    out.write_text(out.read_text().replace(f"threads = {threads}\n", f"threads = {threads + 1}\n"))
    edited = resolve_plan(job, TrainOptions(plan=str(out)), device="cpu", world=None)
    assert edited.threads == threads + 1
    assert edited.prediction is None and not edited.reasons


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        (
            "loss=lambda output, target: nn.functional.cross_entropy(output, target).detach()",
            "does not depend on the model",
        ),
        ("loss=lambda output, target: output.no_such_thing", "no_such_thing"),
    ],
)
def test_a_job_that_cannot_train_is_told_as_training_tells_it(tmp_path: Path, planted: str, told: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "import torch\nfrom torch import nn\nimport shardwise\n\n\n"
        "def broken() -> shardwise.Job:\n"
        "    data = {'train': (torch.randn(64, 4), torch.zeros(64).long())}\n"
        "    return shardwise.Job(model=lambda: nn.Linear(4, 2), data=data, batch_size=16, epochs=1, "
        f"optimizer=lambda p: torch.optim.SGD(p, lr=0.1), {planted})\n"
    )
    answer = run(str(file))
    assert isinstance(answer.exception, UserError), answer.output
    assert told in str(answer.exception)


def test_models_without_sequences_are_not_told_of_splitting_them() -> None:
    answer = run("linear", "--workers", "2")
    assert answer.exit_code == 0, answer.output
    assert "tensor" in answer.stdout and "context" not in answer.stdout


def test_figures_and_steps_taken_beside_other_programs_are_noted(
    figures: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.measured is not None
    monkeypatch.setattr(advice, "is_busy", lambda: True)
    monkeypatch.setattr(advice, "facts_apart", raiser)
    try:
        replace(machine, measured=replace(machine.measured, load=50.0)).write(figures)
        told = run("linear").stderr
        replace(machine, measured=replace(machine.measured, load=0.0, others_cores=0.0)).write(figures)
        monkeypatch.setattr(advice, "is_busy", lambda: False)
        quiet = run("linear").stderr
    finally:
        machine.write(figures)
    assert "measured while other programs used its cores" in told and "come out too long" in told
    assert "note" not in quiet and "counting a step" in quiet


def test_figures_that_others_disturbed_are_taken_anew_when_it_is_quiet(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.measured is not None
    disturbed = replace(machine, measured=replace(machine.measured, others_cores=1.0 * machine.measured.cores))
    probes = iter([disturbed, disturbed, machine])
    monkeypatch.setattr(advice, "probe", lambda tell: next(probes))
    monkeypatch.setattr(advice, "is_busy", lambda: False)
    told: list[str] = []
    assert advice.this_machine(told.append) == disturbed
    assert advice.this_machine(told.append) == disturbed  # not again and again
    assert "measured again once they do not" in told.pop()
    monkeypatch.setattr(advice, "AGAIN_AFTER_SECONDS", 0.0)
    assert "once" in told[0] and "may be off" in told[1]
    monkeypatch.setattr(advice, "is_busy", lambda: True)
    assert advice.this_machine(told.append) == disturbed  # nothing better is to be had now
    assert "measured again once they do not" in told[2]
    monkeypatch.setattr(advice, "is_busy", lambda: False)
    assert advice.this_machine(told.append) == disturbed
    assert advice.this_machine(told.append) == machine
    assert len(told) == 6
    assert advice.this_machine(told.append) == machine
    assert len(told) == 6


def raiser(*_: object, **__: object) -> None:
    raise UserError("counted enough")


def test_a_catalogue_machine_is_planned_without_one(tmp_path: Path) -> None:
    answer = run("charlm", "--machine", "h100-sxm", "--nodes", "2", "--gpus-per-node", "4", "--json")
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert document["counted"] == "counted on fake tensors"
    assert document["workers"] == 8
    assert document["plans"]


def test_memory_that_is_too_small_is_the_answer_no() -> None:
    answer = run("digits", "--workers", "1", "--memory", "1MiB")
    assert answer.exit_code == 1
    assert "nothing fits" in answer.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "neither of JOB and --model"),
        (("digits", "--model", "gpt:layers=2,hidden=64"), "both of JOB and --model"),
        (("digits", "--attention", "math"), "--attention means nothing"),
        (("digits", "--nodes", "2"), "--machine"),
        (("digits", "--precision", "fp8"), "fp32 or bf16"),
        (("digits", "-o", "plan.txt"), ".toml"),
        (("digits", "-o", "no/such/folder/plan.toml"), "does not exist"),
        (("digits", "--machine", "abacus"), "no such catalogue machine"),
        (("--model", "gpt:layers=2,hidden=64"), "needs --machine"),
        (("--model", "gpt:layers=2,hidden=64", "--machine", "h100-sxm", "--workers", "3"), "--workers means nothing"),
        (("no_such_job",), "no_such_job"),
    ],
)
def test_wrong_input_is_refused(words: tuple[str, ...], told: str) -> None:
    answer = run(*words)
    assert isinstance(answer.exception, UserError), answer.output
    assert told in str(answer.exception)


def test_a_layout_that_is_none_is_refused() -> None:
    answer = run("digits", "--why-not", "diagonal=2")
    assert isinstance(answer.exception, PlanError)


def test_probed_machines_need_their_network(figures: Path) -> None:
    refused = run("digits", "--machine", str(figures), "--nodes", "2")
    assert isinstance(refused.exception, UserError)
    assert "--network" in str(refused.exception)
    assert "probe" in str(refused.exception)
    # On a network this slow another machine does not pay, and the table says so.
    answer = run("digits", "--machine", str(figures), "--nodes", "2", "--network", "0.001", "--json", "--top", "30")
    assert answer.exit_code == 0, answer.output
    plans = json.loads(answer.stdout)["plans"]
    assert plans[0]["nodes"] == 1
    spread = [item for item in plans if item["nodes"] == 2 and item["layout"]["data"] == 2]
    assert spread
    assert spread[0]["breakdown"]["seconds"]["gradients"] > 0.1


def test_a_foreign_machine_file_is_noted(figures: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "machine.toml"
    foreign.write_text(figures.read_text().replace(this_place()["processor"], "abacus"))
    answer = run("digits", "--workers", "2", "--machine", str(foreign))
    assert answer.exit_code == 0, answer.output
    assert "processor was abacus" in answer.stderr
