"""What comes of the best trials: their weights, and all of them as one model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.errors import FolderError, UserError
from shardwise.run.folder import RunFolder, write_aside, writing_in
from shardwise.tasks.options import Options
from shardwise.tasks.pool import Pool
from shardwise.tasks.progress import Meter
from shardwise.tasks.sweep.halving import Trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardwise.tasks.sweep.trial import Training


def check_place(place: Path | str | None) -> None:
    """Refuse a folder for winners that holds something, before anything is trained.

    Raises:
        FolderError: it does.
    """
    if place is not None and Path(place).exists() and any(Path(place).iterdir()):
        raise FolderError(f"--export {place}: the folder is not empty; give a new one")


def best_complete(trials: list[Trial], count: int, rungs: int) -> list[Trial]:
    """The best trials that were trained to the end.

    Raises:
        UserError: none was.
    """
    complete = [trial for trial in trials if trial.rung == rungs - 1 and trial.value is not None]
    if not complete:
        raise UserError("no trial was trained to the end, so there is nothing to export")
    return complete[:count]


def run_task(training: Any) -> dict[str, Any]:
    """One training, in its worker."""
    from shardwise.tasks.sweep.trial import run_training

    return run_training(training)


def train_whole(
    trials: list[Trial],
    describe: Callable[[Trial], Training],
    folder: RunFolder,
    pool: Pool,
    options: Options,
    meter: Meter,
) -> list[Training]:
    """Winners of a cross-validation saw a part of the data each: train them on all of it.

    Raises:
        TaskFailed: one of these trainings failed.
    """
    trainings = [
        replace(
            describe(trial), fold=None, pause_after=None, folder=str(folder.path / "winners" / f"{trial.number:04d}")
        )
        for trial in trials
    ]
    with pool.graph(store=folder.path / "winners.sqlite", resume=True, meter=meter) as graph:
        handles = [
            graph.add(run_task, training, options=options, name=f"winner {trial.number}")
            for trial, training in zip(trials, trainings, strict=True)
        ]
        graph.run()
        for handle in handles:
            graph.result(handle)
    return trainings


def export(trials: list[Trial], trainings: list[Training], place: Path, metric: str) -> list[dict[str, Any]]:
    """A folder for each winner, best first: `1/model.safetensors` and `1/settings.json`."""
    exported = []
    for number, (trial, training) in enumerate(zip(trials, trainings, strict=True), start=1):
        target = place / str(number)
        record = {
            "trial": trial.number,
            "job": training.job,
            "settings": dict(training.settings),
            "changes": dict(training.changes),
            metric: trial.value,
            "run": training.folder,
        }
        with writing_in(place):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RunFolder.open(training.folder).weights_path, target / "model.safetensors")
            write_aside(target / "settings.json", json.dumps(record, indent=2).encode() + b"\n")
        exported.append({"path": str(target), **record})
    return exported


def evaluate_ensemble(trainings: list[Training], pool: Pool) -> dict[str, float]:
    """Metrics on the test split of the mean of the models' outputs."""
    metrics: dict[str, float] = next(pool.map(_evaluate, [trainings]))
    return metrics


def _evaluate(trainings: list[Training]) -> dict[str, float]:
    from shardwise.tasks.sweep.trial import evaluate_together

    return evaluate_together(trainings)
