"""Bench: what was measured of a job under several plans, and what follows from it. Plain data, kept as `bench.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, final

from shardwise.errors import UserError

VERSION = 1
"""Version of the document; a reader refuses a higher one."""

FILE_NAME = "bench.json"

PARTS = ("forward", "backward", "data", "waiting", "communication", "bubble", "optimizer", "other")
"""What a step is made of, on one rank; the seconds of all parts add up to those of the step."""

PART_NAMES = {
    "forward": "forward pass",
    "backward": "backward pass",
    "data": "waiting for data",
    "waiting": "waiting for a slower rank",
    "communication": "exposed communication",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "other": "other",
}

Outcome = Literal["measured", "refused", "failed", "interrupted"]
Scaling = Literal["strong", "weak"]

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Spread:
    """One number over the rounds: the median, the lowest and the highest."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where nothing was measured."""
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values), len(values))


@final
@dataclass(frozen=True, kw_only=True)
class RankSplit:
    """Where the step of one rank went, as means over all steady steps of all rounds.

    Attributes:
        seconds: part of `PARTS` -> seconds of a step.
        late_seconds: how much later than the first rank it came to its first collective of a step.
        slowest: fraction of the steps in which it had the most work of its own.
        core_seconds: processor seconds a step, of all its threads.
        queue_seconds: seconds a step in which its first thread was ready and had no core; None where it is not known.
        peak_memory_bytes: most memory it held.
    """

    rank: int
    seconds: dict[str, float]
    late_seconds: float
    slowest: float
    core_seconds: float
    queue_seconds: float | None
    peak_memory_bytes: int


@final
@dataclass(frozen=True, kw_only=True)
class Bar:
    """One stretch of a rank's time in the step timeline, in seconds since the timeline began."""

    rank: int
    lane: Literal["work", "wait", "flight"]
    name: str
    began: float
    ended: float


@final
@dataclass(frozen=True, kw_only=True)
class Course:
    """The losses of one run: of each step, with the seconds since its first step and the samples seen."""

    losses: list[float]
    seconds: list[float]
    samples: list[int]


@final
@dataclass(frozen=True, kw_only=True)
class Metric:
    """A final metric under a plan, beside the one-worker run's of the same rounds.

    Attributes:
        value: median over the rounds.
        difference: median over the rounds of what it is more than the one-worker run's with the same seed.
        noise: how far the one-worker run's own values lie apart between the rounds, whose seeds differ.
        verdict: `same`, `differs`, or `unknown` with one round.
    """

    name: str
    value: float
    difference: float
    noise: float | None
    verdict: Literal["same", "differs", "unknown", "baseline"]


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """One loss: which part of the step, how much of it, what it says, and what would reduce it."""

    kind: str
    share: float
    message: str
    advice: str


@final
@dataclass(frozen=True, kw_only=True)
class Case:
    """One plan, measured or not.

    Attributes:
        name: the plan as text, unique in the document.
        plan: as `Plan.to_dict` gives it.
        units: cores (on CPU: workers times threads) or accelerators it uses.
        outcome: what came of it; `reason` says why it was not measured.
        scaling: `strong`: the job's own global batch. `weak`: the job's batch for every worker.
        step_seconds: seconds of a step in the steady state: wall time of the steady steps over their number.
        total_seconds: wall seconds of the whole command, as a stopwatch beside it shows them.
        start_seconds: of these, from the start of the command to the first step.
        target_seconds: of these, until the target metric was reached; None without one or where it was not.
        speedup: T1 over Tp in the steady state, round by round; with weak scaling of samples per second.
        total_speedup: the same with start-up, evaluation and saving included.
        efficiency: the speed-up over one unit, over the units.
        lost_seconds: part -> seconds of a step beyond a perfect division of the one-unit step.
        traffic_bytes: sent by one rank in a step, at most; from counted payloads by the formulas of the collectives.
        core_use: of the machine's cores, the fraction that was busy for this run; None on accelerators.
        flops_per_second, mfu: achieved, and the fraction of the known peak; None where they are not known.
        predicted_step_seconds: of the plan's prediction.
        cost_per_epoch: by the price of a worker hour.
    """

    name: str
    plan: dict[str, Any]
    workers: int
    threads: int
    units: int
    batch_size: int
    scaling: Scaling
    outcome: Outcome
    reason: str = ""
    details: str = ""
    step_seconds: Spread | None = None
    step_low_seconds: float | None = None
    step_high_seconds: float | None = None
    samples_per_second: Spread | None = None
    total_seconds: Spread | None = None
    start_seconds: Spread | None = None
    target_seconds: Spread | None = None
    speedup: Spread | None = None
    total_speedup: Spread | None = None
    target_speedup: Spread | None = None
    efficiency: Spread | None = None
    ranks: list[RankSplit] = field(default_factory=list)
    lost_seconds: dict[str, float] = field(default_factory=dict)
    traffic_bytes: float | None = None
    payload_bytes: float | None = None
    core_use: float | None = None
    flops_per_second: float | None = None
    mfu: float | None = None
    predicted_step_seconds: float | None = None
    predicted_memory_bytes: int | None = None
    cost_per_epoch: float | None = None
    break_even_steps: int | None = None
    metrics: list[Metric] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    timeline: list[Bar] = field(default_factory=list)
    course: Course | None = None

    @property
    def measured(self) -> bool:
        """Whether there are numbers."""
        return self.step_seconds is not None

    @property
    def layout_name(self) -> str:
        """The layout alone, such as `data=2`."""
        return str(self.plan.get("layout", self.name))

    @property
    def mean_seconds(self) -> dict[str, float]:
        """Part -> seconds of a step, as the mean over the ranks."""
        return {
            part: statistics.fmean(rank.seconds.get(part, 0.0) for rank in self.ranks) for part in PARTS if self.ranks
        }


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """What `shardwise bench` measured.

    Attributes:
        job: name; `origin` says which one, `settings` its hyper-parameters and changed fields.
        device: `cpu`, `cuda`, ...
        machine: name -> what it is: cores, processor, host, versions.
        baseline: name of the one-worker case that speed-ups are over: the fastest one.
        one_unit: name of the case on one core or accelerator that efficiencies are over.
        steps: of every run; None where runs ended at `target`.
        warm_up: first steps that do not count for the steady state.
        steps_per_epoch: None where the data has no known length.
        interrupted: not everything that was asked for was measured.
        warnings: what makes the numbers doubtful; shown first.
        remarks: what else a reader should know about all numbers.
    """

    job: str
    origin: str
    settings: dict[str, str]
    device: str
    machine: dict[str, Any]
    baseline: str
    one_unit: str
    steps: int | None
    warm_up: int
    rounds: int
    target: str | None
    price: float | None
    steps_per_epoch: int | None
    began: float
    seconds: float
    cases: list[Case]
    interrupted: bool = False
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def case(self, name: str) -> Case | None:
        """The case of a name."""
        return next((case for case in self.cases if case.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Bench:
        """Read plain data back; unknown fields are left out.

        Raises:
            UserError: it is no such document, or of a newer version.
        """
        version = record.get("version")
        if not isinstance(version, int) or "cases" not in record:
            raise UserError("this is no result of shardwise bench: it has no version or no cases")
        if version > VERSION:
            raise UserError(
                f"this result has version {version}, and this shardwise reads up to {VERSION}: use a newer one"
            )
        return _build(cls, {**record, "cases": [_case(case) for case in record["cases"]]})

    @classmethod
    def read(cls, path: Path) -> Bench:
        """Read a stored result: the file, or the folder it is in.

        Raises:
            UserError: it cannot be read.
        """
        file = path / FILE_NAME if path.is_dir() else path
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return cls.from_dict(record)
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error.strerror}): give the folder or the {FILE_NAME} of a bench"
            ) from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{file} is no result of shardwise bench: {error}") from error


_SPREADS = ("step_seconds", "samples_per_second", "total_seconds", "start_seconds", "target_seconds", "speedup", "total_speedup",
            "target_speedup", "efficiency")  # fmt: skip
_LISTS = {"ranks": RankSplit, "metrics": Metric, "findings": Finding, "timeline": Bar}


def _case(record: Mapping[str, Any]) -> Case:
    values = dict(record)
    for name in _SPREADS:
        if values.get(name) is not None:
            values[name] = _build(Spread, values[name])
    for name, kind in _LISTS.items():
        values[name] = [_build(kind, item) for item in values.get(name) or []]
    if values.get("course") is not None:
        values["course"] = _build(Course, values["course"])
    return _build(Case, values)


def _build(kind: type[T], record: Mapping[str, Any]) -> T:
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in record.items() if name in known})
