"""What is known beside the measurement: operations of a step, the peak rate of this machine, the planner's prediction.

Nothing is guessed: where the machine was not measured by `shardwise probe`, or the job cannot be counted, it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from shardwise.bench.cases import Wanted
from shardwise.data.source import as_splits
from shardwise.errors import ShardwiseError, UserError
from shardwise.planner.jobstep import estimate_job
from shardwise.probe.facts import facts_apart
from shardwise.probe.place import cached_machine
from shardwise.spec.job import Job
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Prediction
from shardwise.spec.work import JobFacts

_COUNTING_SECONDS = 120.0


@final
@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a job and this machine.

    Attributes:
        facts: the job's operations, None where they cannot be counted.
        machine: this machine as `shardwise probe` measured it, None where it did not, and for accelerators.
        remarks: what is left out, and why.
    """

    facts: JobFacts | None
    machine: Machine | None
    remarks: tuple[str, ...] = ()

    @property
    def flops(self) -> float | None:
        """FLOPs of one step of the job's own global batch."""
        if self.facts is None:
            return None
        return sum(one.calls * one.flops(self.facts.batch_size) for one in self.facts.operations)

    def peak(self, wanted: Wanted) -> float | None:
        """FLOP/s of matrix products on as many workers and threads as the case has, at best."""
        if self.machine is None or self.machine.measured is None:
            return None
        workers, plan = wanted.plan.layout.workers, wanted.plan
        rates = [
            rate.per_second * workers
            for rate in self.machine.measured.kernels
            if (rate.kind, rate.precision) == ("matmul", plan.precision)
            and (rate.threads, rate.workers) == (wanted.threads, workers)
        ]
        return max(rates, default=None)

    def prediction(self, wanted: Wanted) -> Prediction | None:
        """The plan's own prediction, or else the planner's for this machine."""
        if wanted.plan.prediction is not None or self.facts is None or self.machine is None or wanted.refused:
            return wanted.plan.prediction
        facts = replace(self.facts, batch_size=wanted.batch_size)
        try:
            found = estimate_job(facts, self.machine, wanted.plan)
        except ShardwiseError:  # a layout that the planner has no formula for
            return None
        return Prediction(step_seconds=found.step_seconds, memory_bytes=round(found.memory_bytes))


def find_known(job: Job, device: str) -> Known:
    """Count the job's step in a process apart, and look up the figures kept for this machine."""
    remarks = []
    machine = None
    if device != "cpu":
        remarks.append("MFU and predictions are left out: the peak rate of this accelerator was not measured")
    else:
        try:
            machine = cached_machine()
        except UserError:  # written by another version: as good as none
            machine = None
        if machine is None:
            remarks.append("MFU and predictions are left out: this machine is not known; `shardwise probe` measures it")
    facts = None
    try:
        splits = as_splits(job.data)
        facts = facts_apart(job, splits, fake=machine is None, timeout_seconds=_COUNTING_SECONDS)
    except ShardwiseError as error:
        reason = next(reversed(str(error).strip().splitlines()), type(error).__name__)
        remarks.append(f"FLOP/s and predictions are left out: the operations of a step cannot be counted ({reason})")
    return Known(facts=facts, machine=machine, remarks=tuple(remarks))
