"""The README's table of kinds and combinations says what plans are accepted, and what docs/matrix.md shows as proved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwise.errors import PlanError
from shardwise.nn import MoE
from shardwise.parallel.compose import check_model
from shardwise.spec.layout import AXES, Layout
from shardwise.spec.plan import HALVED, Plan

ROOT = Path(__file__).parents[2]


def _rows(file: str, first: str) -> list[list[str]]:
    """Cells of the table of a page whose head starts with `first`."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def _said() -> dict[tuple[str, str], str]:
    head, *rows = _rows("README.md", "| | `data`")
    assert sorted(head[1:]) == sorted(AXES)
    return {(row[0], axis): cell for row in rows for axis, cell in zip(head[1:], row[1:], strict=True)}


def _layout(*axes: str) -> Layout:
    return Layout(**dict.fromkeys(axes, 2))


def _accepts(plan: Plan) -> bool:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 8), MoE(8, 8, 4, balance=0.0), nn.Linear(8, 4)) for _ in range(2)]
    try:
        check_model(nn.Sequential(*blocks), plan, batch_size=8, batch_norm="global")
    except PlanError:
        return False
    return True


def _plans(row: str, axis: str) -> list[Plan]:
    """The plans that a cell speaks of."""
    if row in AXES:
        return [Plan(layout=_layout(row, axis))]
    plan = Plan(layout=_layout(axis))
    if row.startswith("micro_batch"):
        return [replace(plan, micro_batch=1)]
    if row == "recompute":
        return [replace(plan, recompute="full"), replace(plan, recompute="selective")]
    if row.startswith("schedule"):
        # Experts that meet no other worker: the layers are not what refuses.
        return [replace(plan, layout=_layout(axis, "pipeline"), schedule=schedule) for schedule in HALVED]
    assert row == "compression, local_steps"
    return [replace(plan, compression=name) for name in ("fp16", "bf16", "powersgd")] + [replace(plan, local_steps=2)]


@pytest.mark.parametrize("row", [*AXES, *sorted({row for row, _ in _said()} - set(AXES))])
def test_cells_are_what_is_accepted(row: str) -> None:
    for axis in AXES:
        said = _said()[row, axis]
        found = {_accepts(plan) for plan in _plans(row, axis)}
        assert found == {said == "yes"}, f"README says {said!r} of {row} with {axis}"
        assert said in ("yes", "no")


def test_every_product_of_two_axes_is_proved() -> None:
    said = _said()
    proved = {
        frozenset(name for name, degree in Layout.parse(row[0]).degrees.items() if degree > 1)
        for row in _rows("docs/matrix.md", "| layout |")[1:]
        if any(cell.startswith("proved") for cell in row[1:])
    }
    for one in AXES:
        for other in AXES:
            assert said[one, other] == said[other, one]
            assert (frozenset({one, other}) in proved) == (said[one, other] == "yes"), (one, other)
