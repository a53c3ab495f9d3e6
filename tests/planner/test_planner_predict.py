"""Predictions from tables: blanks, malformed cells, every column, and nothing measured."""

import csv
import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from shardwise.cli.predict import predict as predict_command
from shardwise.errors import DataError, UserError
from shardwise.planner import catalogue
from shardwise.planner.constants import DEFAULT
from shardwise.planner.predict import base_case, predict_runs, resolve, write_csv
from shardwise.planner.runs import INPUTS, MEASURED, Row, parse_runs, read_runs
from shardwise.planner.step import estimate
from shardwise.spec.machine import Figure

BASE: Row = {
    "run_id": "r1", "hardware": "a100-80gb-sxm", "gpus": 64, "gpus_per_node": 8, "internode_gbps_per_gpu": 200.0, "layers": 32,
    "hidden": 4096, "heads": 32, "kv_heads": 32, "ffn_hidden": 16384, "gated_ffn": 0, "vocab": 51200, "tied_embeddings": 1,
    "seq_len": 2048, "global_batch": 256, "micro_batch": 2, "data": 8, "zero_stage": 1, "tensor": 4, "pipeline": 2,
    "virtual_stages": 1, "context": 1, "sequence_parallel": 0, "recompute": "none", "attention": "flash", "precision": "bf16",
    "compile": 0, "schedule": "1f1b",
}  # fmt: skip
CHANGES: dict[str, dict[str, str | int | float]] = {
    "hardware": {"hardware": "h100-80gb-sxm"},
    "gpus": {"gpus": 128, "data": 16},
    "gpus_per_node": {"gpus_per_node": 2},
    "internode_gbps_per_gpu": {"internode_gbps_per_gpu": 25.0},
    "layers": {"layers": 16},
    "hidden": {"hidden": 2048},
    "heads": {"heads": 128},
    "kv_heads": {"kv_heads": 8},
    "ffn_hidden": {"ffn_hidden": 8192},
    "gated_ffn": {"gated_ffn": 1},
    "vocab": {"vocab": 256000},
    "tied_embeddings": {"tied_embeddings": 0, "pipeline": 1, "data": 16},
    "experts": {"experts": 8, "experts_per_token": 2},
    "experts_per_token": {"experts": 8, "experts_per_token": 4},
    "seq_len": {"seq_len": 8192},
    "global_batch": {"global_batch": 512},
    "micro_batch": {"micro_batch": 4},
    "data": {"data": 4, "tensor": 8},
    "zero_stage": {"zero_stage": 3},
    "tensor": {"tensor": 2, "data": 16},
    "pipeline": {"pipeline": 4, "data": 4},
    "virtual_stages": {"virtual_stages": 2},
    "context": {"context": 2, "data": 4},
    "expert": {"experts": 8, "experts_per_token": 2, "expert": 4},
    "sequence_parallel": {"sequence_parallel": 1},
    "recompute": {"recompute": "full"},
    "attention": {"attention": "math"},
    "precision": {"precision": "fp32"},
    "compile": {"compile": 1},
    "schedule": {"schedule": "gpipe"},
}


def answer(row: Row) -> tuple[float, float]:
    _, found = resolve(row)
    return found.step_seconds, found.memory.total


@pytest.mark.parametrize("column", [name for name in INPUTS if name != "run_id"])
def test_every_column_counts(column: str) -> None:
    changed = {**BASE, **CHANGES[column]}
    before = {**BASE, **{key: value for key, value in CHANGES[column].items() if key != column}}
    if column == "gpus":
        before = dict(BASE)
    if column in ("data", "tensor", "pipeline", "context", "tied_embeddings"):
        before = dict(BASE)
    if column == "experts":
        before = {**BASE}
    if column == "experts_per_token":
        before = {**BASE, "experts": 8, "experts_per_token": 2}
    assert answer(changed) != answer(before)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    handle = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(handle, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return handle.getvalue()


def test_measured_columns_and_notes_are_never_read() -> None:
    plain = parse_runs(io.StringIO(table([dict(BASE)])), "plain")
    told = {**BASE, "source": "x", "group": "y", "status": "oom", "step_seconds": "nonsense", "tokens_per_s_per_gpu": 1}
    told.update({"memory_gib": 3, "tflops_per_gpu": 4, "note": "shard_group=8; mp_mode PURE"})
    whole = parse_runs(io.StringIO(table([told])), "told")
    assert plain == whole
    assert not {*MEASURED, "source", "group"} & set(whole[0])
    assert write_csv(predict_runs(plain)) == write_csv(predict_runs(whole))


def test_comments_and_blank_lines_are_skipped() -> None:
    text = "# source: x\n" + table([dict(BASE)]).replace("\n", "\n\n", 1) + "# end\n"
    assert parse_runs(io.StringIO(text), "t") == [BASE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "many"}, "line 2, column layers: 'many' is not a number"),
        ({"layers": 1.5}, "line 2, column layers: '1.5' must be a whole number"),
        ({"micro_batch": -1}, "line 2, column micro_batch: '-1' must be a whole number from 1"),
        ({"zero_stage": 4}, "line 2, column zero_stage: '4' must be a whole number from 0 to 3"),
        ({"compile": 2}, "line 2, column compile: '2' must be a whole number from 0 to 1"),
        ({"internode_gbps_per_gpu": "nan"}, "column internode_gbps_per_gpu: 'nan' is not a number"),
        ({"recompute": "some"}, "column recompute: 'some' is not one of none, selective, full"),
        ({"precision": "int3"}, "column precision: 'int3' is not one of"),
        ({"run_id": ""}, "column run_id: blank"),
    ],
)
def test_a_malformed_cell_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        parse_runs(io.StringIO(table([{**BASE, **change}])), "runs.csv")


def test_files_of_other_systems_read_the_same(tmp_path: Path) -> None:
    plain, foreign = tmp_path / "plain.csv", tmp_path / "foreign.csv"
    text = table([{**BASE, "note": "two\nlines, quoted"}])
    plain.write_text(text)
    foreign.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_runs(plain) == read_runs(foreign) == [BASE]


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-16"), (",", "utf-16"), ("\t", "utf-8")]
)
def test_exports_of_spreadsheets_read_the_same(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [{**BASE, "run_id": "1,5", "internode_gbps_per_gpu": 12.5}, {**BASE, "note": "a, b; c"}]
    lines = list(csv.reader(io.StringIO(table(rows))))
    lines[0] = [name.upper() for name in lines[0]]
    if delimiter == ";":
        lines = [[cell.replace("12.5", "12,5") for cell in cells] for cells in lines]
    path = tmp_path / "export.csv"
    with path.open("w", newline="", encoding=encoding) as handle:
        csv.writer(handle, delimiter=delimiter).writerows([*lines, [""] * len(lines[0])])
    assert read_runs(path) == [{**BASE, "run_id": "1,5", "internode_gbps_per_gpu": 12.5}, BASE]


def test_text_in_another_encoding_is_told(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(table([{**BASE, "run_id": "é"}]).encode("latin-1"))
    with pytest.raises(DataError, match="save it as CSV UTF-8"):
        read_runs(path)


def test_a_malformed_table_is_named() -> None:
    with pytest.raises(DataError, match=r"runs\.csv is empty"):
        parse_runs(io.StringIO("# only a comment\n"), "runs.csv")
    with pytest.raises(DataError, match="column 'seq_len' is missing"):
        parse_runs(io.StringIO("run_id,hardware,layers,hidden\n"), "runs.csv")
    with pytest.raises(DataError, match="line 3, column run_id: 'r1' is there twice"):
        parse_runs(io.StringIO(table([dict(BASE), dict(BASE)])), "runs.csv")
    with pytest.raises(DataError, match="line 2: 2 cells for 5 columns"):
        parse_runs(io.StringIO("run_id,hardware,layers,hidden,seq_len\na,b\n"), "runs.csv")


def test_blanks_are_filled_by_the_stated_rules() -> None:
    row: Row = {
        "run_id": "x",
        "hardware": "h100",
        "layers": 24,
        "hidden": 2048,
        "seq_len": 4096,
        "gpus": 16,
        "global_batch": 64,
    }
    case, found = resolve(row)
    assert (case.data, case.tensor, case.pipeline, case.context) == (16, 1, 1, 1)
    assert case.model.heads == 16 and case.model.ffn_hidden == 8192
    assert case.machine.gpus_per_node == 8
    assert case.machine.inter.bytes_per_second.value == pytest.approx(50e9)
    assert case.attention == "flash" and case.precision == "bf16"
    assert found.fits
    old = resolve({**row, "hardware": "v100-32gb-sxm"})[0]
    assert old.attention == "math" and old.precision == "fp16"


def test_open_settings_follow_the_usual_software() -> None:
    open_row = {key: value for key, value in BASE.items() if key != "sequence_parallel"}
    assert resolve(open_row)[0].sequence_parallel
    assert not resolve({**open_row, "attention": "math", "precision": "fp16"})[0].sequence_parallel
    sparse = {**BASE, "experts": 64, "experts_per_token": 2}
    case, _ = resolve(sparse)
    assert case.expert > 1 and case.data % case.expert == 0
    assert resolve({**sparse, "expert": 1})[0].expert == 1
    deep = {key: value for key, value in BASE.items() if key != "micro_batch"} | {"pipeline": 4, "data": 4}
    assert resolve(deep)[0].micro_batches >= 4
    assert resolve({**deep, "zero_stage": 2})[0].micro_batches == 4


def test_an_open_recomputation_is_chosen_so_that_it_fits() -> None:
    roomy = {key: value for key, value in BASE.items() if key != "recompute"}
    assert resolve(roomy)[0].recompute == "none"
    tight = {**roomy, "micro_batch": 32, "global_batch": 1024, "hardware": "a100-40gb-sxm"}
    case, found = resolve(tight)
    assert case.recompute == "full" and found.fits
    assert not resolve({**tight, "recompute": "none"})[1].fits


@pytest.mark.parametrize("column", ["hardware", "layers", "hidden", "seq_len"])
def test_a_blank_is_guessed_and_the_guess_is_told(column: str) -> None:
    (found,) = predict_runs(parse_runs(io.StringIO(table([{**BASE, column: ""}])), "t", strict=False))
    assert found.estimate is not None and any(column in sentence for sentence in found.assumed)
    (sound,) = predict_runs([BASE])
    assert sound.assumed == ()


def test_a_model_of_unknown_size_gets_no_prediction_and_a_reason() -> None:
    (found,) = predict_runs(parse_runs(io.StringIO(table([{**BASE, "layers": "", "hidden": ""}])), "t", strict=False))
    assert found.estimate is None and found.reason.startswith("layers is unknown")
    assert write_csv([found]).splitlines()[1:] == ["r1,,,"]


@pytest.mark.parametrize(
    ("change", "meant", "told"),
    [
        ({"gpus": 128}, {"gpus": 128, "data": 16}, "data taken as 16"),
        ({"gpus": 63}, {}, "taken as 64 workers"),
        ({"hardware": "abacus"}, {"hardware": "a100-80gb-sxm"}, "'abacus' is not in the catalogue"),
        ({"micro_batch": 64}, {"micro_batch": 32}, "exceeds the 32 sequences"),
        ({"virtual_stages": 40}, {"virtual_stages": 16}, "taken as 16"),
        ({"experts": 8, "experts_per_token": 9}, {"experts": 8, "experts_per_token": 8}, "taken as 8"),
        ({"kv_heads": 64}, {"kv_heads": 32}, "exceeds heads=32"),
    ],
)
def test_a_row_that_contradicts_itself_is_repaired_as_little_as_possible(
    change: dict[str, str | int], meant: dict[str, str | int], told: str
) -> None:
    (found,) = predict_runs([{**BASE, **change}])
    (other,) = predict_runs([{**BASE, **meant}])
    assert found.estimate == other.estimate is not None
    assert len(found.assumed) == 1 and told in found.assumed[0]


@pytest.mark.parametrize(
    ("column", "text", "meant"),
    [
        ("recompute", "Full (block)", "full"),
        ("recompute", "off", "none"),
        ("recompute", "selective op", "selective"),
        ("attention", "FlashAttention-2", "flash"),
        ("attention", "torch core", "math"),
        ("precision", "bfloat16", "bf16"),
        ("precision", "BF16 (no master weights)", "pure-bf16"),
        ("precision", "bf16-mixed", "bf16"),
        ("precision", "fp8-hybrid", "fp8"),
        ("schedule", "1F1B-interleaving", "interleaved1f1b"),
        ("schedule", "ZB-V", "zbv"),
        ("compile", "yes", 1),
        ("global_batch", "1,024", 1024),
        ("internode_gbps_per_gpu", "200 Gbit/s", 200.0),
        ("micro_batch", "n/a", None),
        ("micro_batch", "-1", None),
        ("zero_stage", "7", None),
        ("recompute", "??", None),
    ],
)
def test_other_words_are_understood_unless_strict(column: str, text: str, meant: str | int | float | None) -> None:
    (row,) = parse_runs(io.StringIO(table([{**BASE, column: text}])), "t", strict=False)
    assert row.get(column) == meant
    assert column in str(row.get("assumed", "")) or text.lower() in ("zb-v",)
    assert next(predict_runs([row])).estimate is not None


def test_a_ragged_table_is_answered_unless_strict() -> None:
    text = "run_id,hardware,layers,hidden,seq_len\na,h100,24,2048\n,h100,24,2048,4096,5\n"
    rows = parse_runs(io.StringIO(text), "t", strict=False)
    assert [row["run_id"] for row in rows] == ["a", "line-3"]
    assert all(item.estimate is not None and item.assumed for item in predict_runs(rows))
    with pytest.raises(DataError, match="4 cells for 5 columns"):
        parse_runs(io.StringIO(text), "t")


@pytest.mark.parametrize("seed", range(3))
def test_no_row_is_so_odd_that_it_crashes_or_gets_an_absurd_answer(seed: int) -> None:
    rng = random.Random(seed)
    values: dict[str, list[object]] = {
        "hardware": ["a100-80gb-sxm", "DGX H100", "TPU v4", "weird", ""], "gpus": [1, 7, 64, 3072, ""],
        "gpus_per_node": [1, 8, 72, ""], "internode_gbps_per_gpu": [0, 25, "fast", ""], "layers": [1, 7, 96],
        "hidden": [7, 1000, 12288], "heads": [1, 7, 96, ""], "kv_heads": [1, 32, ""], "ffn_hidden": [1, 49152, ""],
        "gated_ffn": [0, 1, "yes"], "vocab": [10, 256000, ""], "experts": [0, 8, 256, ""], "experts_per_token": [0, 2, 8],
        "seq_len": [1, 2048, 131072], "global_batch": [1, 512, "4M", ""], "micro_batch": [1, 3, 64, -1, ""],
        "data": [1, 3, 64, ""], "zero_stage": [0, 1, 2, 3, 9], "tensor": [1, 3, 16, ""], "pipeline": [1, 7, 16, ""],
        "virtual_stages": [1, 8, ""], "context": [1, 8, ""], "expert": [1, 64, ""], "sequence_parallel": [0, 1, ""],
        "recompute": ["none", "full", "block", "??"], "attention": ["flash", "math", "FA2"], "compile": [0, 1, ""],
        "precision": ["bf16", "fp16", "fp8", "int4"], "schedule": ["1f1b", "interleaved", "zbv", "dualpipe", "odd"],
    }  # fmt: skip
    rows = [{"run_id": f"r{n}", **{key: rng.choice(options) for key, options in values.items()}} for n in range(60)]
    for found in predict_runs(parse_runs(io.StringIO(table(rows)), "t", strict=False)):
        assert found.estimate is not None and found.case is not None, found.reason
        case, step = found.case, found.estimate.step_seconds
        assert math.isfinite(step) and step > 0 and found.estimate.memory.total > 0
        peak = max(figure.value for figure in case.machine.accelerator.peak_flops.values())
        assert 3 * case.model.forward_flops(case.seq_len) * case.global_batch / case.workers / step < peak
        assert all(value > -1e-6 * step for value in found.estimate.seconds.values())


def test_the_parts_sum_to_the_step_and_none_is_negative() -> None:
    for changes in ({}, {"zero_stage": 3}, {"virtual_stages": 2}, {"context": 2, "data": 4}, {"recompute": "full"}):
        _, found = resolve({**BASE, **changes})
        assert sum(found.seconds.values()) == pytest.approx(found.step_seconds)
        assert all(value > -1e-9 for value in found.seconds.values()), found.seconds


def test_slower_hardware_is_never_faster() -> None:
    case = base_case({**BASE, "zero_stage": 3, "tensor": 1, "data": 32})
    device = case.machine.accelerator
    times = []
    for gbits in (400.0, 100.0, 25.0, 1.0):
        times.append(estimate(replace(case, machine=case.machine.with_network(gbits, "test")), DEFAULT).step_seconds)
    assert times == sorted(times) and times[0] < times[-1]
    slow = replace(device, memory_bytes_per_second=Figure(device.memory_bytes_per_second.value / 4, "nominal", "test"))
    slower = replace(case, machine=replace(case.machine, accelerator=slow))
    assert estimate(slower).step_seconds > estimate(case).step_seconds


def test_more_work_takes_longer() -> None:
    for column, values in {
        "global_batch": (64, 128, 512),
        "seq_len": (1024, 2048, 4096),
        "layers": (8, 16, 32),
    }.items():
        times = [answer({**BASE, column: value})[0] for value in values]
        assert times == sorted(times) and times[0] < times[-1]


def test_small_micro_batches_wait_for_the_host() -> None:
    # the same samples in eight times as many launches: a layer this small is bound by the host, not by its FLOPs
    small = {**BASE, "hidden": 512, "heads": 8, "ffn_hidden": 2048, "kv_heads": 8, "pipeline": 1, "data": 16}
    many, few = answer({**small, "micro_batch": 1})[0], answer({**small, "micro_batch": 8})[0]
    assert many > 3 * few


def test_command_line_writes_a_table_and_one_json_document(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs.csv", tmp_path / "predictions.csv"
    runs.write_text(table([dict(BASE), {**BASE, "run_id": "r2", "tensor": 8, "data": 4}]))
    result = CliRunner().invoke(predict_command, ["--table", str(runs), "--out", str(out), "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    written = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["run_id"] for row in written] == ["r1", "r2"]
    for row, item in zip(written, document["predictions"], strict=True):
        assert float(row["step_seconds"]) == pytest.approx(item["step_seconds"], rel=1e-5)
        assert float(row["memory_gib"]) == pytest.approx(item["memory_gib"], rel=1e-5)
        assert bool(int(row["fits"])) is item["fits"]
        assert sum(item["seconds_by_part"].values()) == pytest.approx(item["step_seconds"])
    assert CliRunner().invoke(predict_command, ["--table", str(runs)]).stdout == out.read_text()
    runs.write_text(table([{**BASE, "recompute": "block"}]))
    guessed = CliRunner().invoke(predict_command, ["--table", str(runs)])
    assert guessed.exit_code == 0 and "recompute 'block' is read as full" in guessed.stderr
    refused = CliRunner().invoke(predict_command, ["--table", str(runs), "--strict"])
    assert isinstance(refused.exception, DataError)
    runs.write_text("run_id\na\nb\n")
    assert CliRunner().invoke(predict_command, ["--table", str(runs)]).exit_code == 1


def test_command_line_refuses_what_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(predict_command, ["--table", str(tmp_path / "none.csv")])
    assert isinstance(result.exception, UserError) and "none.csv" in str(result.exception)
    runs = tmp_path / "runs.csv"
    runs.write_text(table([dict(BASE)]))
    result = CliRunner().invoke(predict_command, ["--table", str(runs), "--out", str(tmp_path / "no" / "x.csv")])
    assert isinstance(result.exception, UserError) and "--out" in str(result.exception)


def test_a_machine_file_changes_only_rows_without_a_network(tmp_path: Path) -> None:
    machine = catalogue.machine("a100-80gb-sxm", gbits_per_gpu=10)
    open_row = {key: value for key, value in BASE.items() if key != "internode_gbps_per_gpu"}
    assert resolve(open_row, machine)[1].step_seconds > resolve(open_row)[1].step_seconds
    assert resolve(BASE, machine)[1] == resolve(BASE)[1]
    assert resolve({**open_row, "hardware": "h100"}, machine)[1] == resolve({**open_row, "hardware": "h100"})[1]


@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        ("seq_len", "8k", 8192),
        ("vocab", "128k", 128000),
        ("global_batch", "4M tokens", 2048),
        ("global_batch", "64 sequences", 64),
        ("ffn_hidden", "4h", 4096),
        ("gated_ffn", "SwiGLU", 1),
        ("gated_ffn", "GELU", 0),
        ("zero_stage", "FSDP", 3),
        ("zero_stage", "SHARD_GRAD_OP", 2),
        ("zero_stage", "DDP", 0),
        ("gpus", "1,024 GPUs", 1024),
        ("internode_gbps_per_gpu", "200 Gb/s", 200.0),
        ("internode_gbps_per_gpu", "4x400", None),  # of the node, and how many share it is another column
    ],
)
def test_cells_as_people_write_them(column: str, text: str, value: float | None) -> None:
    cells = {"run_id": "a", "hidden": "1024", "seq_len": "2048"} | {column: f'"{text}"'}
    row = parse_runs([",".join(cells) + "\n", ",".join(cells.values()) + "\n"], "t", strict=False)[0]
    assert row.get(column) == value
    assert text in str(row["assumed"])
