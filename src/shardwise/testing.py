"""For your own tests: the comparison behind `shardwise prove`, as an assertion.

import shardwise

def test_my_model_trains_in_parallel():
    shardwise.testing.assert_parallel_equals_serial(my_job(), plan="data=2")
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardwise.prove.proof import prove
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Verdict

__all__ = ["Verdict", "assert_parallel_equals_serial"]


def assert_parallel_equals_serial(
    job: Job,
    plan: Plan | str | Path = "data=2",
    *,
    steps: int = 3,
    batch_size: int | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> Verdict:
    """Pass if the plan's run is the serial run up to rounding: losses, gradients, weights, buffers and optimizer state.

    Args:
        job: what to train; a test wants a small model. Random layers are switched off.
        plan: a layout in text form, a `Plan`, or the path of a plan file.
        steps: optimizer steps to compare.
        batch_size: in place of the job's own.
        device: `cpu`, or the name of an accelerator.
        threads: compute threads per worker.

    Returns:
        The verdict, for a look at distances and at what was not covered.

    Raises:
        AssertionError: it is not, or nobody can tell; the message is the verdict.
        UserError: the job or plan is wrong, or the plan refuses the model.
    """
    if batch_size is not None:
        job = replace(job, batch_size=batch_size)
    verdict = prove(job, plan, steps=steps, device=device, threads=threads)
    if not verdict.proved:
        raise AssertionError(str(verdict))
    return verdict
