"""What is known beside the measurement: operations of a step, and the peak rate they could run at. Never guessed."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.bench.cases import Wanted
from shardwise.data.source import as_splits
from shardwise.errors import ShardwiseError, UserError
from shardwise.probe.facts import facts_apart
from shardwise.probe.place import cached_machine
from shardwise.spec.job import Job

_COUNTING_SECONDS = 120.0


def known_flops(job: Job) -> tuple[float | None, str]:
    """FLOPs of one step of the job's own global batch, counted operation by operation; or None and why not."""
    try:
        facts = facts_apart(job, as_splits(job.data), fake=True, timeout_seconds=_COUNTING_SECONDS)
    except ShardwiseError as error:
        reason = next(reversed(str(error).strip().splitlines()), type(error).__name__)
        return None, f"FLOP/s are left out: the operations of a step cannot be counted ({reason})"
    return sum(one.calls * one.flops(job.batch_size) for one in facts.operations), ""


def known_peak(device: str) -> tuple[Callable[[Wanted], float | None], str]:
    """The peak FLOP/s of the cores or accelerators of a case, as `shardwise probe` measured it on this machine."""
    try:
        machine = cached_machine()
    except UserError:  # written by another version: as good as none
        machine = None
    measured = machine.measured if machine is not None else None

    def peak(wanted: Wanted) -> float | None:
        if measured is None or device != "cpu":
            return None
        workers = wanted.plan.layout.workers
        rates = [
            rate.per_second * workers
            for rate in measured.kernels
            if rate.kind == "matmul"
            and rate.precision == wanted.plan.precision
            and rate.threads == wanted.threads
            and rate.workers == workers
        ]
        return max(rates, default=None)

    if device != "cpu":
        return peak, "MFU is left out: the peak rate of this accelerator was not measured"
    if measured is None:
        return peak, "MFU is left out: the peak rate of this machine is not known; `shardwise probe` measures it"
    return peak, ""
