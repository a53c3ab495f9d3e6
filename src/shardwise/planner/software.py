"""What measured runs say about another run: a regression over likeness, and the factors that it puts on an estimate.

The logarithm of measured over predicted seconds is taken as

    common + own(run) + noise

with `common` ~ N(0, COMMON^2), `own` ~ N(0, OWN^2) whose covariance of two runs falls with their distance, OWN^2 e^-d, and
noise of variance `KnownRun.noise` (Gaussian process regression: Rasmussen and Williams 2006, chapter 2). So one run moves mostly
what all runs have in common, several tell what some layouts have of their own, and what nothing is known about stays at 1.
The three sizes were chosen on tables of published runs while the planner was blind to them (docs/calibration.md).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from shardwise.planner.case import Case
from shardwise.planner.memory import MemoryParts
from shardwise.spec.software import KnownRun, Software

COMMON = 0.25
"""Standard deviation of what the runs of one piece of software have in common, in the logarithm of seconds."""

OWN = 0.3
"""The same of what a run has of its own and shares with runs like it."""

NOISE = 0.15
"""The same of what a run shares with none, a repetition of it included."""

DOUBLING = 0.25
"""Distance of two runs of which one has twice as many of something: GPUs, ranks of an axis, layers, ..."""

OTHER_WORD = 0.5
"""Distance of two runs that differ in hardware, precision, recomputation, ZeRO stage, or in having experts."""

Traits = tuple[tuple[float, ...], tuple[object, ...]]


def known_run(case: Case) -> KnownRun:
    """What a case has in common with others, as a run of which nothing is known yet."""
    return KnownRun(
        hardware=case.machine.accelerator.name,
        precision=case.precision,
        recompute=case.recompute,
        zero_stage=case.zero_stage,
        experts=case.model.experts,
        gpus=case.workers,
        tensor=case.tensor,
        pipeline=case.pipeline,
        context=case.context,
        layers=case.model.layers,
        hidden=case.model.hidden,
        tokens=case.tokens,
        micro_batches=case.micro_batches,
    )


def traits_of(case: Case) -> Traits:
    """Logarithms to base 2 of the sizes of a case, and its words."""
    model = case.model
    sizes = (case.workers, case.tensor, case.pipeline, case.context, model.layers, model.hidden, case.tokens)
    words = (case.machine.accelerator.name, case.precision, case.recompute, case.zero_stage, model.experts > 0)
    return tuple(map(math.log2, (*sizes, case.micro_batches))), words


@lru_cache(maxsize=1024)
def traits_of_run(run: KnownRun) -> Traits:
    """The same of a measured run."""
    sizes = (run.gpus, run.tensor, run.pipeline, run.context, run.layers, run.hidden, run.tokens, run.micro_batches)
    return tuple(map(math.log2, sizes)), (run.hardware, run.precision, run.recompute, run.zero_stage, run.experts > 0)


def likeness(one: Traits, other: Traits) -> float:
    """1 for two runs that are the same in all that counts, 0 for runs that have nothing in common."""
    apart = DOUBLING * sum(abs(a - b) for a, b in zip(one[0], other[0], strict=True))
    return math.exp(-apart - OTHER_WORD * sum(a != b for a, b in zip(one[1], other[1], strict=True)))


def covariance(one: Traits, other: Traits) -> float:
    """Of the logarithms of measured over predicted seconds of two runs, without noise."""
    return COMMON**2 + OWN**2 * likeness(one, other)


def step_factor(case: Case) -> float:
    """What measured runs say that a step of `case` takes, over an estimate with the network slowed by `network_ratio`."""
    software = case.machine.software
    if software is None:
        return 1.0
    if not software.runs:
        return software.compute
    mine = traits_of(case)
    own = sum(run.weight * likeness(mine, traits_of_run(run)) for run in software.runs)
    return software.compute * math.exp(OWN**2 * own)


def least_factor(software: Software | None) -> float:
    """No step takes less than so many times its estimate."""
    if software is None:
        return 1.0
    return software.compute * math.exp(OWN**2 * sum(min(0.0, run.weight) for run in software.runs))


def network_ratio(software: Software | None) -> float:
    """How much longer messages take than compute, over what is assumed."""
    return 1.0 if software is None else software.network / software.compute


def with_software(memory: MemoryParts, software: Software | None) -> MemoryParts:
    """The memory of a rank with the factor that was measured."""
    if software is None or software.memory == 1.0:
        return memory
    scaled = {name: software.memory * value for name, value in vars(memory).items()}
    return replace(memory, **scaled)


def spread(case: Case) -> float | None:
    """Standard deviation of the logarithm of measured over predicted seconds that is left; None where no run was measured."""
    software = case.machine.software
    if software is None or not software.runs:
        return None
    mine = traits_of(case)
    known = [covariance(mine, traits_of_run(run)) for run in software.runs]
    half = _forward(_factored(software.runs), known)
    return math.sqrt(max(NOISE**2, COMMON**2 + OWN**2 + NOISE**2 - sum(value * value for value in half)))


def solve(runs: Sequence[KnownRun], values: Sequence[float]) -> list[float]:
    """Weights of the runs such that their covariances with one another and their noise give `values`."""
    root = _factored(tuple(runs))
    half = _forward(root, values)
    size = len(half)
    found = [0.0] * size
    for row in reversed(range(size)):
        rest = sum(root[below][row] * found[below] for below in range(row + 1, size))
        found[row] = (half[row] - rest) / root[row][row]
    return found


@lru_cache(maxsize=64)
def _factored(runs: tuple[KnownRun, ...]) -> list[list[float]]:
    """Cholesky's lower triangle of the covariance of measured runs, noise included; positive definite by the noise."""
    marks = [traits_of_run(run) for run in runs]
    root: list[list[float]] = []
    for row, mark in enumerate(marks):
        line: list[float] = []
        for column in range(row):
            dot = sum(map(float.__mul__, line, root[column]))
            line.append((covariance(mark, marks[column]) - dot) / root[column][column])
        own = covariance(mark, mark) + runs[row].noise
        line.append(math.sqrt(own - sum(value * value for value in line)))
        root.append(line)
    return root


def _forward(root: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    found: list[float] = []
    for row, value in zip(root, values, strict=True):
        found.append((value - sum(a * b for a, b in zip(row, found, strict=False))) / row[-1])
    return found
