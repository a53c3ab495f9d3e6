"""Two stored results side by side: what became faster, what slower, and what only looks so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

from shardwise.bench.result import Bench, Case, Spread
from shardwise.bench.text import seconds_text, table, times_text

Verdict = Literal["faster", "slower", "no difference", "only in A", "only in B"]


@final
@dataclass(frozen=True, kw_only=True)
class Pair:
    """One plan in both results.

    Attributes:
        ratio: step time in A over that in B; above 1, B is faster.
        low, high: the smallest and the largest ratio that two rounds give.
        verdict: a difference counts where the rounds of A and B do not overlap.
    """

    name: str
    verdict: Verdict
    before: Spread | None = None
    after: Spread | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    speedup_before: Spread | None = None
    speedup_after: Spread | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result A beside result B.

    Attributes:
        differences: what else differs between the two, one sentence each.
    """

    job: str
    pairs: list[Pair]
    differences: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare(before: Bench, after: Bench) -> Comparison:
    """Compare result A with result B, plan by plan."""
    names = {case.name: None for bench in (before, after) for case in bench.cases if case.measured}
    pairs = [_pair(name, before.case(name), after.case(name)) for name in names]
    return Comparison(job=after.job, pairs=pairs, differences=_differences(before, after))


def _pair(name: str, before: Case | None, after: Case | None) -> Pair:
    first = before.step_seconds if before is not None else None
    second = after.step_seconds if after is not None else None
    if first is None or second is None:
        return Pair(name=name, verdict="only in B" if first is None else "only in A", before=first, after=second)
    assert before is not None and after is not None
    verdict: Verdict = "no difference"
    if second.high < first.low:
        verdict = "faster"
    elif second.low > first.high:
        verdict = "slower"
    return Pair(
        name=name,
        verdict=verdict,
        before=first,
        after=second,
        ratio=first.median / second.median,
        low=first.low / second.high,
        high=first.high / second.low,
        speedup_before=before.speedup,
        speedup_after=after.speedup,
    )


def _differences(before: Bench, after: Bench) -> list[str]:
    found = []
    if before.job != after.job:
        found.append(f"A measured the job {before.job}, B {after.job}: the numbers are of different trainings")
    for name in sorted({*before.settings, *after.settings} - {"seed"}):
        one, other = before.settings.get(name), after.settings.get(name)
        if one != other:
            found.append(f"{name} was {one} in A and is {other} in B")
    for name in sorted({*before.machine, *after.machine}):
        one, other = before.machine.get(name), after.machine.get(name)
        if one != other:
            found.append(f"the machine's {name} was {one} in A and is {other} in B")
    if min(before.rounds, after.rounds) < 2:
        found.append("a result of one round has no spread: every difference looks certain there, and none is")
    return found


def comparison_lines(comparison: Comparison) -> list[str]:
    """As text for the terminal."""
    rows: list[Sequence[str]] = [
        ("plan", "step in A", "step in B", "A over B", "B is", "speed-up in A", "speed-up in B")
    ]
    for pair in comparison.pairs:
        ratio = f"{pair.ratio:.2f} ({pair.low:.2f}-{pair.high:.2f})" if pair.ratio is not None else "-"
        rows.append(
            (
                pair.name,
                seconds_text(pair.before),
                seconds_text(pair.after),
                ratio,
                pair.verdict,
                times_text(pair.speedup_before),
                times_text(pair.speedup_after),
            )
        )
    return [
        f"{comparison.job}: result A beside result B; a difference counts where their rounds do not overlap",
        *table(rows),
        *(f"differs: {sentence}" for sentence in comparison.differences),
        *(["the two were measured at different times: only their speed-ups, measured in one run each, are free of what else"
           " the machine did"] if comparison.pairs else []),
    ]  # fmt: skip
