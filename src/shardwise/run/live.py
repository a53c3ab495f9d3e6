"""A run for people who keep their own training loop: batches, and one exact global step on each."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.data.batch import Batch
from shardwise.data.loader import steps_per_epoch
from shardwise.data.source import Splits, as_splits
from shardwise.errors import FolderError, JobError
from shardwise.run.alike import next_batch
from shardwise.run.assemble import Assembly
from shardwise.run.batches import Batches, batches_left
from shardwise.run.course import Position
from shardwise.run.evaluate import evaluate
from shardwise.run.export import save_weights
from shardwise.run.folder import RunFolder
from shardwise.run.keeper import Keeper, written
from shardwise.run.loop import open_epoch
from shardwise.run.step import take_step
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan


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
        self.assembly.clock.mark("other")  # what the loop did since
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
                clock.mark("other")  # what the loop did after its step
                clock.begin_step(a.step)
                batch = next_batch(stream, a.samples, a.device)
                clock.mark("data")
                if batch is None:
                    return
                self._under_way = self._given = batch
                weights = written(a) if a.world.size > 1 else 0
                try:
                    yield batch
                finally:
                    self._given = None
                if self._under_way is batch and a.world.size > 1 and written(a) != weights:
                    raise JobError(
                        "the weights changed, but the batch was not given to run.step(): with an optimizer.step() of its own, "
                        f"each of {a.world.size} workers trains alone, on its own part of the data. Replace the forward pass, "
                        "backward(), optimizer.step() and zero_grad() by loss = run.step(batch)"
                    )
                self._done()
