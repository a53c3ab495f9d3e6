"""`shardwise.train`: the training of `run/train.py`, which plans where it is asked to."""

from __future__ import annotations

from typing import Any

from shardwise.run.choose import Chooser
from shardwise.run.result import Run
from shardwise.run.train import train as run_train
from shardwise.spec.job import Job


def train(job: Job, **given: Any) -> Run:
    """Train a job and return the finished run.

    Called in a plain process it starts the workers itself; called in every rank of a `torchrun` it trains as that rank.

    Args:
        job: what to train.
        given: the fields of `TrainOptions` (`plan`, `workers`, `out`, `resume`, ...), or `options=` with all of them.
            `plan="auto"` plans for this machine as the command does; without a plan a rule decides that measures nothing.

    Raises:
        UserError: the job, data, plan or folder is wrong; nothing was started.
        RunFailed: a worker failed; the message holds its own traceback.
        Stopped: the run was interrupted and saved.
    """
    chooser: Chooser = _planned
    return run_train(job, **{"chooser": chooser, **given})


def _planned(job: Job, *, workers: int | None, threads: int | None, device: str, nodes: int) -> Any:
    from shardwise.advise.auto import automatic

    return automatic(job, workers=workers, threads=threads, device=device, nodes=nodes)
