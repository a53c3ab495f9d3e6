"""One run of a plan against the yardstick, and the second looks where float32 alone cannot decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from shardwise.errors import ShardwiseError
from shardwise.prove.compare import Yardstick, coarse, compare, initial_differences
from shardwise.prove.evaluation import KIND as METRIC
from shardwise.prove.evaluation import compare_metrics
from shardwise.prove.evidence import listed
from shardwise.prove.execute import Setting, measure, measure_double, run_candidate
from shardwise.prove.guards import check_guards, sample_faults
from shardwise.prove.record import Record
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Comparison, Guard

SMALL = 1e-3
"""Differences below this part of a tensor's size may come from a ReLU or a maximum that rounding tipped over; they refute
only if they come back from other weights on other samples. Mistakes in sums, shares and factors are far larger."""

_TELLING = ("loss", "gradient norm", "gradient", "applied gradient", "last gradient", "option")
"""Kinds of comparisons that agree between any two float64 runs of one computation."""


@final
@dataclass(frozen=True, kw_only=True)
class Trial:
    """The candidate of a plan against the yardstick."""

    candidate: Record
    comparisons: Sequence[Comparison]
    initial: Sequence[tuple[int, str]]
    sample_faults: Sequence[str]
    guards: Sequence[Guard]

    @property
    def failed(self) -> list[Comparison]:
        return sorted((item for item in self.comparisons if not item.passed), key=lambda item: -item.excess)

    @property
    def faults(self) -> list[str]:
        """What is wrong and is no distance."""
        broken = [f"guard {guard.name}: {guard.text}" for guard in self.guards if not guard.passed]
        return [f"initial {name} differs on rank {rank}" for rank, name in self.initial] + broken

    @property
    def passed(self) -> bool:
        return not self.failed and not self.faults

    @property
    def small(self) -> bool:
        """Refuted by differences that a tipped ReLU can make, and by nothing else."""
        return not self.passed and not self.faults and all(item.distance <= SMALL * item.size for item in self.failed)

    @property
    def only_metrics(self) -> bool:
        """Refuted by metrics alone: rounding may have moved a sample from one answer to another."""
        return not self.passed and not self.faults and all(item.kind == METRIC for item in self.failed)


def run_trial(setting: Setting, plan: Plan, yardstick: Yardstick) -> Trial:
    """Run a plan and compare it."""
    # What fails in a serial float64 run fails here too, on all workers or on some.
    evaluates = not (yardstick.double and yardstick.exact.reports[0].evaluation)
    name = f"candidate {plan.layout}"
    candidate = run_candidate(setting, plan, name, double=yardstick.double, evaluates=evaluates)
    aliases = yardstick.exact.aliases
    faults = sample_faults(candidate, yardstick.serial[0], plan)
    return Trial(
        candidate=candidate,
        comparisons=[*compare(candidate, yardstick), *compare_metrics(candidate, yardstick)],
        initial=initial_differences(candidate, yardstick.serial[0], aliases),
        sample_faults=faults,
        guards=check_guards(candidate, yardstick, plan.layout, faults),
    )


def _repeats(setting: Setting, plan: Plan) -> Trial | None:
    """A trial from another seed that fails as well; None if two do not."""
    for further in (1, 2):
        other = replace(setting, seed=setting.job.seed + further, folder=setting.folder / f"seed{further}")
        yardstick, _ = measure(other, plan)
        trial = run_trial(other, plan, yardstick)
        if not trial.passed:
            return trial
    return None


@final
@dataclass(frozen=True, kw_only=True)
class Look:
    """What was found at last.

    Attributes:
        trial: the one that decides.
        yardstick: the one that it was held against.
        disagree: why two serial runs are not the same run; None where they are.
        notes: what happened on the way.
    """

    trial: Trial
    yardstick: Yardstick
    disagree: str | None = None
    notes: tuple[str, ...] = ()


def look_again(setting: Setting, plan: Plan, trial: Trial, yardstick: Yardstick) -> Look:
    """Decide what float32 cannot: in float64 where its rounding is coarse, and from other seeds where the difference is small."""
    rough = coarse(trial.comparisons, yardstick)
    notes: list[str] = []
    if (trial.passed and rough) or trial.small or trial.only_metrics:
        try:
            finer = measure_double(setting, plan, yardstick)
            double = run_trial(setting, plan, finer)
        except ShardwiseError as error:
            # What float32 says stands, with what it cannot say.
            why = f"float32 is coarse here ({_worst(rough)})" if rough else "a difference is small"
            notes.append(f"{why}, and the plan does not run in float64: {str(error).splitlines()[0]}")
            return _small(setting, plan, trial, yardstick, notes)
        # Not weights: an optimizer that steps by the sign alone moves those anywhere whose gradients are rounding only.
        still = [item for item in coarse(double.comparisons, finer) if item.kind in _TELLING]
        if still:
            item = still[0]
            part = item.serial_distance / item.size
            text = f"two serial float64 runs differ by {part:.1e} of {item.kind} {item.name}: no parallel run can be their equal"
            return Look(trial=trial, yardstick=yardstick, disagree=text)
        if not double.passed:
            why = "float32 is too coarse to tell" if trial.passed else "the difference is small"
            return Look(trial=double, yardstick=finer, notes=(f"{why}; compared in float64, where it is no rounding",))
        if rough:
            notes.append(f"float32 is coarse here ({_worst(rough)}); the plan was compared in float64 as well")
        if trial.only_metrics:
            names = listed(list(dict.fromkeys(item.name for item in trial.failed)))
            notes.append(f"rounding moved a sample from one answer to another ({names}); in float64 it does not")
            right = [item for item in trial.comparisons if item.passed]
            return Look(trial=replace(trial, comparisons=right), yardstick=yardstick, notes=tuple(notes))
    return _small(setting, plan, trial, yardstick, notes)


def _worst(rough: Sequence[Comparison]) -> str:
    item = rough[0]
    return f"{item.kind} {item.name}: {item.serial_distance / item.size:.1e} of its size"


def _small(setting: Setting, plan: Plan, trial: Trial, yardstick: Yardstick, notes: list[str]) -> Look:
    """Whether a small difference comes back from other seeds."""
    if not trial.small:
        return Look(trial=trial, yardstick=yardstick, notes=tuple(notes))
    if _repeats(setting, plan) is not None:
        return Look(
            trial=trial, yardstick=yardstick, notes=("the difference is small, and came back from another seed",)
        )
    worst = trial.failed[0]
    notes.append(
        f"at first {listed([f'{item.kind} {item.name}' for item in trial.failed], 2)} was off by "
        f"{worst.distance / worst.size:.1e} of its size; from two other seeds nothing was: rounding "
        "had tipped a ReLU or a maximum"
    )
    passed = replace(trial, comparisons=[item for item in trial.comparisons if item.passed])
    return Look(trial=passed, yardstick=yardstick, notes=tuple(notes))
