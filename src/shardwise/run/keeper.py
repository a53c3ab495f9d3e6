"""Keeper: what a run whose loop the user writes leaves in its folder: events, checkpoints, and its end."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path
from time import perf_counter
from typing import Any, final

import torch

from shardwise.data.batch import Batch
from shardwise.errors import RunFailed, Stopped
from shardwise.run.assemble import Assembly
from shardwise.run.clock import BETWEEN_STEPS
from shardwise.run.course import (
    end_epoch,
    evaluate_test,
    make_equal,
    meet,
    note_step,
    open_books,
    save_checkpoint,
    settle,
)
from shardwise.run.session import Session
from shardwise.run.step import StepResult
from shardwise.spec.events import FailureEvent


@final
class Keeper:
    """Keeps a run; the loop says what happens. All its methods are collective, except `failed`.

    Args:
        session: under way.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._assembly, self._course = session.assembly, session.course
        self._ledger, self._observer = open_books(self._assembly, self._course)
        # What the loop does after a step (another one on the batch, its own `state`, a weight it clips) belongs to the step.
        self._course.saves_between = True
        self._epoch_began = perf_counter()
        self._ended = False
        self._saved: tuple[tuple[int, ...], bytes] | None = None
        self._assembly.clock.restart()

    def begin_epoch(self) -> None:
        """Batches of an epoch are about to be read."""
        self._epoch_began = perf_counter()

    def stepped(self, batch: Batch, result: StepResult) -> None:
        """A step was taken. Whether more are taken on this batch, the loop knows: what is due comes `between` batches."""
        note_step(self._assembly, self._course, self._ledger, self._observer, batch, result, last=False)
        self._assembly.clock.current = BETWEEN_STEPS

    def between(self) -> None:
        """No batch is under way, and what the loop did after its last step is done: a checkpoint that is due is written.

        Raises:
            Stopped: a rank was asked to stop; the run is saved and ended.
        """
        if self._ended:
            return
        if self._course.save_due and not self._course.stopped:
            self.save()
        if self._course.stopped:
            self._end(weights=False)
            raise Stopped(
                f"stopped; everything up to step {self._assembly.step} is saved in {self.session.folder.path}: "
                f"continue with start(..., out={str(self.session.folder.path)!r}, resume=True)"
            )

    def end_epoch(self) -> None:
        """All batches of the epoch were read."""
        self._settle()
        end_epoch(self._assembly, self._course, perf_counter() - self._epoch_began)

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics over the test split, noted as the run's."""
        metrics = evaluate_test(self._assembly, self._course)
        self._ledger.skip_time()
        return metrics

    def save(self) -> Path:
        """Write a checkpoint now."""
        self._settle()
        make_equal(self._assembly)
        save_checkpoint(self._assembly, self._course)
        self._saved = self._stands_at()
        self._ledger.skip_time()
        return self._course.folder.checkpoints / f"step-{self._assembly.step:08d}"

    def finish(self) -> None:
        """The loop ended well: the last checkpoint, the weights, the summary."""
        if not self._ended:
            meet(self._assembly, "the end of the loop")
            self._settle()
            self._end(weights=True)

    def failed(self, error: BaseException) -> None:
        """The loop ended with an error."""
        ended, self._ended = self._ended, True
        if isinstance(error, Exception) and not ended:
            details = "".join(traceback.format_exception(error))
            rank = error.rank if isinstance(error, RunFailed) else None
            self._course.tell(FailureEvent(message=str(error) or type(error).__name__, rank=rank, details=details))

    def _settle(self) -> None:
        if self._ledger.settle_pending:
            settle(self._assembly, self._course, self._ledger, self._observer)

    def _stands_at(self) -> tuple[tuple[int, ...], bytes] | None:
        """Tells what a checkpoint would hold: after a step's own, the epoch may end, and the user may note or write something.

        None where the user notes what no checkpoint can hold, which the next one says in words.
        """
        a, course = self._assembly, self._course
        try:
            noted = pickle.dumps((course.state, course.own_state))
        except Exception:  # noqa: BLE001  # objects say so in their own ways
            return None
        position = course.position
        return (a.step, position.epoch, position.batch, position.rounds, written(a)), noted

    def _is_saved(self) -> bool:
        """Whether the last checkpoint holds all there is. The same on all ranks, of which one alone may have noted something."""
        stands = self._stands_at()
        differs = torch.tensor(float(stands is None or stands != self._saved), device=self._assembly.device)
        return not self._assembly.world.sum_(differs, "whether a checkpoint is due").item()

    def _end(self, *, weights: bool) -> dict[str, Any]:
        self._ended = True
        make_equal(self._assembly)
        if not self._is_saved():
            save_checkpoint(self._assembly, self._course)
        return self.session.finish(weights=weights)


def written(a: Assembly) -> int:
    """Grows whenever something writes to a parameter."""
    return sum(parameter._version for parameter in a.parameters)
