"""The tables and plots of a sweep: trials.csv, trials.parquet, report.html."""

from __future__ import annotations

import csv
import html
import io
import math
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from shardwise.run.folder import write_aside
from shardwise.tasks.sweep.space import Axis

_WIDTH, _HEIGHT, _EDGE = 640, 260, 48


def warm_up() -> None:
    """Import what the report needs while the trainings run and this process only waits for them."""
    threading.Thread(target=_arrow, name="shardwise-report-warm-up", daemon=True).start()


def _arrow() -> list[Any]:
    """PyArrow and its Parquet module; empty where it is not installed."""
    try:
        return [import_module(name) for name in ("pyarrow", "pyarrow.parquet")]
    except ImportError:
        return []


def write_report(folder: Path, summary: dict[str, Any], records: list[dict[str, Any]], axes: Sequence[Axis]) -> None:
    """Write all of them into the sweep's folder; Parquet where PyArrow is there."""
    table = _table(records, axes)
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    write_aside(folder / "trials.csv", text.getvalue().encode())
    _write_parquet(folder / "trials.parquet", table)
    write_aside(folder / "report.html", _page(summary, axes).encode())


def _table(records: list[dict[str, Any]], axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """One row for each training and rung; every row has the same columns."""
    metrics = list(dict.fromkeys(name for record in records for name in record.get("metrics", {})))
    rows = []
    for record in records:
        row = {name: record[name] for name in ("trial", "fold", "seed", "rung")}
        row |= {axis.name: record["setting"].get(axis.name) for axis in axes}
        row |= {"state": record["state"], "steps": record.get("steps")}
        row |= {f"{name}": record.get("metrics", {}).get(name) for name in metrics}
        row |= {
            name: record.get(name) for name in ("seconds", "peak_memory_bytes", "parameters", "attempts", "failure")
        }
        rows.append(row | {"run": record.get("run")})
    return rows


def _write_parquet(path: Path, table: list[dict[str, Any]]) -> None:
    modules = _arrow()
    if not modules:
        return
    arrow, parquet = modules
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(table), buffer)
    write_aside(path, buffer.getvalue())


def _page(summary: dict[str, Any], axes: Sequence[Axis]) -> str:
    metric = summary["metric"]
    trials = [trial for trial in summary["trials"] if trial[metric] is not None]
    plots = [_parallel(trials, axes, metric, summary["goal"])] if len(axes) > 1 and len(trials) > 1 else []
    plots += [_scatter(trials, axis, metric) for axis in axes if trials]
    head = [*(axis.name for axis in axes), metric, "spread", "trained", "state"]
    rows = [
        [*(trial["settings"].get(axis.name, "") for axis in axes), _number(trial[metric]), _number(trial["spread"]),
         trial["trained"], trial["state"]]
        for trial in summary["trials"]
    ]  # fmt: skip
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    title = f"{summary['job']}: {metric} on the {summary['split']} split"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title>"
        "<style>body{font:14px sans-serif;margin:2em;max-width:60em}table{border-collapse:collapse}"
        "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}svg{margin:1em 0;display:block}</style>"
        f"<h1>{html.escape(title)}</h1>"
        f"<p>{summary['combinations']} combinations, {summary['trainings']} trainings, {summary['failed']} failed; "
        f"{summary['search']} search, {html.escape(summary['plan'])}.</p>"
        + "".join(plots)
        + f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>{cells}</table></html>\n"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _places(axis: Axis, trials: list[dict[str, Any]]) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Text of a value -> its place from 0 to 1, and the marks of the axis."""
    texts = list(dict.fromkeys(trial["settings"][axis.name] for trial in trials))
    try:
        numbers = {text: float(text) for text in texts}
    except ValueError:
        marks = [(place / max(1, len(texts) - 1), text) for place, text in enumerate(texts)]
        return {text: place for place, text in marks}, marks
    spread = axis.log or (min(numbers.values()) > 0 and max(numbers.values()) / min(numbers.values()) >= 30)
    scaled = {text: math.log(number) if spread else number for text, number in numbers.items()}
    low, high = min(scaled.values()), max(scaled.values())
    places = {text: (value - low) / (high - low) if high > low else 0.5 for text, value in scaled.items()}
    ends = {min(numbers, key=lambda text: numbers[text]), max(numbers, key=lambda text: numbers[text])}
    return places, [(places[text], text) for text in (texts if len(texts) <= 6 else sorted(ends))]


def _scatter(trials: list[dict[str, Any]], axis: Axis, metric: str) -> str:
    places, marks = _places(axis, trials)
    values = [trial[metric] for trial in trials]
    low, high = min(values), max(values)

    def height(value: float) -> float:
        part = (value - low) / (high - low) if high > low else 0.5
        return _HEIGHT - _EDGE - part * (_HEIGHT - 2 * _EDGE)

    def across(place: float) -> float:
        return _EDGE + place * (_WIDTH - 2 * _EDGE)

    dots = [
        f'<circle cx="{across(places[trial["settings"][axis.name]]):.1f}" cy="{height(trial[metric]):.1f}" r="4" '
        f'fill="#36c" fill-opacity=".6"><title>trial {trial["trial"]}: {trial[metric]:.5g}</title></circle>'
        for trial in trials
    ]
    labels = [_label(across(place), _HEIGHT - 20, text) for place, text in marks]
    labels += [_label(4, height(value), f"{value:.4g}", "start") for value in {low, high}]
    return _svg([*dots, *labels, _label(_WIDTH / 2, 20, f"{metric} against {axis.name}")])


def _parallel(trials: list[dict[str, Any]], axes: Sequence[Axis], metric: str, goal: str) -> str:
    """Parallel coordinates: a line for each trial over all axes to its metric; better ones are darker."""
    columns = [(axis.name, *_places(axis, trials)) for axis in axes]
    values = [trial[metric] for trial in trials]
    low, high = min(values), max(values)
    gap = (_WIDTH - 2 * _EDGE) / len(columns)

    def height(place: float) -> float:
        return _HEIGHT - _EDGE - place * (_HEIGHT - 2 * _EDGE)

    parts = []
    for trial in reversed(trials):
        last = (trial[metric] - low) / (high - low) if high > low else 0.5
        good = last if goal == "max" else 1 - last
        heights = [places[trial["settings"][name]] for name, places, _ in columns] + [last]
        points = " ".join(f"{_EDGE + gap * number:.1f},{height(place):.1f}" for number, place in enumerate(heights))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="#36c" stroke-width="1.5" '
            f'stroke-opacity="{0.1 + 0.9 * good * good:.2f}"><title>trial {trial["trial"]}</title></polyline>'
        )
    for number, name in enumerate([*(name for name, *_ in columns), metric]):
        x = _EDGE + gap * number
        parts.append(f'<line x1="{x}" y1="{_EDGE}" x2="{x}" y2="{_HEIGHT - _EDGE}" stroke="#888"/>')
        parts.append(_label(x, 24, name))
    for number, (_, _, marks) in enumerate(columns):
        parts += [_label(_EDGE + gap * number + 4, height(place), text, "start") for place, text in marks]
    parts += [_label(_EDGE + gap * len(columns) + 4, height(part), f"{value:.4g}", "start") for part, value in
              ((0.0, low), (1.0, high))]  # fmt: skip
    return _svg(parts)


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str]) -> str:
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
