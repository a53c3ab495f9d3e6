"""The charts of a report as SVG, drawn by matplotlib: text stays text, and nothing is loaded from elsewhere."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

from shardwise.bench.result import PART_NAMES, PARTS, Bar, Bench, Case, Scaling

# Okabe and Ito's colours, which people with colour blindness can tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = {
    "forward": "#0072B2",
    "backward": "#56B4E9",
    "optimizer": "#009E73",
    "other": "#999999",
    "data": "#E69F00",
    "waiting": "#CC79A7",
    "communication": "#D55E00",
    "bubble": "#F0E442",
}
HATCHES = {"data": "//", "waiting": "xx", "communication": "\\\\", "bubble": ".."}
"""Parts in which a rank does no work of its own carry a pattern as well."""

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {  # matplotlib's type names every setting there is
    "svg.fonttype": "none",
    "svg.hashsalt": "shardwise",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.6,
}
_LEGEND_SIZE = 8
_PHASE_PART = {"synchronisation": "other"}


def drawn(draw: Callable[[Figure], None], *, width: float = 5.4, height: float = 3.6, label: str) -> str:
    """One chart as an SVG element that scales with the page.

    Args:
        draw: fills the figure.
        label: what a screen reader says instead of the picture.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    opening = svg[: svg.index(">") + 1]
    view = re.search(r'viewBox="([^"]+)"', opening)
    assert view is not None
    # Ids of one chart must not be those of another on the same page.
    prefix = f"c{hashlib.blake2b(label.encode(), digest_size=4).hexdigest()}-"
    body = re.sub(r'(id="|href="#|url\(#)', lambda match: match[1] + prefix, svg[len(opening) :])
    name = label.replace("&", "and").replace('"', "'").replace("<", "").replace(">", "")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view[1]}" role="img" '
        f'aria-label="{name}" preserveAspectRatio="xMidYMid meet">{body}'
    )


def speed_chart(bench: Bench, scaling: Scaling, *, times: bool) -> Callable[[Figure], None]:
    """Over the cores or accelerators used, with the spread of the rounds.

    Args:
        times: how many times as fast as one of them; else the fraction of a perfect speed-up.
    """
    shown = [
        case for case in bench.cases if case.efficiency is not None and (case.scaling == scaling or case.workers == 1)
    ]
    used = "cores" if bench.device == "cpu" else "accelerators"

    def value(case: Case, part: float) -> float:
        return part * (case.units if times else 100)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        most = max(case.units for case in shown)
        axes.plot([1, most], [1, most] if times else [100, 100], color="#555555", linestyle=":", label="perfect")
        for points in _curves(shown, bench.one_unit):
            xs = [case.units for case in points]
            colour = LINES[shown.index(points[-1]) % len(LINES)]
            axes.plot(xs, [value(case, _median(case)) for case in points], color=colour, linewidth=1, zorder=1)
        seen: dict[int, int] = {}
        for number, case in enumerate(shown):
            assert case.efficiency is not None
            # Cases on the same number of cores stand side by side.
            place = case.units + 0.05 * seen.get(case.units, 0) * max(1.0, most / 4)
            seen[case.units] = seen.get(case.units, 0) + 1
            middle = value(case, case.efficiency.median)
            spread = [[middle - value(case, case.efficiency.low)], [value(case, case.efficiency.high) - middle]]
            look: dict[str, Any] = {"fmt": "osD^vP*X"[number % 8], "color": LINES[number % len(LINES)], "capsize": 4}
            axes.errorbar([place], [middle], yerr=spread, label=case.name, **look)
        title, unit = ("Speed-up", f"times one of the {used}") if times else ("Efficiency", "% of perfect")
        axes.set(xlabel=f"{used} used", ylabel=unit, title=title, ylim=(0, None))
        axes.set_xticks(sorted({case.units for case in shown}))
        axes.margins(x=0.15)
        _legend(figure, axes)

    return draw


def _median(case: Case) -> float:
    return case.efficiency.median if case.efficiency is not None else 0.0


def _curves(shown: Sequence[Case], one_unit: str) -> Iterator[list[Case]]:
    """Plans that differ only in degrees lie on one curve, which begins at one unit."""
    first = [case for case in shown if case.name == one_unit]
    for family in dict.fromkeys(_family(case) for case in shown if case.workers > 1):
        yield first + sorted((case for case in shown if _family(case) == family), key=lambda case: case.units)


def _family(case: Case) -> str:
    """The axes of a layout without their degrees: plans of one family lie on one curve."""
    return re.sub(r"=\d+", "", case.layout_name)


def split_chart(cases: Sequence[Case]) -> Callable[[Figure], None]:
    """Stacked time of a step, one bar a rank."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = [(case, rank) for case in cases for rank in case.ranks]
        names = [f"{case.name}\nrank {rank.rank}" if case.workers > 1 else case.name for case, rank in rows]
        left = [0.0] * len(rows)
        for part in PARTS:
            widths = [rank.seconds[part] * 1000 for _, rank in rows]
            if max(widths) <= 0.002 * max(sum(rank.seconds.values()) * 1000 for _, rank in rows):
                continue
            look: dict[str, Any] = {"color": COLOURS[part], "hatch": HATCHES.get(part), "label": PART_NAMES[part]}
            axes.barh(range(len(rows)), widths, left=left, height=0.7, edgecolor="white", linewidth=0.4, **look)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel="milliseconds of a step, mean")
        axes.grid(False, axis="y")
        _legend(figure, axes)

    return draw


def timeline_chart(case: Case) -> Callable[[Figure], None]:
    """Some steps of every rank on one clock: its phases above, what is under way and waited for below."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        told: set[str] = set()
        for rank in range(case.workers):
            own = [bar for bar in case.timeline if bar.rank == rank]
            lanes = {"work": rank + 0.30, "flight": rank + 0.66}
            for bar in own:
                if bar.lane == "wait":
                    continue
                part = _PHASE_PART.get(bar.name, bar.name) if bar.lane == "work" else "communication"
                _box(
                    axes,
                    bar,
                    lanes[bar.lane],
                    0.4 if bar.lane == "work" else 0.16,
                    part,
                    _once(told, PART_NAMES[part] if bar.lane == "work" else "communication under way"),
                )
            for bar in own:
                if bar.lane == "wait":
                    part = "bubble" if bar.name == "message" else "waiting"
                    name = "pipeline bubble" if part == "bubble" else "standing still for others"
                    _box(axes, bar, lanes["work"], 0.4, part, _once(told, name))
        axes.set_yticks([rank + 0.4 for rank in range(case.workers)], [f"rank {rank}" for rank in range(case.workers)])
        axes.set_ylim(case.workers, 0)
        axes.set(xlabel="milliseconds")
        axes.grid(False, axis="y")
        _legend(figure, axes)

    return draw


def _box(axes: Any, bar: Bar, middle: float, height: float, part: str, label: str) -> None:
    axes.barh(
        [middle], [(bar.ended - bar.began) * 1000], left=[bar.began * 1000], height=height, color=COLOURS[part],
        hatch=HATCHES.get(part) if height > 0.2 else None, label=label, edgecolor="white", linewidth=0.3,
    )  # fmt: skip


def _once(told: set[str], name: str) -> str:
    """A name for the legend the first time, and none afterwards."""
    if name in told:
        return "_"
    told.add(name)
    return name


def loss_chart(cases: Sequence[Case], *, against: Literal["time", "samples"]) -> Callable[[Figure], None]:
    """The loss of every step, one line a plan."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, case in enumerate(cases):
            if case.course is not None:
                look: dict[str, Any] = {"color": LINES[number % len(LINES)], "linestyle": STYLES[number % len(STYLES)]}
                places = case.course.seconds if against == "time" else case.course.samples
                axes.plot(places, case.course.losses, label=case.name, linewidth=1.4, **look)
        label = "seconds in steps" if against == "time" else "samples seen"
        axes.set(xlabel=label, ylabel="training loss", title=f"Loss against {against}")
        axes.ticklabel_format(axis="x", style="plain")
        axes.tick_params(axis="x", labelrotation=30)
        _legend(figure, axes)

    return draw


def _legend(figure: Figure, axes: Any) -> None:
    """All names under the chart, in as many columns as fit beside each other."""
    handles, labels = axes.get_legend_handles_labels()
    # Of the browser's font only the size is known: a character counts as 0.6 of it, line and gaps as 0.6 inches.
    widest = 0.6 * _LEGEND_SIZE / 72 * max(map(len, labels), default=1) + 0.6
    columns = min(3, max(1, int(figure.get_figwidth() / widest)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 1.3 * _LEGEND_SIZE / 72 * max(0, rows - 3))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=_LEGEND_SIZE, frameon=False)
