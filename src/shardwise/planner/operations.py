"""Seconds of the operations of a counted step: by measured rates where the machine has them, else by the device's formulas."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from shardwise.planner.compute import device_rates
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.spec.machine import Machine
from shardwise.spec.measured import Measured
from shardwise.spec.work import JobFacts, OperationFacts

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


def phase_seconds(
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
) -> PhaseSeconds:
    """Seconds of these operations for one pass of `samples` samples, of one worker.

    Args:
        split: block -> the part of its work that this worker does.
        fraction: the part of all tensors along the sequence that this worker has.
        owned: the part of all parameters that this worker updates.
        together: parameters that one launch on a device updates (torch's default there; on CPU each has its own calls).
    """
    found = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    if machine.measured is not None:
        crowd = max(1.0, sharing.workers * sharing.threads / machine.measured.cores)
        for item in operations:
            part = (split or {}).get(item.block, 1.0) * (owned if item.phase == "optimizer" else fraction)
            found[item.phase] += crowd * _measured_seconds(item, samples, machine.measured, sharing, part)
        return PhaseSeconds(**found)
    host = dict(found)
    for item in operations:
        part = (split or {}).get(item.block, 1.0) * (owned if item.phase == "optimizer" else fraction)
        calls = item.calls / (together if item.phase == "optimizer" else 1)
        found[item.phase] += _device_seconds(item, samples, machine, part, calls, constants)
        host[item.phase] += calls * constants.launch_seconds * (1.0 if item.kind != "view" else 0.2)
    return PhaseSeconds(**{name: max(found[name], host[name]) for name in found})


def _measured_seconds(item: OperationFacts, samples: float, measured: Measured, sharing: Sharing, part: float) -> float:
    overhead = measured.graph_seconds if item.phase == "forward" else 0.0
    if item.kind == "view":
        return item.calls * (VIEW_SHARE * measured.call_seconds + overhead)
    flops = part * item.flops(samples)
    size = flops or part * item.moved_bytes(samples)
    precision = item.precision if item.precision in ("fp32", "bf16") else "fp32"
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
    return item.calls * (max(measured.call_seconds, size / rate) + overhead)


def _device_seconds(
    item: OperationFacts, samples: float, machine: Machine, part: float, calls: float, constants: Constants
) -> float:
    if item.kind == "view":
        return 0.0
    precision = item.precision if item.precision in machine.accelerator.peak_flops else "fp32"
    device = device_rates(machine.accelerator, precision, constants)
    rate = device.attention_flops if item.kind.startswith("attention") else device.matmul_flops
    compute = part * item.flops(samples) / rate
    traffic = part * item.moved_bytes(samples) / device.memory_bytes
    return max(item.calls * max(compute, traffic), calls * device.kernel_seconds)


def correction(facts: JobFacts, machine: Machine, samples: float) -> float:
    """Seen over predicted seconds of a serial step of one thread, on the machine where the step was seen; 1 elsewhere.

    Between two seen sizes on a straight line, beyond them level.
    """
    if machine.measured is None or not facts.seen or facts.place != dict(machine.measured.place):
        return 1.0
    points = []
    for seen in sorted(facts.seen, key=lambda one: one.samples):
        told = phase_seconds(facts.operations, seen.samples, machine, Sharing(threads=seen.threads))
        points.append((seen.samples, seen.seconds / max(1e-9, told.passes + told.optimizer)))
    first, last = points[0], points[-1]
    if samples <= first[0] or first[0] == last[0]:
        return first[1]
    if samples >= last[0]:
        return last[1]
    share = math.log(samples / first[0]) / math.log(last[0] / first[0])
    return first[1] + share * (last[1] - first[1])
