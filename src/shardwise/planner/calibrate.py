"""Calibration: from a few measured runs to the factors of their software, each pulled towards 1 as far as the runs are few.

Two factors on seconds (compute and network), one on bytes, and what single runs have of their own (`planner/software.py`). The
network's factor over that of compute is the most probable one given the runs, with noise of long tails (Student's t), so that one
odd run moves little; given it, the rest is a regression whose noise is weighed by the same tails.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from shardwise.errors import PlanError, UserError
from shardwise.planner.case import Case
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.measured import MeasuredRow
from shardwise.planner.predict import MODEL_KEYS, printed_bytes, resolve
from shardwise.planner.repair import repair
from shardwise.planner.search import Problem
from shardwise.planner.software import COMMON, NOISE, known_run, solve
from shardwise.planner.step import Estimate, estimate, room_bytes
from shardwise.spec.machine import Machine
from shardwise.spec.software import KnownRun, Software

TAIL = 2.0
"""Degrees of freedom of Student's t: one run of many that is far off is hardly believed."""

APART = 0.5
"""Standard deviation of what runs have in common while the network is told apart from it: wide, or the network would take up what
is pulled towards 1."""

NETWORK = 0.5
"""Standard deviation of the network's factor over that of compute, in the logarithm."""

RATIOS = tuple(2.0 ** (step / 2) for step in range(-3, 7))
"""Network over compute at which measured runs are estimated; between them the logarithm of their seconds is taken as linear."""

STEPS = 8
"""Values tried between two of `RATIOS`."""

MEMORY = 0.25
"""Standard deviation of the factor on bytes, in the logarithm, and the scale of its noise."""

BOUND = 4.0
"""No factor is further from 1 than so many times."""

LARGEST = 1.25
"""Measured bytes over those of the device beyond which they are not of one device; GB for GiB and rounding are less."""

ROUNDS = 8
"""Reweightings of the runs; their weights settle in fewer."""


@dataclass(frozen=True)
class Sample:
    """One measured run, the case that it is taken as, and its estimate without calibration."""

    run: MeasuredRow
    case: Case
    estimate: Estimate
    assumed: tuple[str, ...] = ()


def sample(
    runs: Iterable[MeasuredRow],
    machine: Machine | None = None,
    constants: Constants = DEFAULT,
    problem: Problem | None = None,
) -> list[Sample]:
    """The cases of measured runs, resolved as `predict` does; runs that state no hardware are of `machine`.

    Runs that state neither layers nor hidden width are of the model of `problem`, and what they leave open beside the layout is
    as it says there.

    Raises:
        UserError: a run cannot be predicted; the message names it.
    """
    found = []
    plain = None if machine is None else replace(machine, software=None)
    for run in runs:
        row = dict(run.row)
        if "gpus" not in row and "data" not in row:
            raise PlanError(f"measured run {row['run_id']}: gpus is unknown: state on how many it ran")
        if machine is not None:
            row.setdefault("hardware", machine.accelerator.name)
        if problem is not None and "layers" not in row and "hidden" not in row:
            row = {**_described(problem), **row}
        fixed, assumed = repair(row)
        try:
            case, priced = resolve(fixed, plain, constants)
        except UserError as error:
            raise type(error)(f"measured run {run.row['run_id']}: {error}") from error
        found.append(Sample(run, case, priced, assumed))
    return found


def _described(problem: Problem) -> dict[str, str | int | float]:
    """What is planned for, in the columns of a table."""
    values = {key: value for key, value in vars(problem.model).items() if key in MODEL_KEYS}
    found: dict[str, str | int | float] = {key: int(value) for key, value in values.items() if value is not None}
    return {
        **found,
        "seq_len": problem.seq_len,
        "global_batch": problem.global_batch,
        "precision": problem.precision,
        "attention": problem.attention,
        "compile": int(problem.compile),
    }


def sample_of(case: Case, name: str, step_seconds: float, constants: Constants = DEFAULT) -> Sample:
    """A measured step of a case that is known in full, such as that of a plan."""
    plain = replace(case, machine=replace(case.machine, software=None))
    return Sample(MeasuredRow({"run_id": name}, step_seconds, None), plain, estimate(plain, constants))


def check_hardware(samples: Iterable[Sample], known: Collection[str], where: str) -> None:
    """Whether the runs are of devices that something is planned for.

    Raises:
        UserError: one is not; what software does on one part says little about another.
    """
    for item in samples:
        name = item.case.machine.accelerator.name
        if name not in known:
            assumed = f" ({'; '.join(item.assumed)})" if item.assumed else ""
            raise UserError(
                f"measured run {item.run.row['run_id']} is of {name}{assumed}, {where} of {', '.join(sorted(known))}: leave it "
                "out, or give its hardware as it is named there"
            )


def calibrate(samples: Sequence[Sample], source: str, constants: Constants = DEFAULT) -> Software:
    """What the runs say about their software.

    Raises:
        UserError: the runs contradict what they are described as by more than any software explains.
    """
    timed = [item for item in samples if item.run.step_seconds is not None]
    _check_memory(samples)
    compute, network, runs = 1.0, 1.0, tuple[KnownRun, ...]()
    if timed:
        _check(timed)
        compute, network, runs = _seconds(timed, constants)
    return Software(compute=compute, network=network, memory=_memory(samples), runs=runs, source=source)


FAR = 12.0
"""Measured over predicted, or the reverse, beyond which a run is not what its row says."""


def _check(timed: Sequence[Sample]) -> None:
    for item in timed:
        step, predicted = item.run.step_seconds or 0.0, item.estimate.step_seconds
        if not 1.0 / FAR <= step / predicted <= FAR:
            raise UserError(
                f"measured run {item.run.row['run_id']}: a step of {step:g} s where {predicted:.3g} s are predicted is no matter "
                "of software: check its unit, the batch (global_batch counts sequences over all workers), seq_len and the model"
            )


def _check_memory(samples: Sequence[Sample]) -> None:
    for item in samples:
        size, device = item.run.memory_bytes or 0.0, item.case.machine.accelerator
        if size > LARGEST * device.memory_bytes.value:
            raise UserError(
                f"measured run {item.run.row['run_id']}: memory_gib {size / 2**30:g} is more than the "
                f"{device.memory_bytes.value / 2**30:.4g} GiB of one {device.name}: give the peak of one device, in GiB"
            )


def _seconds(timed: Sequence[Sample], constants: Constants) -> tuple[float, float, tuple[KnownRun, ...]]:
    """Factors of compute and network, and the runs with their weights."""
    curves = [_curve(item, constants) for item in timed]
    measured = [math.log(item.run.step_seconds or 1.0) for item in timed]
    best, chosen = math.inf, 0.0
    for ratio in _fine_ratios():
        off = [value - _at(curve, ratio) for value, curve in zip(measured, curves, strict=True)]
        cost = _common_cost(off) + (ratio / NETWORK) ** 2 / 2
        if cost < best:
            best, chosen = cost, ratio
    off = [value - _at(curve, chosen) for value, curve in zip(measured, curves, strict=True)]
    runs = _weighed([known_run(item.case) for item in timed], off)
    common = COMMON**2 * sum(run.weight for run in runs)
    compute = _bounded(math.exp(common))
    return compute, _bounded(compute * math.exp(chosen)), runs


def _bounded(factor: float) -> float:
    return min(BOUND, max(1.0 / BOUND, factor))


def _curve(item: Sample, constants: Constants) -> list[float]:
    """Logarithm of the seconds of a step at each of `RATIOS`: the estimate, moved as its closed form moves."""
    found = []
    for ratio in RATIOS:
        machine = replace(item.case.machine, software=Software(network=ratio))
        found.append(math.log(estimate(replace(item.case, machine=machine), constants, quick=True).step_seconds))
    moved = math.log(item.estimate.step_seconds) - found[RATIOS.index(1.0)]
    return [value + moved for value in found]


def _fine_ratios() -> list[float]:
    """Logarithms of network over compute that are tried; 0, which is the first of equals, before all others."""
    logs = [math.log(ratio) for ratio in RATIOS]
    fine = [low + (high - low) * step / STEPS for low, high in pairwise(logs) for step in range(STEPS)]
    return sorted([*fine, logs[-1]], key=abs)


def _at(curve: Sequence[float], ratio: float) -> float:
    """A curve between its points."""
    place = (ratio - math.log(RATIOS[0])) / (0.5 * math.log(2.0))
    left = min(len(curve) - 2, max(0, int(place)))
    return curve[left] + (place - left) * (curve[left + 1] - curve[left])


def _common_cost(off: Sequence[float]) -> float:
    """Negative logarithm of the probability of deviations, with the common part that makes it smallest."""
    shared = sorted(off)[len(off) // 2]
    for _ in range(ROUNDS):
        trust = [(TAIL + 1.0) / (TAIL + ((value - shared) / NOISE) ** 2) / NOISE**2 for value in off]
        shared = sum(map(float.__mul__, trust, off)) / (sum(trust) + 1.0 / APART**2)
    tails = sum(math.log1p(((value - shared) / NOISE) ** 2 / TAIL) for value in off)
    return 0.5 * (TAIL + 1.0) * tails + (shared / APART) ** 2 / 2


def _weighed(runs: Sequence[KnownRun], off: Sequence[float]) -> tuple[KnownRun, ...]:
    """The runs with the noise that they are believed to have and the weights of the regression.

    The noise of a run is that of Student's t given how far the run is from what the others make of it (iteratively reweighted).
    """
    middle = sorted(off)[len(off) // 2]
    smooth = [middle] * len(off)
    weights: list[float] = []
    found = list(runs)
    for _ in range(ROUNDS):
        noises = [
            NOISE**2 * (TAIL + ((value - told) / NOISE) ** 2) / (TAIL + 1.0)
            for value, told in zip(off, smooth, strict=True)
        ]
        found = [replace(run, noise=noise) for run, noise in zip(runs, noises, strict=True)]
        weights = solve(found, off)
        smooth = [value - noise * weight for value, noise, weight in zip(off, noises, weights, strict=True)]
    return tuple(replace(run, weight=weight) for run, weight in zip(found, weights, strict=True))


def _memory(samples: Sequence[Sample]) -> float:
    """Factor on bytes; a run out of memory says that it needs more than its device has, and not how much more."""
    printed, beyond = list[float](), list[float]()
    for item in samples:
        memory = item.estimate.memory
        if item.run.memory_bytes is not None:
            printed.append(math.log(item.run.memory_bytes / printed_bytes(item.case, memory)))
        elif item.run.out_of_memory:
            beyond.append(math.log(room_bytes(item.case) / memory.total))
    if not printed and not beyond:
        return 1.0

    def cost(shared: float) -> float:
        off = [value - shared for value in printed] + [max(0.0, value - shared) for value in beyond]
        tails = sum(math.log1p((value / MEMORY) ** 2 / TAIL) for value in off)
        return 0.5 * (TAIL + 1.0) * tails + (shared / MEMORY) ** 2 / 2

    top = math.log(BOUND)
    return math.exp(min(sorted((top * step / 200 for step in range(-200, 201)), key=abs), key=cost))
