"""The terminal view: one run in full, or all runs of a folder side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from shardwise.monitor.notes import Note
from shardwise.monitor.state import RunState, differing_settings
from shardwise.spec.observations import PHASES
from shardwise.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"running": "green", "finished": "bold", "stalled": "bold red", "failed": "bold red", "silent": "yellow"}
_SHORT = {"forward": "fwd", "backward": "bwd", "synchronisation": "sync", "optimizer": "opt"}
_SHOWN_NOTES = 12
_SHOWN_RANKS = 32


def render(states: Sequence[RunState], now: float | None = None) -> RenderableType:
    """What a terminal shows of these runs, the most interesting first."""
    from rich.console import Group
    from rich.text import Text

    if not states:
        return Text("no runs yet: a run appears here when `shardwise train` has made its folder")
    now = time.time() if now is None else now
    parts: list[RenderableType] = []
    if len(states) > 1:
        parts.append(comparison(states, now))
    parts.extend(_one(states[0], now))
    return Group(*parts)


def comparison(states: Sequence[RunState], now: float) -> RenderableType:
    """All runs side by side, and under them the settings in which they differ."""
    from rich.console import Group
    from rich.text import Text

    table = _table("runs", ["run", "status", "plan", "step", "loss", "test", "samples/s", "step time"])
    lines = []
    different = differing_settings(list(states))
    for index, state in enumerate(states):
        settings = ", ".join(
            f"{name}={values[index]}" for name, values in different.items() if values[index] is not None
        )
        status = state.status(now)
        table.add_row(
            Text(state.path),
            f"[{_STYLES.get(status, 'none')}]{status}[/]",
            Text(str(state.plan.get("layout", ""))),
            _progress(state).replace(" (", "\n(").replace(" trials", "\ntrials"),
            _number(state.loss),
            Text("\n".join(f"{name} {value:.4f}" for name, value in state.metrics.items())),
            _rate(state.samples_per_second),
            _seconds(state.step_seconds),
        )
        if settings:
            lines.append(Text(f"{state.path}: {settings}"))
    for column in table.columns:  # where it is too wide, names are folded, and no number is
        column.no_wrap = column.header not in ("run", "test")
        column.min_width = (
            max(map(len, " ".join(map(str, column.cells)).split()), default=0) if column.header == "test" else None
        )
    return Group(table, *([Text("where they differ"), *lines, Text("")] if lines else []))


def headline(state: RunState, now: float) -> list[str]:
    """The state of a run in a few plain lines."""
    status = state.status(now)
    silent = (
        f", last news {format_seconds(now - state.last)} ago" if state.last is not None and status == "silent" else ""
    )
    left = state.left_seconds if status == "running" else None  # a run that stands still is not nearing its end
    if state.sweep is not None:
        return _of_sweep(state, f"{state.path}: {status}{silent}")
    lines = [
        f"{state.path}: {status}{silent}",
        f"{state.name}  plan {state.plan.get('layout', '?')}, {state.ranks} {'rank' if state.ranks == 1 else 'ranks'} on "
        f"{state.device or '?'} ({state.host})",
        f"step {_progress(state)}  epoch {state.epoch + (not state.end)}"
        + (f"  {format_seconds(left)} left" if left is not None else ""),
    ]
    numbers = [f"loss {_number(state.loss)} {sparkline([point[1] for point in state.losses.points()])}".rstrip()]
    numbers += [f"loss {name} {_number(value)}" for name, value in state.objectives.items()]
    numbers += [f"test {name} {value:.4f}" for name, value in state.metrics.items()]
    if state.gradient_norm is not None:
        numbers.append(f"gradient norm {state.gradient_norm:.4g}")
    if state.learning_rates:
        numbers.append("learning rate " + ", ".join(f"{rate:.4g}" for rate in dict.fromkeys(state.learning_rates)))
    lines.append("  ".join(numbers))
    speed = f"{_rate(state.samples_per_second)} samples/s  step {_seconds(state.step_seconds)}"
    if state.predicted_seconds:
        speed += f" (predicted {format_seconds(state.predicted_seconds)}"
        if state.step_seconds:
            speed += f", measured is {state.step_seconds / state.predicted_seconds:.2f} of it"
        speed += ")"
    lines.append(speed)
    if state.stall is not None:
        lines.append(
            f"STALLED for {format_seconds(now - state.stall.t + state.stall.waited_seconds)}: {state.stall.message}"
        )
    if state.straggler is not None:
        lines.append(f"STRAGGLER: {state.straggler.message}")
    if state.message:
        lines.append(f"FAILED: {state.message}")
    if state.error:
        lines.append(f"UNREADABLE: {state.error}")
    if state.malformed:
        lines.append(f"{state.malformed} events could not be understood and were left out")
    return lines


def _of_sweep(state: RunState, first: str) -> list[str]:
    sweep = state.sweep
    assert sweep is not None
    left = state.left_seconds
    lines = [
        first,
        f"{state.name}  each training {state.plan.get('layout', '?')}, {state.ranks} "
        f"{'core' if state.ranks == 1 else 'cores'} for all of them ({state.host})",
        f"{_progress(state)}, {sweep.failed} failed"
        + ("" if state.end else f", {sweep.running} trainings running")
        + (f"  {format_seconds(left)} left" if left is not None else ""),
    ]
    if sweep.best is not None:
        setting = " ".join(f"{name}={text}" for name, text in sweep.best_setting.items())
        lines.append(f"best so far: trial {sweep.best}  {sweep.metric} {_number(sweep.best_value)}  {setting}")
    return lines + [f"FAILED: {state.message}"] * bool(state.message)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a row of bars, each the mean of its stretch."""
    if len(values) < 2:
        return ""
    width = min(width, len(values))
    bounds = [len(values) * place // width for place in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((value - low) / span * len(_BARS)))] for value in means)


def note_line(note: Note, name: str = "") -> str:
    """An event as one line with its time of day."""
    where = f"{name}  " if name else ""
    text = note.text if note.text.startswith(note.kind) else f"{note.kind}: {note.text}"
    return f"{time.strftime('%H:%M:%S', time.localtime(note.t))}  {where}{text}"


def _one(state: RunState, now: float) -> list[RenderableType]:
    from rich.panel import Panel
    from rich.text import Text

    lines = Text("\n".join(headline(state, now)))
    grave = state.status(now) in ("stalled", "failed")
    parts: list[RenderableType] = [Panel(lines, border_style="red" if grave else "none", title=Text(state.path))]
    rows = state.rank_rows()
    if rows:
        parts.append(ranks_table(rows))
    if state.experts is not None:
        table = _table("tokens of each expert", ["layer", "load", "dropped"])
        for name, tokens in state.experts.tokens.items():
            table.add_row(Text(name), " ".join(map(str, tokens)), str(state.experts.dropped.get(name, 0)))
        parts.append(table)
    notes = list(state.notes)[-_SHOWN_NOTES:]
    parts.append(Text("\n".join(note_line(note) for note in notes)))
    return parts


def ranks_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds of a step by phase, a row a rank; of many ranks those that arrive last."""
    columns = ["rank", *(_SHORT.get(phase, phase) for phase in PHASES), "late", "samples", "cpu", "no core", "memory"]
    shown = sorted(rows, key=lambda row: -row["late_ms"])[:_SHOWN_RANKS] if len(rows) > _SHOWN_RANKS else rows
    title = "a step of each rank" if shown is rows else f"a step of the {len(shown)} latest of {len(rows)} ranks"
    title += ", in ms (sync: waiting in collectives; late: arrival at the first one)"
    table = _table(title, columns)
    for row in shown:
        table.add_row(
            str(row["rank"]),
            *(_ms(row["phase_ms"][phase]) for phase in PHASES),
            _ms(row["late_ms"]),
            f"{row['samples']:.4g}",
            f"{row['cpu']:.0%}",
            f"{row['core_wait']:.0%}",
            format_bytes(row["memory_bytes"]),
        )
    for column in table.columns:  # where it is too wide, headings are folded, and no number is
        column.min_width = max(map(len, map(str, column.cells)))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, box=box.SIMPLE, title_justify="left", title_style="", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _progress(state: RunState) -> str:
    if state.sweep is not None:
        return f"{state.sweep.ended:,} of {state.sweep.trials:,} trials"
    if not state.total_steps:
        return f"{state.step:,}"
    return f"{state.step:,}/{state.total_steps:,} ({state.step / state.total_steps:.0%})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)
