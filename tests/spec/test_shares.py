"""The plan's shares: plain data that round-trips, is shown, and is refused where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import PlanError
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan


def test_shares_round_trip_and_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('layout = "data=2,tensor=2"\nshares = [3, 1.5]\n')
    plan = Plan.read(path)
    assert list(plan.shares) == [3, 1.5]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "shares=3,1.5" in str(plan)
    assert "shares" not in Plan().to_dict() and "shares" not in str(Plan())


def test_another_layout_keeps_shares_only_for_as_many_parts() -> None:
    plan = Plan(layout=Layout(data=2), shares=(3.0, 1.0))
    assert plan.with_layout(Layout(shard=2)).shares == (3.0, 1.0)
    assert plan.with_layout(Layout(data=3)).shares == ()


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([1.0], "has 1 numbers, but data=2 divides each global batch into 2 parts"),
        ([1.0, 0.0], "has 0.0: each must be a finite number above 0"),
        ([1.0, float("nan")], "has nan"),
        ([1.0, float("inf")], "has inf"),
        ([1.0, True], "has True"),
        ([1.0, "2"], "has '2'"),
        ("1,2", "must be a list of numbers"),
    ],
)
def test_wrong_shares_are_refused(shares: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict({"layout": "data=2", "shares": shares})
