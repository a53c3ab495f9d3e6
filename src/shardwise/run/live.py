"""`start`: the exact global step for people who keep their own training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.data.batch import Batch
from shardwise.data.source import Splits, as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.errors import JobError
from shardwise.run.assemble import Assembly, assemble, check_job
from shardwise.run.balance import check_division
from shardwise.run.choose import choose_device
from shardwise.run.evaluate import evaluate
from shardwise.run.export import save_weights
from shardwise.run.launch import current_rank
from shardwise.run.loop import next_batch, open_epoch, total_steps
from shardwise.run.options import TrainOptions, resolve_plan
from shardwise.run.step import take_step
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.rank import SERIAL


@final
@dataclass
class LiveRun:
    """A training whose loop the user writes. Made by `start`; use it as a context manager, or call `close`.

    Every rank runs the same loop: `batches` gives each its part of the same global batches, `step` is collective.
    """

    job: Job
    plan: Plan
    splits: Splits
    assembly: Assembly
    _stack: ExitStack
    epoch: int = 0

    @property
    def model(self) -> nn.Module:
        """The module that is being trained, in place."""
        return self.assembly.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that is being stepped."""
        return self.assembly.optimizer

    @property
    def steps_taken(self) -> int:
        """Global steps so far."""
        return self.assembly.step

    @property
    def rank(self) -> int:
        """Number of this worker; do printing and the like on rank 0 only."""
        return self.assembly.world.rank

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.assembly.world.size

    def batches(self, *, epochs: int | None = None) -> Iterator[Batch]:
        """This rank's parts of the global batches, over all epochs or steps of the job.

        Args:
            epochs: passes over the training split; None for what the job says.
        """
        limit = epochs if epochs is not None else self.job.epochs
        first_epoch = self.epoch
        while limit is None or self.epoch - first_epoch < limit:
            yielded = False
            for batch in self._epoch():
                yielded = True
                yield batch
                if epochs is None and self.job.steps is not None and self.assembly.step >= self.job.steps:
                    return
            if not yielded:
                raise JobError("the training split gave no batch in a whole epoch: the data is empty")
            self.epoch += 1

    def step(self, batch: Batch) -> float:
        """One exact global step; returns the mean loss over the global batch, the same on every rank. Collective."""
        result = take_step(self.assembly, batch)
        total = self.assembly.reports.sum_(result.loss_sum.detach().clone())
        return float(total / result.weight)

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Loss and metrics over the test split, or over other data, each sample counted once. Collective.

        Raises:
            JobError: the job has no test split and no data was given.
        """
        source = self.splits.test if data is None else as_splits(data).train
        if source is None:
            raise JobError("the job's data has no test split: give evaluate() the data")
        return evaluate(self.assembly, source)[0]

    def save_weights(self, path: str | Path) -> None:
        """Write the weights as a safetensors file. Collective; rank 0 writes."""
        self.assembly.average()
        save_weights(self.assembly.model, Path(path))

    def close(self) -> None:
        """Leave the process group."""
        self._stack.close()

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _epoch(self) -> Iterator[Batch]:
        a = self.assembly
        with closing(open_epoch(a, self.splits, epoch=self.epoch, start=0)) as stream:
            while (batch := next_batch(stream, a.samples, a.device)) is not None:
                yield batch


def start(
    job: Job | None = None,
    *,
    plan: Plan | str | None = None,
    device: str = "auto",
    group_exists: bool = False,
    **fields_of_job: Any,
) -> LiveRun:
    """Make a job ready for a loop of your own.

    In a plain process this is a run on one worker; the same script under `torchrun --nproc-per-node N` is a run on N.

    Args:
        job: what to train; or give its fields as keyword arguments. `epochs` may be left out there (1 is taken).
        plan: a plan or layout; the running number of workers as data parallelism by default.
        device: `auto`, `cpu`, or an accelerator.
        group_exists: the script has started torch's process group itself, and will end it.
        fields_of_job: `model=..., optimizer=..., loss=..., data=..., batch_size=...`. `model` may be a module itself
            and `optimizer` must then be a function of its parameters.

    Raises:
        UserError: the job, data or plan is wrong.
    """
    if job is None:
        job = _job_of(fields_of_job)
    elif fields_of_job:
        raise JobError(f"start was given a job and its field {next(iter(fields_of_job))!r}: give one or the other")
    kind = choose_device(device)
    rank = current_rank() or SERIAL
    options = TrainOptions(plan=plan, device=kind, threads=None)
    settled = resolve_plan(job, options, device=kind, world=rank.workers)
    check_job(job, settled)
    stack = ExitStack()
    try:
        if not group_exists:
            stack.enter_context(process_group(rank, kind, options.timeout_seconds))
        if rank.workers > 1 and settled.threads is not None:
            torch.set_num_threads(settled.threads)
        splits = as_splits(job.data)
        check_division(splits, settled)
        where = torch.device(kind, rank.local_rank) if kind != "cpu" else torch.device("cpu")
        total = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
        assembly = assemble(job, settled, Group.world(), where, total_steps=total)
    except BaseException:
        stack.close()
        raise
    return LiveRun(job, settled, splits, assembly, stack)


def _job_of(given: dict[str, Any]) -> Job:
    known = [item.name for item in fields(Job)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise JobError(f"start has no argument {unknown[0]!r}; a job has {', '.join(known)}")
    values = dict(given)
    if values.get("epochs") is None and values.get("steps") is None:
        values["epochs"] = 1
    model = values.get("model")
    if isinstance(model, nn.Module):
        values["model"] = lambda: model
    try:
        return Job(**values)
    except TypeError as error:
        raise JobError(f"start: {error}") from error
