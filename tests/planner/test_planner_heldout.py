"""The collected tables of published runs: canonical, with their source, and every scored row answered whatever its cells."""

import csv
import json
from pathlib import Path

import pytest

from shardwise.planner.catalogue import accelerator, canonical_name
from shardwise.planner.predict import predict_runs
from shardwise.planner.runs import INPUTS, MEASURED, read_runs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLES = sorted((BENCHMARKS / "published").glob("*.csv"))
SCORED = json.loads((BENCHMARKS / "results" / "heldout_first.json").read_text(encoding="utf-8"))
"""Tables that the planner has been run on; it is not run on the others before they are scored for the first time."""


def rows_of(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_there_are_tables() -> None:
    assert len(TABLES) >= 54
    assert sum(len(rows_of(path)) for path in TABLES) >= 2400
    assert {path.stem for path in TABLES} >= set(SCORED)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.stem))
def test_every_table_names_its_source_and_its_rows_are_canonical(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    remarks = [line for line in lines if line.startswith("#")]
    assert remarks[0].startswith("# source: ") and remarks[1].startswith("# licence: ")
    assert remarks == lines[: len(remarks)]
    rows = rows_of(path)
    assert set(rows[0]) == {*INPUTS, *MEASURED, "source", "group"}
    for row in rows:
        assert row["status"] == "oom" or (row["status"] == "ok" and (row["step_seconds"] or row["memory_gib"]))


@pytest.mark.parametrize("path", [path for path in TABLES if path.stem in SCORED], ids=lambda path: str(path.stem))
def test_every_scored_row_is_answered(path: Path) -> None:
    for answer in predict_runs(read_runs(path, strict=False)):
        assert answer.estimate is not None, answer.reason
        assert answer.estimate.step_seconds > 0 and answer.estimate.memory.total > 0


@pytest.mark.parametrize("path", [path for path in TABLES if path.stem not in SCORED], ids=lambda path: str(path.stem))
def test_unscored_rows_agree_with_themselves(path: Path) -> None:
    assert len(read_runs(path)) == len(rows_of(path))  # strict: every cell is of its kind
    for row in rows_of(path):
        where = f"{path.name}, {row['run_id']}"
        number = {name: float(cell) for name, cell in row.items() if cell.replace(".", "", 1).isdigit()}
        assert canonical_name(row["hardware"]) == row["hardware"], where
        if all(row[name] for name in ("data", "tensor", "pipeline")):
            ranks = number["data"] * number["tensor"] * number["pipeline"] * number.get("context", 1)
            assert ranks == number["gpus"], where
        if row["global_batch"] and row["micro_batch"] and row["data"]:
            assert number["global_batch"] % (number["micro_batch"] * number["data"]) == 0, where
        if row["status"] == "oom":
            assert not row["step_seconds"] and not row["memory_gib"], where
        if row["step_seconds"]:
            rate = number["global_batch"] * number["seq_len"] / number["step_seconds"] / number["gpus"]
            assert number["tokens_per_s_per_gpu"] == pytest.approx(rate, rel=0.02), where
        if row["memory_gib"]:
            assert number["memory_gib"] < 1.05 * accelerator(row["hardware"]).memory_bytes.value / 2**30, where
