"""A checkpoint in the middle of a candidate: written, read into what is built anew, and gone on from, as by a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch

from shardwise.data.source import Splits
from shardwise.prove.record import RankReport, Recorder, digest
from shardwise.run.assemble import Assembly
from shardwise.run.checkpoint import latest
from shardwise.run.course import Course, Position, Saving, make_equal, save_checkpoint
from shardwise.run.folder import RunFolder
from shardwise.run.progress import Silent
from shardwise.run.session import go_on


@final
class Middle:
    """What is kept of a run that ends in the middle."""

    def __init__(self, a: Assembly, splits: Splits, folder: Path) -> None:
        """Write the checkpoint. Collective."""
        self._folder = RunFolder(folder)
        self._splits = splits
        if a.world.rank == 0:
            self._folder.checkpoints.mkdir()
        a.world.barrier()
        course = Course(
            splits=splits,
            folder=self._folder,
            saving=Saving(),
            log=None,
            display=Silent(),
            stop_requested=lambda: False,
            position=Position(batch=a.step),
        )
        make_equal(a)
        self._step, self._held = a.step, _digests(a)
        save_checkpoint(a, course)

    def take_up(self, a: Assembly, report: RankReport) -> None:
        """Put a new assembly where the checkpoint stands, and note what of it is not what was saved. Collective."""
        go_on(a, latest(self._folder), self._splits.train, balance=False)
        now = _digests(a)
        report.resumed_after = self._step
        report.restored = len(self._held)
        report.lost = sorted(key for key in {*self._held, *now} if self._held.get(key) != now.get(key))


def _digests(a: Assembly) -> dict[str, bytes]:
    """Of all tensors and numbers that the training goes on from."""
    recorder = Recorder(RankReport(a.world.rank))
    recorder.take_state("of", a)
    recorder.tensors["of/step"] = torch.tensor(a.step)
    if a.scheduler is not None:
        recorder.take_numbers("of/schedule", a.scheduler.state_dict())
    return {key.removeprefix("of/"): digest(tensor) for key, tensor in recorder.tensors.items()}
