"""Traces: chosen steps of all ranks on one clock, in the format that Perfetto opens."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from shardwise.cli.main import _run
from shardwise.errors import UserError
from shardwise.run.trace import chrome_trace, parse_trace
from shardwise.spec.events import read_events
from shardwise.spec.observations import TraceEvent

JOB = str(Path(__file__).with_name("planted.py"))


def test_chosen_steps_of_all_ranks_on_one_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--set",
        "trouble=sleep_backward",
        "--set",
        "seconds=0.05",
        "--steps",
        "12",
        "--plan",
        "data=2",
        "--quiet",
    ]
    assert _run(["train", JOB, *options, "--trace", "4:7", "--out", str(tmp_path / "r")]) == 0
    told = [event for event in read_events(tmp_path / "r" / "events.jsonl") if isinstance(event, TraceEvent)]
    assert [(event.first_step, event.steps, event.path) for event in told] == [(4, 3, "traces/steps-4-6.json")]
    trace = json.loads((tmp_path / "r" / told[0].path).read_text())
    spans: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            spans[event["pid"], event["cat"]].append(event)
    for rank in (0, 1):
        assert [event["name"] for event in spans[rank, "step"]] == ["step 4", "step 5", "step 6"]
        assert {"data", "forward", "backward", "optimizer"} <= {event["name"] for event in spans[rank, "phase"]}
    sums = [
        [e for e in spans[rank, "communication"] if e["args"]["what"].startswith("the gradients of last.bias")]
        for rank in (0, 1)
    ]
    assert [len(each) for each in sums] == [3, 3]
    for early, late in zip(*sums, strict=True):
        # Rank 1 sleeps in its backward pass: on the common clock rank 0 begins earlier, and both end at about the same time.
        assert late["ts"] - early["ts"] > 30_000
        assert early["args"]["waited_us"] > 30_000
        assert early["ts"] + early["dur"] >= late["ts"]
    assert not (tmp_path / "r" / "records").exists()


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path: Path) -> None:
    options = ["--plan", "serial", "--steps", "6", "--quiet", "--out", str(tmp_path / "r")]
    assert _run(["train", JOB, *options, "--trace", "4:100"]) == 0
    told = [event for event in read_events(tmp_path / "r" / "events.jsonl") if isinstance(event, TraceEvent)]
    assert [(event.first_step, event.steps) for event in told] == [(4, 2)]


def test_clocks_that_are_ahead_are_put_back() -> None:
    row = {"step": 0, "began": 100.0, "ended": 101.0, "traffic_bytes": 0}
    later = {**row, "began": 350.5, "ended": 351.0}
    events = chrome_trace([([row], 0.0), ([later], 250.0)])["traceEvents"]
    assert [(event["pid"], event["ts"]) for event in events if event["ph"] == "X"] == [(0, 0.0), (1, 500_000.0)]


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "a:b", "-1:3", ":"])
def test_what_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="FIRST:STOP"):
        parse_trace(text)
