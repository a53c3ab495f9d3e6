"""A result as text for the terminal: the table, what each plan loses and why, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.bench.result import PART_NAMES, PARTS, Bench, Case, Spread
from shardwise.bench.why import queue_share, start_up_note
from shardwise.units import format_bytes, format_rate, format_seconds

COLUMNS = ("plan", "step", "speed-up", "efficiency", "in all", "speed-up in all", "samples/s")


def result_lines(bench: Bench) -> list[str]:
    """Everything a reader needs, most important first."""
    warnings = [f"  warning: {sentence}" for sentence in bench.warnings]
    lines = [heading(bench), *warnings, *(f"  {line}" for line in how_measured(bench)), ""]
    for scaling, title in (("strong", STRONG), ("weak", WEAK)):
        shown = [case for case in bench.cases if case.scaling == scaling]
        if any(case.measured for case in shown):
            lines += [title, *table([COLUMNS, *(row(case) for case in shown if case.measured)]), ""]
    missing = [f"{case.name}: {case.outcome}: {case.reason}" for case in bench.cases if not case.measured]
    lines += [*missing, *([""] if missing else [])]
    if bench.target is not None:
        lines += [f"time until {bench.target}", *(f"  {line}" for line in target_lines(bench)), ""]
    lines += ["where the time of a step goes"]
    for case in bench.cases:
        lines += [f"  {line}" for line in split_lines(case)]
    lines += ["", "why"]
    lines += [f"  {line}" for line in why_lines(bench)]
    if any(case.metrics for case in bench.cases):
        lines += ["", "final metrics", *(f"  {line}" for line in metric_lines(bench))]
    more = [line for case in bench.cases for line in more_lines(case)]
    if more:
        lines += ["", "resources", *(f"  {line}" for line in more)]
    if bench.remarks:
        lines += ["", *(f"remark: {remark}" for remark in bench.remarks)]
    return lines


STRONG = "strong scaling: the same global batch on every plan"
WEAK = "weak scaling: the job's batch for every worker; speed-ups are of samples per second"


def heading(bench: Bench) -> str:
    """One sentence: the answer."""
    baseline = bench.case(bench.baseline)
    measured = [case for case in bench.cases if case.measured and case.scaling == "strong" and case.workers > 1]
    assert baseline is not None and baseline.step_seconds is not None
    if not measured:
        return f"{bench.job}: one worker takes {format_seconds(baseline.step_seconds.median)} a step; no other plan was measured"
    sure = [case for case in measured if case.speedup is not None and case.speedup.low > 1]
    best = max(sure or measured, key=lambda case: case.speedup.median if case.speedup else 0.0)
    assert best.speedup is not None
    spread = f"{best.speedup.median:.2f} ({range_text(best.speedup)} over the rounds)"
    if sure:
        return f"{bench.job}: {best.layout_name} is {spread} times as fast as one worker"
    if best.speedup.high < 1:
        return f"{bench.job}: no plan beats one worker; the best, {best.layout_name}, reaches {spread} times its speed"
    return (
        f"{bench.job}: no plan is faster than one worker in every round; the best, {best.layout_name}, reaches {spread}"
    )


def how_measured(bench: Bench) -> list[str]:
    """What was run, and what the words mean."""
    steps = f"{bench.steps} steps" if bench.steps is not None else f"until {bench.target}"
    rounds = max((case.step_seconds.rounds for case in bench.cases if case.step_seconds is not None), default=0)
    unit = "one core" if bench.device == "cpu" else "one accelerator"
    return [
        f"{rounds} {'round' if rounds == 1 else 'rounds'} of every plan in turn, {steps} each, the first {bench.warm_up} left "
        f"out of step times; on {bench.machine.get('processor')}, {bench.machine.get('cores')} cores, {bench.device}",
        f"speed-up is over the fastest one-worker run, {bench.baseline}",
        f"efficiency is the speed-up over {unit}, {bench.one_unit}, divided by the {unit.removeprefix('one ')}s used",
        "in all: from the start of the command to its end, with start-up, evaluation and saving",
        *(["the bench was interrupted: not everything was measured"] if bench.interrupted else []),
    ]


def row(case: Case) -> tuple[str, ...]:
    """One line of the table."""
    assert case.step_seconds is not None
    return (
        case.name,
        seconds_text(case.step_seconds),
        times_text(case.speedup),
        percent_text(case.efficiency),
        seconds_text(case.total_seconds),
        times_text(case.total_speedup),
        f"{case.samples_per_second.median:,.0f}" if case.samples_per_second is not None else "-",
    )


def target_lines(bench: Bench) -> list[str]:
    """Time to the target, with start-up."""
    found = []
    for case in bench.cases:
        if case.measured:
            reached = seconds_text(case.target_seconds) if case.target_seconds is not None else "not reached"
            found.append(
                f"{case.name}: {reached}" + (f", {times_text(case.target_speedup)}" if case.target_speedup else "")
            )
    return found


def split_lines(case: Case) -> list[str]:
    """The parts of each rank's step, largest first."""
    found = []
    for rank in case.ranks:
        total = sum(rank.seconds.values())
        parts = sorted(((rank.seconds[part], part) for part in PARTS), reverse=True)
        text = ", ".join(
            f"{PART_NAMES[part]} {format_seconds(seconds)} ({seconds / total:.0%})"
            for seconds, part in parts
            if seconds >= 0.005 * total
        )
        found.append(f"{case.name}, rank {rank.rank}: {text}")
    return found


def why_lines(bench: Bench) -> list[str]:
    """The largest loss of every plan, and what would reduce it."""
    found = []
    baseline = bench.case(bench.baseline)
    for case in bench.cases:
        if not case.measured:
            continue
        if not case.findings:
            found.append(f"{case.name}: no loss worth telling")
        for number, finding in enumerate(case.findings[:3]):
            lead = f"{case.name}: " if number == 0 else "    also: "
            found.append(f"{lead}{finding.message} [{finding.share:.0%} of the step]")
            found.append(f"    to do: {finding.advice}")
        note = start_up_note(case, baseline) if baseline is not None else ""
        if note:
            found.append(f"    start-up: {note}")
    return found


VERDICTS = {
    "same": "no difference beyond the noise between seeds",
    "differs": "DIFFERS beyond the noise between seeds",
    "unknown": "one round: noise unknown",
    "baseline": "baseline",
}


def metric_lines(bench: Bench) -> list[str]:
    """Every plan's final metrics with a verdict."""
    found = []
    for case in bench.cases:
        for metric in case.metrics:
            noise = f", noise {metric.noise:.3g}" if metric.noise is not None else ""
            against = f" ({metric.difference:+.2g} to one worker{noise})" if metric.verdict != "baseline" else noise
            found.append(f"{case.name}: test {metric.name} {metric.value:.4g}{against}: {VERDICTS[metric.verdict]}")
    return found


def more_lines(case: Case) -> list[str]:
    """Memory, traffic, utilisation, prediction and cost of a case."""
    if not case.measured:
        return []
    peak = ", ".join(format_bytes(rank.peak_memory_bytes) for rank in case.ranks)
    parts = [f"memory {peak} at most by rank"]
    if case.traffic_bytes is not None and case.workers > 1:
        parts.append(f"{format_bytes(case.traffic_bytes)} sent a step and rank")
    if case.core_use is not None:
        line = queue_share(case)
        parts.append(
            f"{case.core_use:.0%} of the machine's cores busy with it, in line for a core {line:.0%} of the step"
        )
    if case.flops_per_second is not None:
        mfu = f" (MFU {case.mfu:.0%} of the measured peak)" if case.mfu is not None else ""
        parts.append(f"{format_rate(case.flops_per_second, 'FLOP/s')}{mfu}")
    if case.predicted_step_seconds is not None and case.step_seconds is not None:
        error = case.predicted_step_seconds / case.step_seconds.median - 1
        parts.append(f"predicted {format_seconds(case.predicted_step_seconds)} a step ({error:+.0%})")
    if case.cost_per_epoch is not None:
        parts.append(f"{case.cost_per_epoch:.4g} an epoch by the price given")
    return [f"{case.name}: {'; '.join(parts)}"]


def seconds_text(spread: Spread | None) -> str:
    """The median and how far the rounds lie apart."""
    if spread is None:
        return "-"
    half = max(spread.high - spread.median, spread.median - spread.low) / spread.median if spread.median else 0.0
    return f"{format_seconds(spread.median)} ±{half:.0%}"


def times_text(spread: Spread | None) -> str:
    """`1.52x (1.49-1.55)`."""
    return "-" if spread is None else f"{spread.median:.2f}x ({range_text(spread)})"


def percent_text(spread: Spread | None) -> str:
    """`76% (74-78)`."""
    return "-" if spread is None else f"{spread.median:.0%} ({spread.low * 100:.0f}-{spread.high * 100:.0f})"


def range_text(spread: Spread) -> str:
    """Lowest and highest."""
    return f"{spread.low:.2f}-{spread.high:.2f}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns lined up; the first to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    lines = []
    for line in rows:
        first, *others = zip(line, widths, strict=True)
        lines.append("  ".join([f"  {first[0].ljust(first[1])}", *(cell.rjust(width) for cell, width in others)]))
    return lines
