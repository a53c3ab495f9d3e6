"""`start`: the exact global step for people who keep their own training loop."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, final

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.data.batch import Batch
from shardwise.data.loader import steps_per_epoch
from shardwise.data.source import Splits, as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.errors import FolderError, JobError
from shardwise.run.alike import next_batch
from shardwise.run.assemble import Assembly, assemble, check_is_job, check_job
from shardwise.run.balance import check_division
from shardwise.run.batches import Batches, batches_left
from shardwise.run.choose import choose_device
from shardwise.run.claim import check_alike
from shardwise.run.course import Position
from shardwise.run.evaluate import evaluate
from shardwise.run.export import save_weights
from shardwise.run.folder import RunFolder
from shardwise.run.heap import give_freed_memory_back
from shardwise.run.keeper import Keeper
from shardwise.run.launch import current_rank
from shardwise.run.loop import open_epoch, total_steps
from shardwise.run.options import TrainOptions, make_options, parse_saving, resolve_plan
from shardwise.run.progress import Remarks, tell
from shardwise.run.session import Work, open_session
from shardwise.run.signals import StopRequest
from shardwise.run.step import take_step
from shardwise.run.train import job_identity, job_settings
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.rank import SERIAL, Rank


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
    _stack: ExitStack = field(default_factory=ExitStack)
    _keeper: Keeper | None = None
    _state: dict[str, Any] = field(default_factory=dict)
    _position: Position = field(default_factory=Position)
    _under_way: Batch | None = None
    _given: Batch | None = None
    _losses: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The module that is being trained, in place."""
        return self.assembly.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that is being stepped; where there are several, one over all, with them in `each` and `named`."""
        return self.assembly.optimizer

    @property
    def losses(self) -> dict[str, float]:
        """Of a job with several objectives, the mean loss that each last had; empty for others."""
        return dict(self._losses)

    @property
    def steps_taken(self) -> int:
        """Global steps so far, with those before a `resume`."""
        return self.assembly.step

    @property
    def epoch(self) -> int:
        """Passes over the training split that are complete."""
        return self._position.epoch

    @property
    def rank(self) -> int:
        """Number of this worker; do printing and the like on rank 0 only."""
        return self.assembly.world.rank

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.assembly.world.size

    @property
    def state(self) -> dict[str, Any]:
        """Your own values, plain ones and small tensors, that go into checkpoints and come back with `resume`.

        Rank 0's are kept, as they are when the loop asks for its next batch, ends, or calls `save`.
        """
        return self._state

    @property
    def folder(self) -> RunFolder | None:
        """The run folder; None where no `out` was given."""
        return None if self._keeper is None else self._keeper.session.folder

    def batches(self, *, epochs: int | None = None) -> Batches:
        """This rank's parts of the global batches, over all epochs or steps of the job.

        `len` of it is their number, unless the data is a stream or a loop without an end. After a `break`, the next call
        goes on with the batch that comes next, in the same epoch.

        Args:
            epochs: passes over the training split, of which one that is under way counts as one; None for what the job
                says: in all where the run has a folder, so that a resumed run does the rest, else from here on.

        Raises:
            Stopped: the run has a folder, and a rank was sent SIGINT or SIGTERM: it is saved and ended. Raised where the next
                batch is asked for.
        """
        first_epoch = 0 if epochs is None and self._keeper is not None else self.epoch
        limit = epochs if epochs is not None else self.job.epochs
        steps = self.job.steps if epochs is None else None
        total = batches_left(
            each=steps_per_epoch(self.splits.train, self.job.batch_size),
            epochs=None if limit is None else limit - (self.epoch - first_epoch),
            batch=self._position.batch,
            steps_left=None if steps is None else steps - self.assembly.step,
        )
        if steps is not None and self.job.turns:
            total = None  # a batch may take several of them
        return Batches(self._batches(epochs, first_epoch, limit), total)

    def _batches(self, epochs: int | None, first_epoch: int, limit: int | None) -> Generator[Batch, None, None]:
        self._between()
        while limit is None or self.epoch - first_epoch < limit:
            if epochs is None and self._steps_done():
                return
            before = self._position.batch
            for batch in self._epoch():
                yield batch
                self._between()
                if epochs is None and self._steps_done():
                    return
            if before == self._position.batch == 0:
                raise JobError("the training split gave no batch in a whole epoch: the data is empty")
            if self._keeper is not None:
                self._keeper.end_epoch()
            else:
                self._position.epoch, self._position.batch = self.epoch + 1, 0

    def step(self, batch: Batch, objective: str | None = None) -> float:
        """One exact global step; returns the mean loss over the global batch, the same on every rank. Collective.

        Args:
            batch: from `batches`.
            objective: of a job with several, the one to take; its optimizers step. None takes all in their order, a step of
                their optimizers each, and returns the sum of the losses. `losses` has each of them.

        Where the run has a folder, a checkpoint that falls due is written when the loop asks for its next batch, or takes a step
        on another batch than the last that `batches` gave.

        Raises:
            Stopped: as `batches`.
        """
        if not isinstance(batch, Batch):
            raise JobError(
                f"step() was given a {type(batch).__name__}: give it what batches() gives; data of your own, also the data set "
                "of a DataLoader, goes to start(data=...)"
            )
        if batch is not self._given:
            self._between()
        result = take_step(self.assembly, batch, objective)
        parts = torch.stack([result.loss_sum.detach() / result.weight, *result.losses.values()])
        total, *each = self.assembly.reports.sum_(parts).tolist()
        self._losses.update(zip(result.losses, each, strict=True))
        if batch is self._under_way:
            self._done()
        if self._keeper is not None:
            self._keeper.stepped(batch, result)
        return float(total)

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Loss and metrics over the test split, or over other data, each sample counted once. Collective.

        Raises:
            JobError: the job has no test split and no data was given.
        """
        if data is not None:
            return evaluate(self.assembly, as_splits(data).train)[0]
        if self.splits.test is None:
            raise JobError("the job's data has no test split: give evaluate() the data")
        if self._keeper is not None:
            return self._keeper.evaluate()
        return evaluate(self.assembly, self.splits.test)[0]

    def save(self) -> Path:
        """Write a checkpoint of model, optimizer, schedule, position and `state` now; returns its folder. Collective.

        Raises:
            FolderError: the run has no folder.
        """
        if self._keeper is None:
            raise FolderError("this run has no folder to save in: give start(..., out=DIR)")
        return self._keeper.save()

    def save_weights(self, path: str | Path) -> None:
        """Write the weights as a safetensors file. Collective; rank 0 writes."""
        self.assembly.average()
        save_weights(self.assembly.model, Path(path))

    def close(self) -> None:
        """End the run: where it has a folder, with a last checkpoint, its weights and summary. Collective."""
        self.__exit__(None, None, None)

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._stack:
                if self._keeper is not None:
                    self._keeper.finish()
            return
        if self._keeper is not None:
            self._keeper.failed(error)
        self._stack.__exit__(kind, error, trace)

    def _between(self) -> None:
        if self._keeper is not None:
            self._keeper.between()

    def _steps_done(self) -> bool:
        return self.job.steps is not None and self.assembly.step >= self.job.steps

    def _done(self) -> None:
        """The batch that was given out last is trained on, or passed over."""
        if self._under_way is not None:
            self._position.batch += 1
            self._under_way = None

    def _epoch(self) -> Iterator[Batch]:
        a, clock = self.assembly, self.assembly.clock
        if self._keeper is not None:
            self._keeper.begin_epoch()
        with closing(open_epoch(a, self.splits, epoch=self.epoch, start=self._position.batch)) as stream:
            while True:
                clock.begin_step(a.step)
                batch = next_batch(stream, a.samples, a.device)
                clock.mark("data")
                if batch is None:
                    return
                self._under_way = self._given = batch
                weights = _changes(a) if a.world.size > 1 else 0
                try:
                    yield batch
                finally:
                    self._given = None
                if self._under_way is batch and a.world.size > 1 and _changes(a) != weights:
                    raise JobError(
                        "the weights changed, but the batch was not given to run.step(): with an optimizer.step() of its own, "
                        f"each of {a.world.size} workers trains alone, on its own part of the data. Replace the forward pass, "
                        "backward(), optimizer.step() and zero_grad() by loss = run.step(batch)"
                    )
                self._done()


def _changes(a: Assembly) -> int:
    """Grows whenever something writes to a parameter."""
    return sum(parameter._version for parameter in a.parameters)


def start(
    job: Job | None = None,
    *,
    plan: Plan | str | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    checkpoint_every: str = "10m",
    keep_last: int = 2,
    **fields_of_job: Any,
) -> LiveRun:
    """Make a job ready for a loop of your own.

    In a plain process this is a run on one worker; the same script under `torchrun --nproc-per-node N` is a run on N.

    Args:
        job: what to train; or give its fields as keyword arguments. `epochs` may be left out there (1 is taken).
        plan: a plan or layout; the running number of workers as data parallelism by default.
        device: `auto`, `cpu`, or an accelerator.
        out: the run folder, for checkpoints, events and the final weights; None keeps nothing.
        resume: go on from the last checkpoint in `out`; `auto`: if there is a run. Workers that torchrun starts again
            after a failure always do.
        checkpoint_every: with `out`, `"500"` (steps), `"10m"`, `"30s"` (time), or `"never"` for none but the last.
        keep_last: number of checkpoints kept.
        fields_of_job: `model=..., optimizer=..., loss=..., data=..., batch_size=...`. `model` may be a module itself
            and `optimizer` must then be a function of its parameters.

    Raises:
        UserError: the job, data, plan or folder is wrong.
    """
    began = time.time()
    if job is None:
        job = _job_of(fields_of_job)
    elif fields_of_job:
        raise JobError(f"start was given a job and its field {next(iter(fields_of_job))!r}: give one or the other")
    check_is_job(job, "start")
    kind = choose_device(device)
    rank = current_rank() or SERIAL
    options = make_options(
        TrainOptions(checkpoint_every=checkpoint_every, keep_last=keep_last, progress=False),
        {"plan": plan, "device": kind, "out": out, "resume": resume},
    )
    settled = resolve_plan(job, options, device=kind, world=rank.workers)
    check_job(job, settled)
    splits = as_splits(job.data)
    check_division(splits, settled)
    with ExitStack() as stack:
        stack.callback(give_freed_memory_back)  # the process is its owner's again
        stop = stack.enter_context(StopRequest()) if out is not None else StopRequest()
        stack.enter_context(process_group(rank, kind, options.timeout_seconds))
        if rank.workers > 1 and settled.threads is not None:
            torch.set_num_threads(settled.threads)
        if options.out is None:
            device_here = torch.device(kind, rank.local_rank) if kind != "cpu" else torch.device("cpu")
            run = _without_folder(job, settled, splits, device_here)
        else:
            run = _with_folder(stack, stop, rank, job, settled, splits, options, began)
        run._stack = stack.pop_all()
        return run


def _without_folder(job: Job, plan: Plan, splits: Splits, device: torch.device) -> LiveRun:
    total = total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps)
    if Group.world().size > 1:
        check_alike(job, splits, job_identity(job), Group.world())
    assembly = assemble(job, plan, Group.world(), device, total_steps=total)
    assembly.looks_at_losses = True
    if assembly.world.rank == 0:
        for remark in assembly.composed.remarks:
            tell(f"warning: {remark}")
    return LiveRun(job, plan, splits, assembly)


def _with_folder(
    stack: ExitStack,
    stop: StopRequest,
    rank: Rank,
    job: Job,
    plan: Plan,
    splits: Splits,
    options: TrainOptions,
    began: float,
) -> LiveRun:
    work = Work(
        job=job,
        splits=splits,
        reference=None,
        plan=plan,
        device=options.device,
        saving=parse_saving(options.checkpoint_every, options.keep_last),
        out=str(options.out),
        folder_ready=False,
        resume=options.resume,
        progress=False,
        timeout_seconds=options.timeout_seconds,
        stall_seconds=options.stall_seconds,
        settings=job_settings(job, plan, options),
        identity=job_identity(job),
        began=began,
        own_loop=True,
        evaluate_every=0,
    )
    session = stack.enter_context(open_session(rank, work, stop, shown=Remarks()))
    course = session.course
    return LiveRun(
        job, plan, splits, session.assembly, _keeper=Keeper(session), _state=course.state, _position=course.position
    )


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
