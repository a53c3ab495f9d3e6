"""Verdict: whether a plan's run is the serial run, what was compared, and what was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from shardwise.errors import UserError

Outcome = Literal["proved", "refuted", "not comparable", "inexact"]
OUTCOMES = ("proved", "refuted", "not comparable", "inexact")

_SHOWN_WORST = 4
_SHOWN_FAILED = 8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One tensor (or number) of the candidate against the float64 serial run.

    Attributes:
        kind: `loss`, `gradient` (step 1, unclipped), `applied gradient` (step 1, as the optimizer got it), `last gradient`
            (last step, unclipped), `gradient norm`, `parameter`, `buffer`, `optimizer state` or `option` (learning rates and
            the like), the last four after the last step.
        name: the user's own name of the tensor; `step 2` for a loss.
        distance: 2-norm of candidate minus float64 reference.
        serial_distance: the largest such distance of the float32 serial runs.
        allowance: the largest distance that counts as rounding.
        size: 2-norm of the reference.
        rank: the rank whose value this is, where ranks hold different ones.
    """

    kind: str
    name: str
    distance: float
    serial_distance: float
    allowance: float
    size: float
    rank: int = 0

    @property
    def passed(self) -> bool:
        """False also for a distance that is no number."""
        return self.distance <= self.allowance

    @property
    def excess(self) -> float:
        """Distance over allowance: above 1 is more than rounding."""
        if self.passed:
            return self.distance / self.allowance if self.allowance else 0.0
        return self.distance / self.allowance if self.allowance and self.distance == self.distance else float("inf")

    def __str__(self) -> str:
        relative = f", {self.distance / self.size:.1e} of its size" if self.size else ""
        return (
            f"{self.kind} {self.name}: off by {self.distance:.2e}{relative}; "
            f"serial float32 {self.serial_distance:.2e}, allowed {self.allowance:.2e}"
        )


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A check that the proof could have failed: that something was trained, and that the plan's axes were in use."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong, as far as it could be told.

    Attributes:
        pattern: a short name, such as `missing reduction` or `scaled gradients`; stable, for programs.
        message: one sentence or two for people.
        parameters: names of the tensors concerned.
        axes: axes of the layout that bring it about; empty where none does.
        factor: where something is off by a constant factor.
    """

    pattern: str
    message: str
    parameters: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a proof.

    Attributes:
        outcome: `proved`, `refuted`, `not comparable` for a plan or job that cannot equal a serial run, or `inexact` for a plan
            with an inexact saver that is proved without it; then the comparisons are those of the plan with it, and no
            distance refutes.
        job: the job's name.
        plan: the plan in text form.
        layout: its layout in text form.
        workers: ranks of the candidate.
        steps: optimizer steps compared.
        samples: samples of each of these steps.
        compared: kind of comparison -> how many were made.
        worst: the comparison of each kind that came closest to its allowance or lies furthest beyond it.
        failed: comparisons beyond their allowance, furthest first, at most 50.
        failed_count: how many there are in all.
        multiple: how often the distance of serial float32 a tensor may be away.
        serial_runs: float32 serial runs that measured the rounding.
        findings: what is wrong.
        guards: checks against proving nothing.
        not_covered: what this verdict says nothing about, one sentence each.
        notes: what happened on the way.
        seconds: how long the proof took.
    """

    outcome: Outcome
    job: str
    plan: str
    layout: str
    workers: int
    steps: int
    samples: tuple[int, ...]
    compared: Mapping[str, int]
    worst: tuple[Comparison, ...]
    failed: tuple[Comparison, ...]
    failed_count: int
    multiple: float
    serial_runs: int
    findings: tuple[Finding, ...]
    guards: tuple[Guard, ...]
    not_covered: tuple[str, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise UserError(f"verdict outcome={self.outcome!r}: it must be one of {', '.join(OUTCOMES)}")

    @property
    def proved(self) -> bool:
        return self.outcome == "proved"

    @property
    def closest(self) -> Comparison | None:
        """The comparison with the largest excess of all."""
        return max(self.worst, key=lambda item: item.excess, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        record: dict[str, Any] = _listed(asdict(self))
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Verdict:
        """A verdict from plain data.

        Raises:
            UserError: it is something else.
        """
        try:
            values = dict(record)
            for name in ("worst", "failed"):
                values[name] = tuple(_read(Comparison, _numbers(item)) for item in values[name])
            values["findings"] = tuple(_read(Finding, item) for item in values["findings"])
            values["guards"] = tuple(_read(Guard, item) for item in values["guards"])
            return _read(cls, values)
        except (KeyError, TypeError) as error:
            raise UserError(f"this is no verdict ({error}): read what `shardwise prove --json` wrote") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """A verdict from its JSON text.

        Raises:
            UserError: it is something else.
        """
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"this is no verdict ({error}): read what `shardwise prove --json` wrote") from error
        return cls.from_dict(record)

    def __str__(self) -> str:
        lines = [f"{self.outcome.upper()}  {self.job}  plan {self.plan}"]
        samples = f"batches of {', '.join(map(str, self.samples))} samples" if self.samples else "no batch"
        lines.append(f"  {self.steps} steps over {samples}, {self.workers} workers, {self.seconds:.1f} s")
        for finding in self.findings:
            lines.append(f"  {'distance' if finding.pattern == 'inexact' else 'culprit'}: {finding.message}")
        lines += [f"  guard failed: {guard.text}" for guard in self.guards if not guard.passed]
        if self.outcome == "inexact":
            lines.append("  furthest from a float64 serial run, of each kind:")
            lines += [f"    {item}" for item in self.worst]
        elif self.failed:
            shown = self.failed[:_SHOWN_FAILED]
            lines.append(f"  {self.failed_count} of {sum(self.compared.values())} comparisons are beyond rounding:")
            lines += [f"    {item}" for item in shown]
        elif self.worst:
            counts = ", ".join(_counted(count, kind) for kind, count in self.compared.items())
            lines.append(f"  compared with a float64 serial run: {counts}")
            lines.append(
                f"  allowed: {self.multiple:g} x the distance of serial float32 ({self.serial_runs} runs); nearest to it:"
            )
            nearest = sorted(self.worst, key=lambda item: -item.excess)[:_SHOWN_WORST]
            lines += [f"    {item}" for item in nearest]
        lines += [f"  checked: {guard.text}" for guard in self.guards if guard.passed]
        lines += [f"  not covered: {text}" for text in self.not_covered]
        lines += [f"  note: {text}" for text in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One layout of a `Matrix`.

    Attributes:
        layout: in text form.
        result: an outcome of a verdict, or `refused` for a plan that cannot run, or `failed` where a worker failed.
        reason: why it was refused, what failed or what is wrong; empty where it was proved.
        verdict: None where it was refused or failed.
    """

    layout: str
    result: str
    reason: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The verdicts of all layouts up to a number of workers."""

    job: str
    workers: int
    cells: tuple[Cell, ...]
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Every layout was proved or refused before it started, and at least one with several workers was proved."""
        results = {cell.result for cell in self.cells}
        split = any(cell.result == "proved" and cell.layout != "serial" for cell in self.cells)
        return results <= {"proved", "refused"} and (split or self.workers == 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        record: dict[str, Any] = _listed(asdict(self))
        return record

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for cell in self.cells:
            counts[cell.result] = counts.get(cell.result, 0) + 1
        totals = ", ".join(f"{count} {result}" for result, count in counts.items())
        lines = [
            f"{self.job}: {len(self.cells)} layouts of up to {self.workers} workers: {totals} ({self.seconds:.1f} s)"
        ]
        width = max((len(cell.layout) for cell in self.cells), default=0)
        for cell in self.cells:
            detail = cell.reason
            if cell.verdict is not None and cell.verdict.proved and cell.verdict.closest is not None:
                closest = cell.verdict.closest
                detail = f"nearest to the limit: {closest.kind} {closest.name} at {closest.excess:.2f} of its allowance"
            lines.append(f"  {cell.layout:<{width}}  {cell.result.upper():<14}  {detail}".rstrip())
        return "\n".join(lines)


_T = TypeVar("_T")


def _read(kind: type[_T], record: Any) -> _T:
    """A dataclass from plain data, lists as tuples."""
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    unknown = set(record) - names
    if unknown:
        raise KeyError(f"unknown entry {sorted(unknown)[0]!r}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no word for a number that is none: it comes back as null."""
    return {key: float("nan") if value is None else value for key, value in record.items()}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return value


def _counted(count: int, kind: str) -> str:
    plural = "" if count == 1 else "es" if kind.endswith("s") else "s"
    return f"{count} {kind}{plural}"
