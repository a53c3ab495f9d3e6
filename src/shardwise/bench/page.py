"""The report as one HTML file: no script, nothing from the network, a table beside every chart."""

from __future__ import annotations

import statistics
import time
from importlib.resources import files
from typing import Any

import jinja2

from shardwise.bench import charts, text
from shardwise.bench.result import PART_NAMES, PARTS, Bench, Case, Scaling
from shardwise.bench.why import queue_share, start_up_note
from shardwise.units import format_bytes, format_rate, format_seconds


def make_page(bench: Bench) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (files("shardwise.bench") / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(**_values(bench))


def _values(bench: Bench) -> dict[str, Any]:
    measured = [case for case in bench.cases if case.measured]
    strong = [case for case in measured if case.scaling == "strong"]
    baseline = bench.case(bench.baseline)
    return {
        "bench": bench,
        "title": f"{bench.job}: what the parallelism bought",
        "answer": text.heading(bench),
        "how": text.how_measured(bench),
        "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(bench.began)),
        "took": format_seconds(bench.seconds),
        "columns": text.COLUMNS,
        "groups": [group for group in (_group(bench, "strong"), _group(bench, "weak")) if group],
        "missing": [case for case in bench.cases if not case.measured],
        "targets": text.target_lines(bench) if bench.target is not None else [],
        "why": [_why(case, baseline) for case in measured],
        "split": _split(measured),
        "timelines": [_timeline(case) for case in strong if case.timeline and case.workers > 1],
        "loss": _loss(strong),
        "metrics": _metrics(bench),
        "resources": [_resources(case) for case in measured],
        "has_prediction": any(case.predicted_step_seconds is not None for case in measured),
        "has_cost": any(case.cost_per_epoch is not None for case in measured),
    }


def _group(bench: Bench, scaling: Scaling) -> dict[str, Any] | None:
    cases = [case for case in bench.cases if case.measured and case.scaling == scaling]
    if not cases:
        return None
    told = "; ".join(f"{case.name}: {text.times_text(case.speedup)}" for case in cases if case.speedup is not None)
    efficiency = "; ".join(f"{case.name}: {text.percent_text(case.efficiency)}" for case in cases)
    title = text.STRONG if scaling == "strong" else text.WEAK
    label = f"{title}. Speed-up over one worker by plan. {told}"
    return {
        "title": title[0].upper() + title[1:],
        "charts": [
            charts.drawn(charts.speed_chart(bench, scaling, times=True), label=label, height=4.0),
            charts.drawn(
                charts.speed_chart(bench, scaling, times=False), label=f"Efficiency. {efficiency}", height=4.0
            ),
        ],
        "rows": [text.row(case) for case in cases],
    }


def _why(case: Case, baseline: Case | None) -> dict[str, Any]:
    return {
        "name": case.name,
        "findings": [(f"{finding.share:.0%}", finding.message, finding.advice) for finding in case.findings],
        "note": start_up_note(case, baseline) if baseline is not None else "",
    }


def _split(measured: list[Case]) -> dict[str, Any]:
    ranks = [(case, rank) for case in measured for rank in case.ranks]
    shown = [part for part in PARTS if any(rank.seconds[part] > 0 for _, rank in ranks)]
    rows = []
    for case, rank in ranks:
        total = sum(rank.seconds.values())
        cells = [f"{rank.seconds[part] * 1000:.2f} ({rank.seconds[part] / total:.0%})" for part in shown]
        rows.append((f"{case.name}, rank {rank.rank}", f"{total * 1000:.2f}", *cells))
    label = "Milliseconds of a step by part, one bar a rank; the table below has the same numbers"
    return {
        "chart": charts.drawn(charts.split_chart(measured), label=label, height=1.6 + 0.42 * len(rows)),
        "columns": ("rank", "step, ms", *(PART_NAMES[part] for part in shown)),
        "rows": rows,
    }


def _timeline(case: Case) -> dict[str, Any]:
    waits = [bar for bar in case.timeline if bar.lane == "wait"]
    flights = [bar for bar in case.timeline if bar.lane == "flight"]
    span = max(bar.ended for bar in case.timeline)
    under_way = sum(bar.ended - bar.began for bar in flights)
    still = sum(bar.ended - bar.began for bar in waits)
    hidden = f"; {1 - still / under_way:.0%} of it is hidden behind work" if under_way > 0 else ""
    each, waited = format_seconds(under_way / case.workers), format_seconds(still / case.workers)
    summary = (
        f"{case.name}: {format_seconds(span)} of all ranks on one clock, {len(flights)} messages; communication is under way "
        f"for {each} a rank, of which {waited} is waited for{hidden}."
    )
    chart = charts.drawn(
        charts.timeline_chart(case), label=f"Timeline of some steps. {summary}", height=1.5 + 0.75 * case.workers
    )
    return {"name": case.name, "summary": summary, "chart": chart}


def _loss(strong: list[Case]) -> dict[str, Any] | None:
    shown = [case for case in strong if case.course is not None and case.course.losses]
    if not shown:
        return None
    rows = []
    for case in shown:
        course = case.course
        assert course is not None
        tail = statistics.fmean(course.losses[-max(1, len(course.losses) // 10) :])
        rows.append(
            (
                case.name,
                f"{course.losses[0]:.4f}",
                f"{tail:.4f}",
                f"{course.seconds[-1]:.2f}",
                f"{course.samples[-1]:,}",
            )
        )
    label = "Training loss against {}, one line a plan; the table below has the ends of the lines"
    return {
        "charts": [
            charts.drawn(charts.loss_chart(shown, against="time"), label=label.format("seconds"), height=4.2),
            charts.drawn(charts.loss_chart(shown, against="samples"), label=label.format("samples seen"), height=4.2),
        ],
        "columns": ("plan", "first loss", "mean of the last tenth", "seconds in steps", "samples seen"),
        "rows": rows,
    }


def _metrics(bench: Bench) -> list[tuple[str, ...]]:
    return [
        (
            case.name,
            metric.name,
            f"{metric.value:.5g}",
            "" if metric.verdict == "baseline" else f"{metric.difference:+.2g}",
            "unknown" if metric.noise is None else f"{metric.noise:.2g}",
            text.VERDICTS[metric.verdict],
        )
        for case in bench.cases
        for metric in case.metrics
    ]


def _resources(case: Case) -> dict[str, str]:
    step = case.step_seconds
    assert step is not None
    predicted = case.predicted_step_seconds
    return {
        "name": case.name,
        "memory": ", ".join(format_bytes(rank.peak_memory_bytes) for rank in case.ranks),
        "traffic": format_bytes(case.traffic_bytes) if case.traffic_bytes else "none",
        "use": f"{case.core_use:.0%}" if case.core_use is not None else "not measured",
        "queue": f"{queue_share(case):.0%}" if case.core_use is not None else "not measured",
        "flops": format_rate(case.flops_per_second, "FLOP/s") if case.flops_per_second is not None else "not known",
        "mfu": f"{case.mfu:.0%}" if case.mfu is not None else "not known",
        "predicted": f"{format_seconds(predicted)} ({predicted / step.median - 1:+.0%})"
        if predicted is not None
        else "none",
        "cost": f"{case.cost_per_epoch:.4g}" if case.cost_per_epoch is not None else "",
        "start": text.seconds_text(case.start_seconds),
    }
