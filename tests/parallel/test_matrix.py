"""The cells of docs/matrix.md again: proved, or refused before anything starts; and a fault makes one wrong.

Of the layouts of two axes, only models with something that both axes must get right; the script proves all of them.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import shardwise.parallel.pipeline.stages
import shardwise.parallel.shard
import shardwise.run.dcp  # noqa: F401  # once, before ranks are forked
from shardwise.run.assemble import Assembly

ROOT = Path(__file__).parents[2]
TOGETHER = (
    ("clipping", "accumulation", "recompute"),
    ("clipping", "recompute"),
    ("clipping", "accumulation"),
    ("clipping",),
)
"""Settings for a cell; the first that is not refused is taken."""

WITH_TWO_AXES = (
    "GPT, tied embedding",
    "conv net, BatchNorm, residuals",
    "mixture of experts",
    "recommender, sparse gradients",
)


@pytest.fixture(scope="module")
def matrix() -> Any:
    """The script that makes the table."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "benchmarks" / "matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # dataclasses look themselves up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # where it finds its models, as when it is run
        spec.loader.exec_module(module)
    return module


def _documented() -> dict[tuple[str, str], str]:
    """(model, layout) -> first word of the cell in docs/matrix.md."""
    lines = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8").splitlines()
    rows = [[item.strip() for item in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    models = rows[0][1:]
    return {
        (model, row[0].strip("`")): entry.partition(" ")[0].rstrip(";")
        for row in rows[2:]
        for model, entry in zip(models, row[1:], strict=True)
    }


def test_cells_are_what_the_page_says(matrix: Any) -> None:
    found: dict[tuple[str, str], str] = {}
    chosen = []
    every = [(model, layout) for model in matrix.MODELS for layout in matrix.LAYOUTS]
    for model, layout in (cell for cell in every if "," not in cell[1] or cell[0] in WITH_TWO_AXES):
        cells = (matrix.Cell(model, layout, settings) for settings in TOGETHER)
        cell = next((cell for cell in cells if matrix.refusal(cell) is None), None)
        if cell is None:
            found[model, layout] = "refused"
        else:
            chosen.append(cell)
    for result in matrix.prove_cells(chosen):
        assert result.outcome == "proved", result
        found[result.cell.model, result.cell.layout] = "proved"
    documented = _documented()
    assert set(documented) == set(every), "make the page again: python benchmarks/matrix.py --out docs/matrix.md"
    assert found == {cell: documented[cell] for cell in found}


def _scale(a: Assembly) -> None:
    finish = a.composed.gradients.finish

    def finished(**options: Any) -> None:
        finish(**options)
        next(p for p in a.parameters if p.grad is not None).grad.mul_(1.0001)  # type: ignore[union-attr]

    a.composed.gradients.finish = functools.wraps(finish)(finished)  # type: ignore[method-assign]


def test_a_fault_is_seen(matrix: Any) -> None:
    cell = matrix.Cell("MLP of awkward sizes", "pipeline=2", ("accumulation",))
    (result,) = matrix.prove_cells([cell], fault=_scale)
    assert result.outcome == "wrong" and "gradient" in result.reason
