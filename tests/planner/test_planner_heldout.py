"""The collected tables of published runs: canonical, with their source, and every row answered whatever its cells."""

import csv
from pathlib import Path

import pytest

from shardwise.planner.predict import predict_runs
from shardwise.planner.runs import INPUTS, MEASURED, read_runs

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published"
TABLES = sorted(PUBLISHED.glob("*.csv"))


def test_there_are_tables() -> None:
    assert len(TABLES) >= 8
    assert sum(len(read_runs(path, strict=False)) for path in TABLES) >= 80


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.stem))
def test_every_table_names_its_source_and_every_row_is_answered(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    remarks = [line for line in lines if line.startswith("#")]
    assert remarks[0].startswith("# source: ") and remarks[1].startswith("# licence: ")
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert set(rows[0]) == {*INPUTS, *MEASURED, "source", "group"}
    for row in rows:
        assert row["status"] == "oom" or (row["status"] == "ok" and (row["step_seconds"] or row["memory_gib"]))
    for answer in predict_runs(read_runs(path, strict=False)):
        assert answer.estimate is not None, answer.reason
        assert answer.estimate.step_seconds > 0 and answer.estimate.memory.total > 0
