"""The class of a hang follows from where the ranks were found."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.monitor.stall import HINTS, diagnose

GRADIENTS = "all-reduce of the gradients of last.bias ... first.weight"


def _at(rank: int, **changes: Any) -> dict[str, Any]:
    position = {
        "rank": rank,
        "pid": 100 + rank,
        "host": "here",
        "answered": True,
        "step": 7,
        "activity": "synchronisation",
        "inside": GRADIENTS,
        "process": "sleeping",
        "module": "",
        "line": "",
        "faults_per_second": 0.0,
    }
    return {**position, **changes}


CASES: list[tuple[str, list[int], list[dict[str, Any]], str]] = [
    ("stopped", [1], [_at(0), _at(1, answered=False, inside="", process="stopped"), _at(2)], "kill -CONT 101"),
    ("dead", [2], [_at(0), _at(1), _at(2, answered=False, inside="", process="gone")], "rank 2 is gone"),
    ("dead", [1], [_at(0), _at(1, answered=False, inside="", process="zombie")], "rank 1 is dead"),
    ("swap", [0], [_at(0, inside="", activity="forward", faults_per_second=5e3), _at(1)], "out of memory"),
    ("data", [1], [_at(0), _at(1, inside="", activity="data", line="read.py:3 in get")], "at read.py:3 in get"),
    ("slow", [1], [_at(0), _at(1, inside="", activity="forward", module="net.4"), _at(2)], "module net.4"),
    ("native", [1], [_at(0), _at(1, inside="", answered=False, process="running")], "rank 1 is silent (running)"),
    ("uneven", [1], [_at(0), _at(1, inside="", activity="evaluation"), _at(2)], "rank 1 is in evaluation"),
    ("uneven", [2], [_at(0), _at(1), _at(2, step=6)], "different points"),
    ("diverged", [1], [_at(0), _at(1, inside="all-gather of BatchNorm 1"), _at(2)], "all-gather of BatchNorm 1"),
    ("unknown", [], [_at(0), _at(1)], "ranks 0, 1 wait"),
    ("alone", [0], [_at(0, inside="", activity="backward", line="job.py:9 in f")], "job.py:9 in f"),
    ("stopped", [0], [_at(0, inside="", process="stopped", answered=False)], "stopped"),
]


@pytest.mark.parametrize(("what", "missing", "positions", "words"), CASES)
def test_the_class_the_missing_ranks_and_the_words(
    what: str, missing: list[int], positions: list[dict[str, Any]], words: str
) -> None:
    found = diagnose(positions, 12.5)
    assert (found.what, list(found.missing)) == (what, missing)
    assert words in found.message
    assert "12.5 s" in found.message
    assert "{" not in found.message


def test_every_class_has_its_case() -> None:
    assert {case[0] for case in CASES} == set(HINTS)


def test_many_ranks_stay_one_sentence() -> None:
    found = diagnose([*(_at(rank) for rank in range(1000)), _at(1000, inside="", activity="backward")], 60.0)
    assert found.missing == (1000,)
    assert "1000 ranks (0 ... 999) wait" in found.message
    assert len(found.message) < 500
