"""Exports: the same numbers in every form."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwise.cli.main import _run
from shardwise.monitor.sinks import COLUMNS, rows
from shardwise.spec.observations import ExpertsEvent

from .made import finished, ranks_event, write

OWN = """
import json
from shardwise.monitor.sinks import Sink, rows

class Lines(Sink):
    def __init__(self):
        self.file = open("own.jsonl", "w")
    def take(self, run, event):
        for row in rows(event):
            self.file.write(json.dumps([run, row.name, row.step, row.value]) + "\\n")
    def close(self):
        self.file.write("closed")
        self.file.close()

def make():
    return Lines()

def wrong():
    return 3
"""


def _records(path: Path) -> Iterator[bytes]:
    """Records of a TFRecord file: length, its checksum, data, its checksum."""
    data, place = path.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield data[place + 12 : place + 12 + length]
        place += 16 + length


def test_every_form_holds_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyarrow import parquet
    from tensorboardX.proto.event_pb2 import Event as BoardEvent

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "a", [*finished(), ExpertsEvent(step=100, tokens={"moe": [3, 5]}, dropped={})])
    (tmp_path / "mine.py").write_text(OWN)
    exports = ["out.csv", "out.parquet", "tensorboard:board", "mine.py:make"]
    options = [word for export in exports for word in ("--export", export)]
    assert _run(["watch", "runs", "--json", *options]) == 0
    json.loads(capsys.readouterr().out)
    with (tmp_path / "out.csv").open(newline="") as file:
        table = [
            (row["run"], int(row["step"]), row["name"], int(row["rank"]), float(row["value"]))
            for row in csv.DictReader(file)
        ]
    numbers = {(name, step, rank): value for _, step, name, rank, value in table}
    assert numbers["loss", 4, -1] == pytest.approx(0.4)
    assert numbers["test/accuracy", 99, -1] == 0.9375
    assert numbers["seconds/backward", 9, 1] == pytest.approx(0.001)
    assert numbers["memory_bytes", 99, 0] == 1 << 27
    assert numbers["expert_tokens/moe/1", 99, -1] == 5
    assert parquet.read_schema("out.parquet").names == list(COLUMNS)
    rest = parquet.read_table("out.parquet").to_pylist()
    assert [(row["run"], row["step"], row["name"], row["rank"], row["value"]) for row in rest] == table
    (board,) = (tmp_path / "board" / "a").iterdir()
    scalars = {}
    for record in _records(board):
        event = BoardEvent.FromString(record)
        scalars.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
    assert scalars["loss", 4] == pytest.approx(0.4)
    assert scalars["seconds/backward/rank_1", 9] == pytest.approx(0.001)
    own = (tmp_path / "own.jsonl").read_text().splitlines()
    assert len(own) == len(table) + 1 and own[-1] == "closed"
    assert sum(1 for event in finished() for _ in rows(event)) == len(table) - 2
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize(
    "where", ["out.xlsx", "nowhere/out.csv", "mine.py:nothing", "absent.py:make", "mine.py:wrong", "csv"]
)
def test_what_cannot_be_written_is_refused(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    write(tmp_path / "runs" / "a", finished())
    assert _run(["watch", "runs", "--json", "--export", where]) == 2


def test_seconds_of_ranks_are_those_of_a_step() -> None:
    found = {(row.name, row.rank): row.value for row in rows(ranks_event(0, 10, slow=0.01))}
    assert found["seconds/backward", 1] == pytest.approx(0.011)
    assert found["late_seconds", 1] == pytest.approx(0.01)
    assert found["core_wait_seconds", 1] == pytest.approx(0.001)
