"""The runs of a proof: the same steps as a training, in float64, in float32 and under the plan."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from shardwise.data.batch import Batch, tree_map
from shardwise.data.loader import steps_per_epoch
from shardwise.data.randomness import seed_generators
from shardwise.data.reading import Reading
from shardwise.data.source import Source, Splits, as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.errors import DataError, PlanError
from shardwise.parallel.norm import batch_norms
from shardwise.prove.evaluation import take_evaluation
from shardwise.prove.quiet import Quiet, in_double, noted_draws, silence
from shardwise.prove.record import RankReport, Recorder
from shardwise.prove.resumed import Middle
from shardwise.run.alike import next_batch
from shardwise.run.assemble import Assembly, assemble
from shardwise.run.loop import open_epoch, total_steps
from shardwise.run.step import take_step
from shardwise.run.turns import Turn
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank

Fault = Callable[[Assembly], None]


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """One run. Picklable when `job` and `splits` are None and `reference` builds the job again.

    Attributes:
        plan: already settled; precision and compilation are those of the proof.
        steps: optimizer steps.
        double: compute in float64 from the float32 initial weights.
        order: the samples of each batch change places, by this seed; None leaves them. Serial runs only.
        seed: in place of the job's own; None keeps it.
        evaluates: look at the test split at the end.
        resumes: after half of the steps, save a checkpoint and go on from it with everything built anew.
        greatest: torch's random functions give the greatest number that they can, or the least; None lets them draw.
        fault: changes the assembled run, for tests of the proof itself.
    """

    job: Job | None
    splits: Splits | None
    reference: Callable[[], Job] | None
    plan: Plan
    steps: int
    device: str
    folder: str
    double: bool = False
    order: int | None = None
    seed: int | None = None
    evaluates: bool = True
    resumes: bool = False
    greatest: bool | None = None
    timeout_seconds: float = 600.0
    fault: Fault | None = None

    def for_new_process(self) -> Task:
        """The same without what cannot be sent to a process that inherits nothing."""
        return replace(self, job=None, splits=None) if self.reference is not None else self


def run_rank(rank: Rank, task: Task) -> list[RankReport]:
    """Take the steps as one rank, and leave its record in the task's folder. Collective.

    Returns:
        The reports of all ranks.
    """
    with process_group(rank, task.device, task.timeout_seconds):
        device = torch.device(task.device, rank.local_rank) if task.device != "cpu" else torch.device("cpu")
        return take_record(task, device)


def take_record(task: Task, device: torch.device) -> list[RankReport]:
    """As `run_rank`, in a process group that exists, or in none for a serial run."""
    job, splits = open_job(task)
    silenced: list[str] = []
    a = prepare(task, job, splits, device, silenced)
    axes = [axis for axis, degree in task.plan.layout.degrees.items() if degree > 1]
    report = RankReport(a.world.rank, coordinates={axis: a.mesh.coordinate(axis) for axis in axes})
    report.modules, report.has_batch_norm = silenced, bool(batch_norms(a.model))
    recorder = Recorder(report)
    recorder.take_size(a.model)
    recorder.take_state("initial", a)
    # Runs of a training are processes of their own, whose generators of Python and NumPy start anywhere. Those of a proof
    # are forked from one process and would draw alike.
    seed_generators(os.getpid())
    middle = task.steps // 2 if task.resumes else 0
    if middle:
        _walk(a, task, splits, recorder, 0, middle)
        saved = Middle(a, splits, Path(task.folder))
        del a
        gc.collect()  # two models at once might not fit
        a = prepare(task, job, splits, device, silenced)
        saved.take_up(a, report)
    _walk(a, task, splits, recorder, middle, task.steps)
    a.average()
    recorder.take_state("final", a)
    if task.evaluates and splits.test is not None and splits.test.length:
        test = _Wide(splits.test) if task.double else splits.test
        take_evaluation(a, test, task.steps, report, double=task.double)
    return recorder.write(Path(task.folder), a.world)


def open_job(task: Task) -> tuple[Job, Splits]:
    """The job, here built again if it could not be inherited, and its data."""
    job, splits = task.job, task.splits
    if job is None:
        if task.reference is None:
            raise PlanError("this worker inherited no job and was given no way to build it again")
        job = task.reference()
    if task.seed is not None:
        job = replace(job, seed=task.seed)
    return job, splits if splits is not None else as_splits(job.data)


def prepare(task: Task, job: Job, splits: Splits, device: torch.device, silenced: list[str]) -> Assembly:
    """Assemble as a training would, with random layers switched off and, for the reference, in float64."""
    total = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
    build = job.model

    def model() -> nn.Module:
        made = build()
        silenced[:] = silence(made)
        return _doubled(made) if task.double else made

    job = replace(job, model=model, data=Splits(_Wide(splits.train)) if task.double else job.data)
    a = assemble(job, task.plan, Group.world(), device, total_steps=total)
    if task.double:
        torch.set_default_dtype(torch.float64)  # this process ends with the run
    if task.fault is not None:
        task.fault(a)
    return a


def _walk(a: Assembly, task: Task, splits: Splits, recorder: Recorder, start: int, stop: int) -> None:
    """Take the steps from `start` to `stop`; note gradients of the first and last of all, and the loss of each."""
    report = recorder.report
    quiet = Quiet(double=task.double, greatest=task.greatest)
    turns = a.turns

    def noted_first(turn: Turn) -> Turn:
        def note_then_update() -> None:
            recorder.take_gradients("applied", a.model)
            turn.update()

        return replace(turn, update=note_then_update)

    # Not a hook of the optimizer: with one, the step goes another way than in training (see run/optimize.py).
    if not start:
        a.turns = {name: noted_first(turn) for name, turn in turns.items()}
    taken = start
    for batch in islice(walk_batches(a, splits, task.steps), start, stop):
        recorder.take_samples(batch)
        moment = "gradient" if taken == 0 else "last" if taken == task.steps - 1 else None
        noted = functools.partial(recorder.take_gradients, moment, a.model) if moment else None
        batch = altered(batch, task)  # outside of what notes random functions: it draws an order
        with quiet, noted_draws(quiet.random):
            result = take_step(a, batch, on_gradients=noted)
        a.turns = turns
        mean = a.reports.sum_(result.loss_sum.detach().double() / result.weight)
        report.losses.append(float(mean))
        report.reported_norms.append(None if result.gradient_norm is None else _number(result.gradient_norm))
        taken += 1
    if taken == 0:
        raise DataError("the training split gave no batch: the data is empty")
    report.silenced |= quiet.silenced
    report.random |= quiet.random
    if a.composed.recomputed is not None:
        report.recomputed = (report.recomputed or 0) + a.composed.recomputed.calls


def walk_batches(a: Assembly, splits: Splits, steps: int) -> Iterator[Batch]:
    """This rank's parts of `steps` global batches: the first ones, and as the last one the short batch that ends an epoch.

    The short batch is taken only where the training would come to it.
    """
    left = steps
    each = steps_per_epoch(splits.train, a.job.batch_size)
    reaches = a.job.epochs is not None or (each is not None and (a.job.steps or 0) >= each)
    length = splits.train.length
    short = length is not None and each is not None and length % a.job.batch_size > 0
    if short and reaches and each is not None and 1 < steps < each:
        yield from _from_epoch(a, splits, 0, 0, steps - 1)
        yield from _from_epoch(a, splits, 0, each - 1, 1)
        return
    epoch = 0
    while left > 0:
        before = left
        for batch in _from_epoch(a, splits, epoch, 0, left):
            left -= 1
            yield batch
        if left == before:
            return
        epoch += 1


def _from_epoch(a: Assembly, splits: Splits, epoch: int, start: int, count: int) -> Iterator[Batch]:
    with closing(open_epoch(a, splits, epoch=epoch, start=start)) as stream:
        for _ in range(count):
            batch = next_batch(stream, a.samples, a.device)
            if batch is None:
                return
            yield batch


def altered(batch: Batch, task: Task) -> Batch:
    """The batch in the order and dtype of the run."""
    if task.order is not None and batch.count > 1:
        generator = torch.Generator().manual_seed(task.order)
        places = torch.randperm(batch.count, generator=generator)

        def move(leaf: Tensor) -> Tensor:
            return leaf[places] if leaf.dim() else leaf

        targets = None if batch.targets is None else tree_map(move, batch.targets)
        batch = replace(batch, inputs=tree_map(move, batch.inputs), targets=targets, indices=None)
    if task.double:
        batch = replace(batch, inputs=in_double(batch.inputs), targets=in_double(batch.targets))
    return batch


@final
class _Wide(Source):
    """The samples of a source in float64, for what a plan tries a float64 model out on."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def length(self) -> int | None:
        return self._source.length

    def read(self, reading: Reading) -> Generator[Batch, None, None]:
        with closing(self._source.read(reading)) as batches:
            for batch in batches:
                yield replace(batch, inputs=in_double(batch.inputs), targets=in_double(batch.targets))


def _doubled(model: nn.Module) -> nn.Module:
    """The module in float64, with the tensors that it keeps as plain attributes."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, in_double(value))
    model._apply(in_double)  # not model.double(), which leaves complex weights as they are
    return model


def _number(value: Tensor) -> float:
    full = value.full_tensor() if type(value).__name__ == "DTensor" else value  # type: ignore[attr-defined]
    return float(full)
