"""Measured runs: what is learned from them, how far it is believed, and what is refused."""

import csv
import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shardwise.cli.plan import plan as plan_command
from shardwise.cli.plan import without_software
from shardwise.cli.predict import predict as predict_command
from shardwise.errors import DataError, PlanError, UserError
from shardwise.planner import catalogue
from shardwise.planner.calibrate import Sample, calibrate, check_hardware, sample, sample_of
from shardwise.planner.collectives import Group, all_gather, all_reduce, all_to_all, network, reduce_scatter, send
from shardwise.planner.confidence import PUBLISHED, step_range
from shardwise.planner.constants import DEFAULT
from shardwise.planner.learned import learned
from shardwise.planner.measured import MOST, MeasuredRow, read_measured
from shardwise.planner.predict import resolve
from shardwise.planner.runs import Row, misspelt_columns
from shardwise.planner.search import Problem, as_plan, case_of, search
from shardwise.planner.software import NOISE, known_run, least_factor, solve, spread, step_factor
from shardwise.planner.step import estimate
from shardwise.spec.facts import Transformer
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan
from shardwise.spec.software import KnownRun, Software

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

BASE: Row = {
    "run_id": "r1", "hardware": "h100-80gb-sxm", "gpus": 64, "layers": 32, "hidden": 4096, "heads": 32, "vocab": 51200,
    "seq_len": 4096, "global_batch": 256, "micro_batch": 1, "data": 16, "zero_stage": 1, "tensor": 4, "pipeline": 1,
    "recompute": "none", "precision": "bf16",
}  # fmt: skip
SPECS: tuple[dict[str, str | int | float], ...] = (
    {},
    {"tensor": 8, "data": 8},
    {"tensor": 1, "data": 64},
    {"tensor": 1, "data": 64, "zero_stage": 3},
    {"tensor": 2, "data": 8, "pipeline": 4},
    {"gpus": 8, "data": 8, "tensor": 1, "global_batch": 32},
    {"gpus": 256, "data": 64},
    {"recompute": "full", "micro_batch": 4},
    {"hidden": 2048, "heads": 16},
    {"seq_len": 2048, "micro_batch": 2},
)


def row(number: int) -> Row:
    return {**BASE, **SPECS[number], "run_id": f"r{number}"}


def truth(number: int, software: Software, machine: Machine | None = None) -> float:
    return resolve(row(number), machine, software=software)[1].step_seconds


def measured(numbers: range, software: Software, off: Mapping[int, float] | None = None) -> list[Sample]:
    """Samples of runs whose software is what `software` says, with factors on single ones."""
    factors = off or {}
    return sample(
        MeasuredRow(row(number), truth(number, software) * factors.get(number, 1.0), None) for number in numbers
    )


def test_without_a_factor_nothing_changes() -> None:
    plain = resolve(row(0))[1]
    for software in (Software(), calibrate(measured(range(3), Software()), "test")):
        same = resolve(row(0), software=software)[1]
        assert same.step_seconds == pytest.approx(plain.step_seconds, rel=1e-9)
        assert same.memory == plain.memory and same.fits == plain.fits


def test_factors_multiply_what_they_name() -> None:
    case, plain = resolve(row(4))

    def told(compute: float = 1.0, network: float = 1.0, memory: float = 1.0) -> Any:
        software = Software(compute=compute, network=network, memory=memory)
        return estimate(replace(case, machine=replace(case.machine, software=software)))

    assert told(compute=1.5, network=1.5).step_seconds == pytest.approx(1.5 * plain.step_seconds, rel=1e-9)
    slow = told(network=2.0)
    assert plain.step_seconds < slow.step_seconds < 2 * plain.step_seconds
    assert slow.seconds["tensor"] > 1.9 * plain.seconds["tensor"]
    assert slow.seconds["optimizer"] == plain.seconds["optimizer"]
    assert plain.step_seconds < told(compute=1.5).step_seconds < 1.5 * plain.step_seconds
    big = told(memory=1.5)
    assert big.memory.total == pytest.approx(1.5 * plain.memory.total) and big.step_seconds == plain.step_seconds
    assert plain.fits and not told(memory=12.0).fits


def test_every_message_takes_as_much_longer_as_the_network_is_slower() -> None:
    cluster = Machine.read(BENCHMARKS / "machines" / "huggingface-h100.toml")
    for machine in (cluster, catalogue.machine("h100-80gb-sxm")):
        plain = network(machine, DEFAULT)
        slow = plain.slowed(1.7)
        for size in (0.0, 1e3, 1e6, 1e10):
            for ranks in (Group(8, 8), Group(16, 8), Group(4, 1)):
                for collective in (all_reduce, all_gather, reduce_scatter, all_to_all):
                    assert collective(size, ranks, slow) == pytest.approx(1.7 * collective(size, ranks, plain))
            for across in (False, True):
                assert send(size, across, slow) == pytest.approx(1.7 * send(size, across, plain))


def test_one_run_moves_the_common_factor_part_of_the_way_and_a_run_like_it_further() -> None:
    software = calibrate(measured(range(1), Software(compute=1.4, network=1.4)), "test")
    assert 1.1 < software.compute < 1.3
    again = truth(0, software) / truth(0, Software())
    other = truth(8, software) / truth(8, Software())
    assert 1.3 < again < 1.4 and software.compute < other < again


def test_several_runs_tell_compute_from_network() -> None:
    slow_network = calibrate(measured(range(6), Software(compute=1.1, network=2.5)), "test")
    slow_compute = calibrate(measured(range(6), Software(compute=1.6, network=1.0)), "test")
    assert slow_network.network / slow_network.compute > 1.6
    assert (
        slow_compute.network / slow_compute.compute < 1.01
    )  # little of these steps is communication that a faster one shortens
    for number in (6, 7, 8, 9):  # runs that were not measured
        for software, real in (
            (slow_network, Software(compute=1.1, network=2.5)),
            (slow_compute, Software(compute=1.6, network=1.0)),
        ):
            wrong = abs(math.log(truth(number, Software()) / truth(number, real)))
            left = abs(math.log(truth(number, software) / truth(number, real)))
            assert left < 0.5 * wrong, (number, wrong, left)


def test_one_odd_run_of_many_is_hardly_believed_and_is_named() -> None:
    real = Software(compute=1.2, network=1.2)
    sound = calibrate(measured(range(6), real), "test")
    samples = measured(range(6), real, {2: 3.0})
    odd = calibrate(samples, "test")
    for number in (0, 1, 6, 7):
        assert abs(math.log(truth(number, odd) / truth(number, sound))) < 0.15
    assert any("r2 took 3.60 times" in told and "check its row" in told for told in learned(odd, samples))
    assert not any("check its row" in told for told in learned(sound, measured(range(6), real)))


def test_factors_are_bounded_and_an_impossible_step_is_refused() -> None:
    far = calibrate(measured(range(6), Software(compute=9.0, network=9.0)), "test")
    assert far.compute <= 4.0 and far.network <= 4.0
    with pytest.raises(UserError, match=r"r0: a step of .* is no matter of software: check its unit"):
        calibrate(measured(range(1), Software(), {0: 1000.0}), "test")


def test_weights_solve_the_regression() -> None:
    runs = [replace(known_run(resolve(row(number))[0]), noise=0.01 * (number + 1)) for number in range(5)]
    values = [0.3, -0.1, 0.2, 0.0, 0.5]
    found = [replace(run, weight=weight) for run, weight in zip(runs, solve(runs, values), strict=True)]
    software = Software(compute=1.0, runs=tuple(found))
    common = 0.25**2 * sum(run.weight for run in found)
    for number, value in enumerate(values):
        case = resolve(row(number))[0]
        told = math.log(step_factor(replace(case, machine=replace(case.machine, software=software)))) + common
        assert told + found[number].noise * found[number].weight == pytest.approx(value, abs=1e-9)


def test_ranges_narrow_with_runs_and_with_likeness() -> None:
    def width(number: int, count: int) -> float:
        case = resolve(row(number), software=calibrate(measured(range(count), Software()), "test"))[0]
        low, high = step_range(case)
        return high / low

    plain = step_range(resolve(row(6))[0])
    assert plain == PUBLISHED["several nodes"] and spread(resolve(row(6))[0]) is None
    assert plain[1] / plain[0] > width(6, 1) > width(6, 3) > width(6, 6)
    assert width(0, 3) < width(9, 3)
    left = spread(resolve(row(0), software=calibrate(measured(range(6), Software()), "test"))[0])
    assert left is not None and left > NOISE


def test_no_step_is_faster_than_the_floor_of_a_search() -> None:
    chance = random.Random(0)
    software = calibrate(measured(range(8), Software(), {n: chance.uniform(0.5, 2.0) for n in range(8)}), "test")
    for number in range(10):
        case = resolve(row(number), software=software)[0]
        assert step_factor(case) >= least_factor(software)


def test_memory_is_learned_from_peaks_and_from_runs_out_of_memory() -> None:
    cases = [resolve(row(number)) for number in range(3)]
    peaks = [MeasuredRow(row(number), None, 1.3 * found.memory.first) for number, (_, found) in enumerate(cases)]
    software = calibrate(sample(peaks), "test")
    assert 1.2 < software.memory < 1.3 and software.compute == 1.0 and not software.runs
    assert calibrate(sample(peaks[:1]), "test").memory < software.memory
    with pytest.raises(UserError, match=r"r0: memory_gib 100 is more than the 79.* GiB of one h100-80gb-sxm"):
        calibrate(sample([MeasuredRow(row(0), None, 100 * 2**30)]), "test")
    full: Row = {**row(7), "micro_batch": 8, "recompute": "none"}
    _, tight = resolve(full)
    room = 80e9 / tight.memory.total
    burst = calibrate(sample([MeasuredRow(full, None, None, out_of_memory=True)]), "test")
    assert burst.memory == 1.0 if room < 1 else burst.memory > 1.0
    small = calibrate(sample([MeasuredRow(row(9), None, None, out_of_memory=True)]), "test")
    assert small.memory > 1.1


def write_runs(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        names = list(dict.fromkeys(name for one in rows for name in one))
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_tables_of_measured_runs_are_read(tmp_path: Path) -> None:
    rows = [
        {**row(0), "status": "ok", "step_seconds": 2.0, "memory_gib": 40},
        {**row(1), "tokens_per_s_per_gpu": 4096},
        {**row(2), "status": "oom"},
        {**row(3), "status": "crash_or_oom", "step_seconds": 1.0},
        {**row(4)},
    ]
    found = read_measured(write_runs(tmp_path / "runs.csv", rows))
    assert [item.row["run_id"] for item in found] == ["r0", "r1", "r2"]
    assert (found[0].step_seconds, found[0].memory_bytes) == (2.0, 40 * 2**30)
    assert found[1].step_seconds == 256 * 4096 / (4096 * 64)
    assert found[2].out_of_memory


def test_words_for_nothing_are_blank_in_measured_cells_too(tmp_path: Path) -> None:
    rows = [
        {**row(0), "status": "n/a", "step_seconds": "N/A", "memory_gib": 40},
        {**row(1), "status": "ok", "step_seconds": 2.0, "memory_gib": "-"},
        {**row(2), "status": "unknown", "step_seconds": "?", "memory_gib": ""},
    ]
    found = read_measured(write_runs(tmp_path / "runs.csv", rows))
    assert [(item.step_seconds, item.memory_bytes) for item in found] == [(None, 40 * 2**30), (2.0, None)]


def test_rows_left_out_for_their_status_are_told(tmp_path: Path) -> None:
    rows = [
        {**row(0), "status": "ok", "step_seconds": 2.0},
        {**row(1), "status": "CUDA OOM"},
        {**row(2), "status": "success", "step_seconds": 2.0},
        {**row(3), "status": "success", "step_seconds": 2.0},
        {**row(4), "status": "-", "step_seconds": 2.0},
        {**row(5), "status": "OOM"},
    ]
    table = str(write_runs(tmp_path / "table.csv", [{**row(0)}]))
    mixed = str(write_runs(tmp_path / "mixed.csv", rows))
    answer = CliRunner().invoke(predict_command, ["--table", table, "--measured", mixed])
    assert answer.exit_code == 0, answer.output
    note = "nothing is learned from rows with status 'cuda oom' (1 row), 'success' (2 rows): write ok or oom"
    assert f"note: of {mixed} {note}" in answer.stderr
    known = str(write_runs(tmp_path / "known.csv", [rows[0], rows[4], rows[5]]))
    answer = CliRunner().invoke(predict_command, ["--table", table, "--measured", known])
    assert answer.exit_code == 0 and "nothing is learned" not in answer.stderr


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"step_seconds": 0}, "line 2, column step_seconds: '0' must be a number above 0"),
        ({"step_seconds": "nan"}, "'nan' must be a number above 0"),
        ({"step_seconds": -1}, "'-1' must be a number above 0"),
        ({"step_seconds": "2 s"}, "'2 s' must be a number above 0"),
        ({"step_seconds": 1, "memory_gib": "inf"}, "column memory_gib: 'inf' must be"),
        ({"step_seconds": ""}, "has no measured run: fill in step_seconds"),
        ({"status": "failed", "step_seconds": 1}, "has no measured run"),
        ({"tokens_per_s_per_gpu": 100, "global_batch": ""}, "only beside gpus, global_batch and seq_len"),
    ],
)
def test_what_was_not_measured_is_refused(tmp_path: Path, cells: dict[str, Any], words: str) -> None:
    path = write_runs(tmp_path / "runs.csv", [{**row(0), **cells}])
    with pytest.raises(DataError) as caught:
        read_measured(path)
    assert words in str(caught.value)


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    rows = [{**row(0), "run_id": f"r{number}", "step_seconds": 1} for number in range(MOST + 1)]
    with pytest.raises(DataError, match=f"at most {MOST}"):
        read_measured(write_runs(tmp_path / "runs.csv", rows))


def test_runs_of_other_parts_are_refused() -> None:
    samples = sample([MeasuredRow({**row(0), "hardware": "a100-80gb-sxm"}, 2.0, None)])
    with pytest.raises(
        UserError, match="measured run r0 is of a100-80gb-sxm, and the table of h100-80gb-sxm: leave it out"
    ):
        check_hardware(samples, {"h100-80gb-sxm"}, "and the table")
    blank = {name: value for name, value in row(0).items() if name != "hardware"}
    place = catalogue.machine("h100-80gb-sxm")
    check_hardware(sample([MeasuredRow(blank, 2.0, None)], place), {"h100-80gb-sxm"}, "and the table")


def test_a_job_is_planned_without_what_runs_of_transformers_say(capsys: pytest.CaptureFixture[str]) -> None:
    place = catalogue.machine("h100-80gb-sxm")
    assert without_software(replace(place, software=Software(compute=2.0, source="my runs"))) == place
    assert "what my runs says about software is for --model, and left out" in capsys.readouterr().err
    assert without_software(place) == place and not capsys.readouterr().err


def test_the_search_counts_the_memory_that_was_measured() -> None:
    asked = problem()
    need = max(item.estimate.memory.total for item in search(asked).plans)
    room = 0.9 * asked.machine.accelerator.memory_bytes.value
    tight = search(replace(asked, machine=replace(asked.machine, software=Software(memory=min(16.0, 2 * room / need)))))
    assert all(item.estimate.memory.total <= room * 1.12 for item in tight.plans)
    assert len(tight.plans) < len(search(asked).plans) or tight.too_large


def test_software_is_kept_in_machine_files(tmp_path: Path) -> None:
    software = calibrate(measured(range(3), Software(compute=1.3, network=1.5)), "my runs")
    place = replace(catalogue.machine("h100-80gb-sxm"), software=software)
    place.write(tmp_path / "mine.toml")
    read = Machine.read(tmp_path / "mine.toml")
    assert read == place
    assert truth(6, Software(), None) != resolve(row(6), read)[1].step_seconds == truth(6, software)
    stated = {**row(6), "internode_gbps_per_gpu": 100.0}
    assert resolve(stated, read)[1].step_seconds == pytest.approx(resolve(stated, software=software)[1].step_seconds)
    other = {**row(6), "hardware": "a100-80gb-sxm"}
    assert resolve(other, read)[1].step_seconds == resolve(other)[1].step_seconds
    text = (tmp_path / "mine.toml").read_text()
    for old, new in (
        ("compute = 1", "compute = 1e9 #"),
        ("gpus = ", "gpus = 0 #"),
        ("gpus = ", "gpu = "),
        ("noise = ", "noise = nan #"),
    ):
        (tmp_path / "bad.toml").write_text(text.replace(f"\n{old}", f"\n{new}", 1))
        with pytest.raises(UserError, match="software: "):
            Machine.read(tmp_path / "bad.toml")


def test_plans_of_a_search_are_cases_again() -> None:
    asked = problem()
    for item in search(asked).plans[:20]:
        back = case_of(Plan.from_dict(as_plan(item).to_dict()), asked)
        cuts = item.case.layers_per_stage if item.case.pipeline > 1 else ()
        assert back == replace(item.case, stage_layers=cuts)
    with pytest.raises(PlanError, match="must divide evenly over 7 data ranks"):
        case_of(Plan.from_dict({"layout": "data=7"}), asked)


def problem() -> Problem:
    model, seq_len = Transformer.parse("gpt:layers=16,hidden=2048,heads=16,seq=2048")
    return Problem(
        model=model, machine=catalogue.machine("h100-80gb-sxm"), workers=16, seq_len=seq_len, global_batch=64
    )


def test_a_measured_plan_is_told_closer_and_a_measured_slow_network_moves_the_choice() -> None:
    asked = problem()
    best = search(asked).best
    assert best is not None
    real = 1.4 * best.estimate.step_seconds
    software = calibrate([sample_of(best.case, "plan.toml", real)], "plan.toml")
    again = estimate(replace(best.case, machine=replace(best.case.machine, software=software))).step_seconds
    assert abs(math.log(again / real)) < 0.3 * math.log(1.4)
    narrow = asked.machine.with_network(100, "test")
    before = search(replace(asked, machine=narrow)).best
    slow = search(replace(asked, machine=replace(narrow, software=Software(network=16.0)))).best
    assert slow is not None and before is not None and slow.case.layout() != before.case.layout()
    on_slow = replace(before.case, machine=slow.case.machine)
    assert slow.estimate.step_seconds < estimate(on_slow).step_seconds


def test_the_kept_scores_are_those_that_the_ranges_and_the_page_promise() -> None:
    kept = json.loads((BENCHMARKS / "results" / "calibration.json").read_text(encoding="utf-8"))
    page = (BENCHMARKS.parent / "docs" / "calibration.md").read_text(encoding="utf-8")
    for count in ("1", "3", "5", "8"):
        told = kept["step"]["E"][count]
        assert told["after"] < told["before"] and told["worse"] < told["better"]
        assert 0.7 < told["inside"] < 0.9 and told["width"] < told["plain width"]
        assert f"| {count} | {100 * told['before']:.1f} % | {100 * told['after']:.1f} % |" in page


MODEL = ("--model", "gpt:layers=16,hidden=2048,heads=16,seq=2048", "--batch", "64", "--nodes", "2")


def invoke(*words: object) -> Any:
    return CliRunner().invoke(plan_command, [str(word) for word in words])


def test_plan_takes_measured_runs_and_keeps_the_machine(tmp_path: Path) -> None:
    runs = [
        {**row(n), "step_seconds": truth(n, Software(compute=1.3, network=1.3)), "memory_gib": 30} for n in (0, 1, 3)
    ]
    path = write_runs(tmp_path / "runs.csv", runs)
    kept, plan = tmp_path / "mine.toml", tmp_path / "plan.toml"
    cluster = (*MODEL, "--machine", "h100-80gb-sxm")
    told = invoke(*cluster, "--measured", path, "--save-machine", kept, "-o", plan)
    assert told.exit_code == 0, told.output
    assert "learned from 3 measured runs of" in told.stdout and "times as long to compute" in told.stdout
    assert "4 of 5 runs like r0 take" in told.stdout and "it was 0.84 to 1.92" in told.stdout
    document = json.loads(invoke(*cluster, "--measured", path, "--json").stdout)
    plain = json.loads(invoke(*cluster, "--json").stdout)
    assert "calibration" not in plain and plain["plans"][0]["range_of"].startswith("4 of 5 published")
    assert 1.1 < document["calibration"]["compute"] < 1.3
    assert [run["run_id"] for run in document["calibration"]["runs"]] == ["r0", "r1", "r3"]
    first, before = document["plans"][0], plain["plans"][0]
    assert first["step_seconds"] > 1.1 * before["step_seconds"]
    low, high = first["step_seconds_range"]
    assert high / low < before["step_seconds_range"][1] / before["step_seconds_range"][0]
    saved = invoke(*MODEL, "--machine", kept, "--json")
    assert json.loads(saved.stdout)["plans"] == document["plans"]
    assert "note: the machine file learned from" in saved.stderr and "the memory" in saved.stderr
    step = invoke(*cluster, "--measured-step", plan, 2 * first["step_seconds"], "--json")
    assert json.loads(step.stdout)["calibration"]["runs"][0]["step_seconds"] == 2 * first["step_seconds"]
    again = invoke(*MODEL, "--machine", kept, "--measured", path)
    assert "these runs replace what the machine file learned from" in again.stderr


def test_rows_without_a_model_are_of_the_planned_one(tmp_path: Path) -> None:
    asked = problem()
    best = search(asked).best
    assert best is not None and best.case.tensor == best.case.pipeline == 1
    cells = {"run_id": "a", "gpus": 16, "micro_batch": best.case.micro_batch, "zero_stage": best.case.zero_stage}
    path = write_runs(tmp_path / "runs.csv", [{**cells, "recompute": best.case.recompute, "step_seconds": 1}])
    (found,) = sample(read_measured(path), asked.machine, problem=asked)
    assert replace(found.case, sequence_parallel=best.case.sequence_parallel) == best.case
    with pytest.raises(PlanError, match="measured run a: layers is unknown"):
        sample(read_measured(path), asked.machine)
    with pytest.raises(PlanError, match="measured run a: gpus is unknown"):
        sample([MeasuredRow({"run_id": "a"}, 1.0, None)], asked.machine, problem=asked)


def test_plan_refuses_in_words(tmp_path: Path) -> None:
    other = write_runs(tmp_path / "a100.csv", [{**row(0), "hardware": "a100-80gb-sxm", "step_seconds": 2}])
    plan = tmp_path / "plan.toml"
    plan.write_text('layout = "data=16"\nprecision = "bf16"\n')
    cluster = (*MODEL, "--machine", "h100-80gb-sxm")
    for words, sentence in (
        ((*cluster, "--measured", other), "measured run r0 is of a100-80gb-sxm, and the plan is for --machine of h100"),
        ((*cluster, "--measured-step", plan, "nan"), "give the seconds of one step, a number above 0"),
        ((*cluster, "--measured-step", plan, "0"), "give the seconds of one step, a number above 0"),
        ((*cluster, "--save-machine", tmp_path / "m.toml"), "also give --measured or --measured-step"),
        ((*cluster, "--measured-step", plan, "1", "--save-machine", tmp_path / "m"), "machine files end in .toml"),
        (("digits", "--measured", other), "--measured means nothing with JOB"),
        (("digits", "--measured-step", plan, "1"), "--measured-step means nothing with JOB"),
    ):
        result = invoke(*words)
        assert isinstance(result.exception, UserError) and sentence in str(result.exception), (words, result.output)


def test_predict_reads_measured_columns_of_measured_runs_alone(tmp_path: Path) -> None:
    runs = [{**row(n), "step_seconds": truth(n, Software(compute=1.4, network=1.4))} for n in range(6)]
    table, known = write_runs(tmp_path / "table.csv", runs), write_runs(tmp_path / "runs.csv", runs[:3])
    plain = CliRunner().invoke(predict_command, ["--table", str(table)])
    lines = [{**one, "step_seconds": 77.0} for one in runs]
    assert (
        CliRunner().invoke(predict_command, ["--table", str(write_runs(tmp_path / "x.csv", lines))]).stdout
        == plain.stdout
    )
    told = CliRunner().invoke(predict_command, ["--table", str(table), "--measured", str(known), "--json"])
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout)
    assert document["calibration"]["source"] == str(known)
    for one, item, line in zip(runs, document["predictions"], plain.stdout.splitlines()[1:], strict=True):
        real = float(one["step_seconds"])
        before, after = (abs(math.log(step / real)) for step in (float(line.split(",")[1]), item["step_seconds"]))
        assert after < 0.5 * before
    assert "learned from 3 measured runs" in told.stderr
    other = write_runs(tmp_path / "a100.csv", [{**row(0), "hardware": "a100-80gb-sxm", "step_seconds": 2}])
    refused = CliRunner().invoke(predict_command, ["--table", str(table), "--measured", str(other)])
    assert isinstance(refused.exception, UserError) and "and the table of h100-80gb-sxm" in str(refused.exception)


def test_misspelt_columns_are_named(tmp_path: Path) -> None:
    header = ["run_id", "num_layers", "hidden_size", "seqlen", "Pricision".lower(), "vocab_size", "tensor_parallel"]
    assert misspelt_columns(header) == {
        "num_layers": "layers", "hidden_size": "hidden", "seqlen": "seq_len", "pricision": "precision",
        "vocab_size": "vocab", "tensor_parallel": "tensor",
    }  # fmt: skip
    assert not misspelt_columns(
        [*BASE, "loss", "date", "steps", "cluster", "tokens", "gpu_hours", "comment", "seed", "model"]
    )
    assert not misspelt_columns(["layers", "layer"])  # the right one is there too
    table = write_runs(tmp_path / "runs.csv", [{**row(0), "micro_batches_size": 4, "memory": 3}])
    told = CliRunner().invoke(predict_command, ["--table", str(table)])
    assert told.stderr.count("runs.csv are ignored, but 'memory' looks like 'memory_gib'") == 1
    slip = write_runs(tmp_path / "slip.csv", [{**row(0), "step_secs": 4}])
    refused = CliRunner().invoke(predict_command, ["--table", str(table), "--measured", str(slip)])
    assert isinstance(refused.exception, DataError) and "'step_secs' looks like 'step_seconds'" in refused.stderr


def test_runs_of_machine_files_are_checked() -> None:
    run = known_run(resolve(row(0))[0])
    assert isinstance(run, KnownRun)
    for change in ({"weight": math.inf}, {"noise": 0.0}, {"layers": 0}, {"hardware": 3}):
        with pytest.raises(UserError, match="software: "):
            replace(run, **change)
    for name in ("compute", "network", "memory"):
        for value in (0.0, -1.0, math.nan, 100.0, "1"):
            with pytest.raises(UserError, match=f"software: {name}="):
                Software(**{name: value})  # type: ignore[arg-type]
