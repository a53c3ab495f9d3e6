"""Seconds of the operations of a counted step: by measured rates where the machine has them, else by the device's formulas."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from shardwise.planner.compute import Device, device_rates
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.spec.machine import Machine
from shardwise.spec.measured import DIVIDED_NORMS, Measured
from shardwise.spec.plan import Plan
from shardwise.spec.work import JobFacts, OperationFacts, StepSeen

UNMEASURED_COMPUTE, UNMEASURED_TRAFFIC = "matmul", "copy"
"""Kinds whose rates stand for those that no probe times."""

VIEW_SHARE = 0.7
"""A call that only makes another view, over the shortest one that computes (aten::view against aten::mul, 2026-11-26)."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a process shares its machine: processes beside it, itself included, and compute threads of each."""

    workers: int = 1
    threads: int = 1


@dataclass(frozen=True)
class PhaseSeconds:
    """Seconds of one pass of `samples` samples through some blocks."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0

    @property
    def passes(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def times(self, factor: float) -> "PhaseSeconds":
        """The same so many times as long."""
        return PhaseSeconds(factor * self.forward, factor * self.backward, factor * self.optimizer)

    def plus(self, other: "PhaseSeconds") -> "PhaseSeconds":
        """One after the other."""
        return PhaseSeconds(
            self.forward + other.forward, self.backward + other.backward, self.optimizer + other.optimizer
        )


Sides = tuple[float, float, float, float, float, float]
"""Seconds of some operations in the forward pass, the backward pass and the optimizer step: on the device, then those that the
host takes to launch them (0 on a measured machine, whose times hold both)."""

NO_SIDES: Sides = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

_PLACES = {"forward": 0, "backward": 1, "optimizer": 2}


def phase_seconds(
    operations: Iterable[OperationFacts],
    samples: float,
    machine: Machine,
    sharing: Sharing,
    *,
    constants: Constants = DEFAULT,
) -> PhaseSeconds:
    """Seconds of these operations for one pass of `samples` samples, of one worker alone with the model."""
    return joined(block_seconds(operations, samples, machine, sharing, constants=constants).values())


def joined(sides: Iterable[Sides]) -> PhaseSeconds:
    """Operations one after the other; the host launches some while the device computes others: the longer of both counts."""
    sums = [sum(column) for column in zip(*sides, strict=True)] or NO_SIDES
    return PhaseSeconds(max(sums[0], sums[3]), max(sums[1], sums[4]), max(sums[2], sums[5]))


def block_seconds(
    operations: Iterable[OperationFacts],
    samples: float,
    machine: Machine,
    sharing: Sharing,
    *,
    split: "dict[int, float] | None" = None,
    fraction: float = 1.0,
    owned: float = 1.0,
    together: int = 1,
    constants: Constants = DEFAULT,
) -> dict[int, Sides]:
    """Block -> seconds of its operations for one pass of `samples` samples, of one worker.

    Args:
        split: block -> the part of its work that this worker does.
        fraction: the part of all tensors along the sequence that this worker has.
        owned: the part of all parameters that this worker updates.
        together: parameters that one launch on a device updates (torch's default there; on CPU each has its own calls).
    """
    found: dict[int, list[float]] = {}
    devices: dict[str, Device] = {}
    crowd = turns(sharing, machine.measured.cores) if machine.measured is not None else 1
    for item in operations:
        sides = found.setdefault(item.block, [0.0] * 6)
        place = _PLACES[item.phase]
        part = (split or {}).get(item.block, 1.0) * (owned if item.phase == "optimizer" else fraction)
        if machine.measured is not None:
            sides[place] += crowd * _measured_seconds(item, samples, machine.measured, sharing, part)
            continue
        calls = item.calls / (together if item.phase == "optimizer" else 1)
        sides[3 + place] += calls * constants.launch_seconds * (1.0 if item.kind != "view" else 0.2)
        if item.kind != "view":
            if item.precision not in devices:
                known = item.precision if item.precision in machine.accelerator.peak_flops else "fp32"
                devices[item.precision] = device_rates(machine.accelerator, known, constants)
            sides[place] += _device_seconds(item, samples, devices[item.precision], part, calls)
    return {block: (a, b, c, d, e, f) for block, (a, b, c, d, e, f) in found.items()}


def turns(sharing: Sharing, cores: int) -> int:
    """Threads that take turns on the fullest core. All workers wait for the slowest, so it is this one that counts.

    The system moves processes between cores far less often than steps end, so three threads on two cores take as long as
    four, not as long as one and a half on one core.
    """
    return max(1, math.ceil(sharing.workers * sharing.threads / cores))


def _measured_seconds(item: OperationFacts, samples: float, measured: Measured, sharing: Sharing, part: float) -> float:
    overhead = measured.graph_seconds if item.phase == "forward" else 0.0
    if item.kind == "view":
        return item.calls * (VIEW_SHARE * measured.call_seconds + overhead)
    flops = part * item.flops(samples)
    size = flops or part * item.moved_bytes(samples)
    precision = item.precision if item.precision in ("fp32", "bf16") else "fp32"
    if not size:
        return item.calls * (measured.call_seconds + overhead)
    rate = None
    for kind, kept in (
        (item.kind, precision),
        (item.kind, "fp32"),
        (UNMEASURED_COMPUTE if flops else UNMEASURED_TRAFFIC, precision),
        (UNMEASURED_COMPUTE if flops else UNMEASURED_TRAFFIC, "fp32"),
    ):
        rate = measured.rate(
            kind, size, workers=min(sharing.workers, measured.cores), threads=sharing.threads, precision=kept
        )
        if rate is not None:
            break
    assert rate is not None, "a probe times products and copies"
    seconds = size / rate
    if item.kind == "matmul":
        moved = part * item.moved_bytes(samples)
        seconds += measured.thin_seconds(
            flops, moved, workers=min(sharing.workers, measured.cores), threads=sharing.threads
        )
    return item.calls * (max(measured.call_seconds, seconds) + overhead)


def _device_seconds(item: OperationFacts, samples: float, device: Device, part: float, calls: float) -> float:
    rate = device.attention_flops if item.kind.startswith("attention") else device.matmul_flops
    compute = part * item.flops(samples) / rate
    traffic = part * item.moved_bytes(samples) / device.memory_bytes
    return max(item.calls * max(compute, traffic), calls * device.kernel_seconds)


def copy_seconds(machine: Machine, moved_bytes: float, plan: Plan) -> float:
    """Reading and writing so many bytes in all, while all workers do the same; on the machine that was measured."""
    measured = machine.measured
    assert measured is not None
    # What a step touches once comes from memory, not from a cache: the rate of large copies.
    rate = measured.rate("copy", math.inf, workers=min(plan.layout.workers, measured.cores), threads=1)
    assert rate is not None, "a probe times copies"
    return moved_bytes / rate


def gradient_sums(facts: JobFacts) -> list[OperationFacts]:
    """What every micro-batch after the first one adds: its gradients to those before, each tensor read twice and written once."""
    shapes: list[tuple[float, int]] = [(item.bytes, item.count) for item in facts.gradients]
    parts = max(1, facts.message_parts)
    return [
        OperationFacts(
            block=0,
            phase="backward",
            kind=UNMEASURED_TRAFFIC,
            precision="fp32",
            calls=count,
            fixed_flops=0.0,
            sample_flops=0.0,
            fixed_bytes=3.0 * size,
            sample_bytes=0.0,
        )
        for size, count in shapes or [(facts.gradient_bytes / parts, parts)]
    ]


def divided_norms(operations: Iterable[OperationFacts], measured: Measured) -> list[OperationFacts]:
    """The operations of a step whose BatchNorm layers take their statistics over several ranks.

    These compute in several passes what torch's own kernel does in fewer (parallel/norm.py). A probe times them; for
    figures without, `_NORM_PASSES` give tensors read or written, and calls that do so, for each of its calls.
    """
    timed = {item.kind for item in measured.kernels}
    found = []
    for item in operations:
        kind = DIVIDED_NORMS.get(item.kind)
        if kind in timed:
            found.append(replace(item, kind=kind))
            continue
        passes = _NORM_PASSES.get(item.kind)
        if passes is None:
            found.append(item)
            continue
        share = passes.moved / passes.native / passes.calls
        moved = replace(
            item,
            kind=UNMEASURED_TRAFFIC,
            calls=item.calls * passes.calls,
            fixed_bytes=share * item.fixed_bytes,
            sample_bytes=share * item.sample_bytes,
        )
        small = replace(
            item, kind=UNMEASURED_TRAFFIC, calls=item.calls * passes.small, fixed_bytes=0.0, sample_bytes=0.0
        )
        found += [moved, small]
    return found


@dataclass(frozen=True)
class _NormPasses:
    native: int
    moved: int
    calls: int
    small: int


_NORM_PASSES = {
    "native_batch_norm": _NormPasses(native=2, moved=8, calls=5, small=11),
    "native_batch_norm_backward": _NormPasses(native=3, moved=11, calls=4, small=10),
}


def correction(facts: JobFacts, machine: Machine, samples: float, threads: int = 1) -> float:
    """Seen over predicted seconds of a serial step, on the machine where the step was seen; 1 elsewhere.

    Between seen sizes on a straight line in logarithms, beyond them level. With several threads the size that was seen with
    the nearest number of threads tells how much better or worse the rates are there than with one thread.
    """
    if machine.measured is None or not facts.seen or facts.place != dict(machine.measured.place):
        return 1.0
    points = [(seen.samples, _over(facts, machine, seen)) for seen in facts.seen if seen.threads == 1]
    found = _on_line(sorted(points), samples) if points else 1.0
    wide = [seen for seen in facts.seen if seen.threads > 1]
    if threads > 1 and wide:
        nearest = min(wide, key=lambda seen: (abs(seen.threads - threads), -seen.samples))
        found *= _over(facts, machine, nearest) / (_on_line(sorted(points), nearest.samples) if points else 1.0)
    return found


def _over(facts: JobFacts, machine: Machine, seen: StepSeen) -> float:
    told = phase_seconds(facts.operations, seen.samples, machine, Sharing(threads=seen.threads))
    return seen.seconds / max(1e-9, told.passes + told.optimizer)


def _on_line(points: list[tuple[int, float]], samples: float) -> float:
    if samples <= points[0][0]:
        return points[0][1]
    for (low, at_low), (high, at_high) in itertools.pairwise(points):
        if samples <= high:
            return at_low + math.log(samples / low) / math.log(high / low) * (at_high - at_low)
    return points[-1][1]
