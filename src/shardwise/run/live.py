"""A run for people who keep their own training loop: batches, and one exact global step on each."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardwise.data.batch import Batch
from shardwise.data.loader import steps_per_epoch
from shardwise.data.randomness import BatchRandom
from shardwise.data.source import Splits, as_splits
from shardwise.errors import FolderError, JobError
from shardwise.run.alike import next_batch
from shardwise.run.assemble import Assembly
from shardwise.run.batches import Batches, batches_left
from shardwise.run.clock import BETWEEN_STEPS
from shardwise.run.conduct import Conduct
from shardwise.run.course import Position, make_equal, meet
from shardwise.run.evaluate import evaluate
from shardwise.run.export import save_weights
from shardwise.run.folder import RunFolder
from shardwise.run.keeper import Keeper
from shardwise.run.loop import open_epoch
from shardwise.run.made import MADE, Draws, check_objectives, make_batch
from shardwise.run.step import seed_loop, take_step
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.shares import share_bounds


@final
@dataclass(repr=False)
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
    _own_state: dict[str, Any] = field(default_factory=dict)
    _position: Position = field(default_factory=Position)
    _under_way: Batch | None = None
    _given: Batch | None = None
    _stepped: Batch | None = None
    _round: int | None = None
    _checked: set[str] = field(default_factory=set)
    _draws: Draws = field(default_factory=Draws)
    _losses: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._conduct = Conduct(self.assembly)

    def __repr__(self) -> str:
        where = "" if self.folder is None else f"{self.folder.path}: "
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        return f"LiveRun({where}{self.job.name}, {self.plan.layout}, {workers}, {self.steps_taken} steps, {self.epoch} epochs)"

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
        """Your own values (numbers, text, tensors, arrays, collections of these): in checkpoints, and back with `resume`.

        Rank 0's are kept, as they are when the loop asks for its next batch, ends, or calls `save`.
        """
        return self._state

    @property
    def own_state(self) -> dict[str, Any]:
        """As `state`, but each worker's own, such as its environments; they come back to as many workers as there were."""
        return self._own_state

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
            steps_left=None if steps is None else steps - self._steps(),
        )
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

    def rounds(self, count: int | None = None) -> Iterator[int]:
        """Numbers of the rounds of a loop that makes its own data, from 0, or from the round that a resumed run comes to next.

        A round is what the loop likes: a step of an environment and a training step, or many episodes and many steps on them.
        Checkpoints are written, and the run is stopped, between rounds only, so that a resumed run begins at the top of the loop.
        torch's generators are set there from (seed, round, rank).

        Args:
            count: rounds in all, with those before; None for as many as the job's `steps` take, or without an end.

        Raises:
            Stopped: as `batches`.
        """
        if self._round is not None or self._given is not None:
            raise JobError(
                "rounds() was asked for within a round or batch: only the outermost loop can be gone on with"
            )
        position = self._position
        self._between()
        while (count is None or position.rounds < count) and not self._steps_done():
            number, step, weights = position.rounds, self.assembly.step, self._conduct.written()
            seed_loop(self.assembly, number)
            self._round = number
            try:
                yield number
            finally:
                self._round = None
            if self.assembly.step == step:
                self._conduct.check_written(weights)
            position.rounds = number + 1
            self._between()

    def batch(self, inputs: Any, targets: Any = None, *, part: bool = False) -> Batch:
        """A global batch that the loop made, for `step`. Collective.

        Args:
            inputs: a tensor or array with a row for each sample, or a tuple or dict of these. The whole batch, the same on
                every worker, which takes its part of it.
            targets: the same, or None.
            part: these are samples of this worker's own, as many as it has; those of all workers, in rank order, are the batch.
                None for inputs if it has none. Where nobody has any, `global_count` is 0, and there is nothing to step on.

        Raises:
            JobError: they are no tensors of one length.
            DataError: workers gave different samples where they should give the same.
        """
        self.assembly.clock.mark("other")  # the loop's own time, of which nobody waits for data
        self.assembly.clock.begin_step(self.assembly.step)
        made = make_batch(self.assembly, inputs, targets, part=part)
        self.assembly.clock.mark("data")
        self.assembly.clock.current = BETWEEN_STEPS
        return made

    def share(self, count: int) -> range:
        """Which of so many environments, episodes or samples are this worker's, so that each is one worker's."""
        bounds = share_bounds(count, self.assembly.samples.size, self.assembly.division)
        return range(*bounds[self.assembly.samples.rank])

    def random(self, numbers: int | Iterable[int], name: str = "") -> BatchRandom:
        """Random numbers, the same for the same numbers on every worker, and under any number of workers.

        They are a function of (the job's seed, round, step, name, how many times this was called there with that name), and of
        each number.

        Args:
            numbers: of environments or samples, such as `run.share(64)`; or how many there are.
            name: what they are for.
        """
        place = (self._position.rounds if self._round is None else self._round, self.assembly.step)
        return self._draws.next(self.job.seed, place, name, numbers)

    def sum(self, value: Tensor | float) -> Tensor | float:
        """The sum of a number or tensor over the workers that hold other samples, the same on all of them. Collective."""
        if isinstance(value, Tensor):
            return self.assembly.samples.sum_(value.detach().clone(), "a sum of the loop's own")
        total = torch.tensor(value, dtype=torch.float64, device=self.assembly.device)
        return float(self.assembly.samples.sum_(total, "a sum of the loop's own"))

    def step(self, batch: Batch, objective: str | None = None) -> float:
        """One exact global step; returns the mean loss over the global batch, the same on every rank. Collective.

        Args:
            batch: from `batches` or `batch`.
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
                "of a DataLoader, goes to start(data=...), and what the loop makes to batch(inputs, targets)"
            )
        if batch.index == MADE:
            self._check_made(batch, objective)
        elif batch is not self._given:
            self._between()
        if batch is not self._stepped:
            self._stepped = batch
            self._position.batches += 1
        self.assembly.clock.mark("other")  # what the loop did since
        result = take_step(self.assembly, batch, objective)
        learning = self._conduct.learning()
        loss = result.loss_sum.detach() / result.weight
        # A rank without samples does not know in which type the others compute.
        values = [loss, *result.losses.values(), torch.tensor(learning, device=loss.device)]
        parts = torch.stack([value.double() for value in values])
        total, *each, of_all = self.assembly.reports.sum_(parts).tolist()
        self._conduct.check_mode(learning, of_all)
        self._losses.update(zip(result.losses, each, strict=True))
        if batch is self._under_way or batch.index == MADE:
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
        meet(self.assembly, "save()")
        return self._keeper.save()

    def save_weights(self, path: str | Path) -> None:
        """Write the weights as a safetensors file. Collective; rank 0 writes."""
        meet(self.assembly, "save_weights()")
        make_equal(self.assembly)
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
                else:
                    make_equal(self.assembly)
            return
        if self._keeper is not None:
            self._keeper.failed(error)
        self._stack.__exit__(kind, error, trace)

    def _between(self) -> None:
        if self._keeper is not None and self._round is None:
            self._keeper.between()

    def _check_made(self, batch: Batch, objective: str | None) -> None:
        """Refuse what no step can be taken on."""
        if not batch.global_count:
            raise JobError("step() was given a batch without samples on any worker: ask for batch.global_count first")
        if self._keeper is not None and self._round is None and self._given is None:
            raise JobError(
                "step() was given a batch that the loop made, outside of rounds: a run with a folder must know between which "
                "steps it may be saved, and begin again when it is resumed: write the loop as `for number in run.rounds():`"
            )
        names = {*self.assembly.turns} if objective is None else {objective} & {*self.assembly.turns}
        if batch.largest > 1 and (new := names - self._checked):
            self._checked |= new
            check_objectives(self.assembly, batch, sorted(new))

    def _steps(self) -> int:
        """What `Job.steps` counts: of several objectives each batch that is trained on is one, as in `train`."""
        return self._position.batches if self.job.turns else self.assembly.step

    def _steps_done(self) -> bool:
        return self.job.steps is not None and self._steps() >= self.job.steps

    def _done(self) -> None:
        """The batch that was given out last is trained on, or passed over; the round that is under way is not to come again."""
        if self._under_way is not None:
            self._position.batch += 1
            self._under_way = None
        if self._round is not None:
            self._position.rounds = self._round + 1

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
                weights = self._conduct.written()
                seed_loop(self.assembly, self._position.batch)
                try:
                    yield batch
                finally:
                    self._given = None
                if self._under_way is batch:
                    self._conduct.check_written(weights)
                self._done()
