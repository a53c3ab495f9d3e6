"""How often measured step times lie within the ranges that the planner states: of published runs, and of this machine's jobs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from heldout import PUBLISHED
from published_sets import SEALED
from scoring import SOURCES, SWEEP, cluster_machine, percent
from shardwise.planner import confidence
from shardwise.planner.predict import predict_runs
from shardwise.planner.runs import read_runs
from shardwise.spec.machine import Machine

REGRET_FILE = Path(__file__).parent / "results" / "regret.json"
ENDS = (0.05, 0.95)
"""Percentiles that the stated ranges of published runs are, over tables of the same weight."""

Ratios = Mapping[str, Mapping[str, Sequence[float]]]
"""Kind -> source (a table, or a model) -> measured over predicted, one for each run."""


def published_ratios(scorer: ModuleType, tables: Path) -> tuple[Ratios, Ratios]:
    """Of the tables whose rows were looked at, and of those of which nobody has looked at a row."""
    seen: dict[str, dict[str, list[float]]] = {kind: {} for kind in confidence.PUBLISHED}
    closed: dict[str, dict[str, list[float]]] = {kind: {} for kind in confidence.PUBLISHED}
    cluster = cluster_machine(tables)
    for name in SOURCES:
        _add(seen, scorer, tables / f"{name}.csv", cluster if name == SWEEP else None)
    for path in sorted(PUBLISHED.glob("*.csv")):
        _add(closed if path.stem in SEALED else seen, scorer, path, None)
    return seen, closed


def _add(found: dict[str, dict[str, list[float]]], scorer: ModuleType, path: Path, machine: Machine | None) -> None:
    measured = {row["run_id"]: row for row in scorer.read(path)}
    for item in predict_runs(read_runs(path, strict=False), machine):
        row = measured[item.run_id]
        if item.case is not None and item.estimate is not None and row["status"] == "ok" and row["step_seconds"]:
            ratio = float(row["step_seconds"]) / item.estimate.step_seconds
            found[confidence.published_kind(item.case)].setdefault(path.stem, []).append(ratio)


def counted_ratios() -> Ratios:
    """Of jobs on the machine of `regret.json`: kind -> model -> medians over predictions."""
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in confidence.COUNTED}
    for result in json.loads(REGRET_FILE.read_text(encoding="utf-8"))["results"]:
        for row in result["plans"]:
            ratio = statistics.median(row["measured_seconds"]) / row["predicted_seconds"]
            found[row["kind"]].setdefault(result["model"], []).append(ratio)
    return found


def percentile(sources: Mapping[str, Sequence[float]], share: float) -> float:
    """The ratio below which that share of the runs lies, every source with the same weight."""
    weighted = sorted((ratio, 1.0 / len(ratios)) for ratios in sources.values() for ratio in ratios)
    whole, below = sum(weight for _, weight in weighted), 0.0
    for ratio, weight in weighted:
        below += weight
        if below >= share * whole:
            return ratio
    return weighted[-1][0]


def covered(ratios: Sequence[float], low: float, high: float) -> float:
    """The share of the runs within a range."""
    return sum(low <= ratio <= high for ratio in ratios) / len(ratios)


def left_out(sources: Mapping[str, Sequence[float]], ends: tuple[float, float]) -> float:
    """Mean over sources of the share within a range that was taken from the other sources."""
    shares = []
    for name, ratios in sources.items():
        others = {other: found for other, found in sources.items() if other != name}
        shares.append(covered(ratios, *(percentile(others, share) for share in ends)))
    return statistics.mean(shares)


def range_lines(seen: Ratios, closed: Ratios) -> list[str]:
    """One line a kind of published runs, and one for all."""
    lines = []
    for kind, (low, high) in confidence.PUBLISHED.items():
        here, blind = ([x for ratios in side[kind].values() for x in ratios] for side in (seen, closed))
        cells = (
            kind,
            f"{low:g} to {high:g}",
            f"{len(here)} of {len(seen[kind])}",
            " to ".join(f"{percentile(seen[kind], share):.2f}" for share in ENDS),
            percent(left_out(seen[kind], ENDS)),
            f"{len(blind)} of {len(closed[kind])}",
            percent(covered(blind, low, high)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    count = sum(len(ratios) for sources in closed.values() for ratios in sources.values())
    return [*lines, f"| all | | | | | {count} | **{percent(blind_share(closed))}** |"]


def blind_share(closed: Ratios) -> float:
    """The share of all these runs within the range of their kind."""
    within = [
        covered(ratios, *confidence.PUBLISHED[kind]) * len(ratios)
        for kind, sources in closed.items()
        for ratios in sources.values()
    ]
    return sum(within) / sum(len(ratios) for sources in closed.values() for ratios in sources.values())


def counted_lines(found: Ratios) -> list[str]:
    """One line a kind of plans of jobs."""
    lines = []
    for kind, (low, high) in confidence.COUNTED.items():
        every = [ratio for ratios in found[kind].values() for ratio in ratios]
        told = f"{low:.2f} to {high:.2f}", str(len(every)), percent(covered(every, low, high))
        lines.append("| " + " | ".join((kind, *told, percent(left_out(found[kind], (0.1, 0.9))))) + " |")
    return lines
