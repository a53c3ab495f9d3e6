"""One training of a sweep, as a task: what its worker is told, and what it answers. Loads torch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from shardwise.data.folds import fold
from shardwise.data.source import as_splits
from shardwise.dist.collectives import Group
from shardwise.errors import FolderError, JobError
from shardwise.run.assemble import assemble
from shardwise.run.build import build_model
from shardwise.run.command import change_job, divide_changes
from shardwise.run.evaluate import evaluate
from shardwise.run.export import load_weights
from shardwise.run.folder import RunFolder
from shardwise.run.jobfile import find_job
from shardwise.run.train import job_identity, train
from shardwise.spec.events import EvaluationEvent, read_events
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan


@final
@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: a combination, on one fold, with one seed. Plain data; every rank of it builds the same job.

    Attributes:
        job: as on the command line, with an absolute path.
        folders: that must be importable.
        settings: names and texts of the job function's arguments.
        changes: fields of the job that are overruled.
        seed_step: added to the job's seed.
        fold: (number, of how many, seed of the division), None for the job's own test split.
        plan, threads, device: how it runs.
        folder: its run folder.
        pause_after: epochs (or steps) after which it ends with a checkpoint; None for its whole length.
        checkpoint_every: as in `TrainOptions`.
    """

    job: str
    folders: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    changes: Mapping[str, Any]
    seed_step: int
    fold: tuple[int, int, int] | None
    plan: str
    threads: int
    device: str
    folder: str
    pause_after: int | None = None
    checkpoint_every: str = "10m"


def build_job(training: Training) -> Job:
    """The job of a training, from its description alone."""
    return _load(training)[0]


def _load(training: Training) -> tuple[Job, Mapping[str, tuple[Any, str]]]:
    """The same, and the arguments of its function with where each came from."""
    for folder in training.folders:
        if folder not in sys.path:
            sys.path.insert(0, folder)
    found = find_job(training.job)
    settings, changes = divide_changes(dict(training.settings), training.changes, found)
    loaded = found.call(settings)
    job = change_job(loaded.job, changes)
    if training.seed_step:
        if "seed" in found.parameters and "seed" not in settings:
            # The job may derive more from its seed than the field of that name.
            again = found.call({**settings, "seed": str(job.seed + training.seed_step)})
            job = change_job(again.job, changes)
        else:
            job = replace(job, seed=job.seed + training.seed_step)
    if training.fold is not None:
        number, folds, seed = training.fold
        job = replace(job, data=fold(job.data, number, folds, seed))
    return job, loaded.hyper_parameters


def run_training(training: Training) -> dict[str, Any]:
    """Train, or go on from where the training was paused or killed.

    Returns:
        Plain values: `metrics`, `loss`, `steps`, `curve` (a list of (step, metrics)), `paused`, `parameters`,
        `seconds`, `peak_memory_bytes`, `run`.
    """
    job, hyper_parameters = _load(training)
    place = Path(training.folder)
    run = train(
        job,
        plan=training.plan,
        threads=training.threads,
        device=training.device,
        out=place,
        resume=_is_run(place),
        checkpoint_every=training.checkpoint_every,
        last_checkpoint=False,
        keep_last=1,
        pause_after=training.pause_after,
        progress=False,
        hyper_parameters=hyper_parameters,
        identity={
            **job_identity(job),
            **{f"set.{name}": text for name, text in training.settings},
            "fold": training.fold,
        },
    )
    summary = run.summary
    curve = {
        event.step: dict(event.metrics)
        for event in read_events(place / "events.jsonl")
        if isinstance(event, EvaluationEvent)
    }
    return {
        "metrics": run.metrics,
        "loss": summary["loss"],
        "steps": summary["steps"],
        "curve": sorted(curve.items()),
        "paused": summary["paused"],
        "parameters": summary["parameters"],
        "seconds": summary["wall_seconds"],
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in summary["ranks"]),
        "run": str(place),
    }


def evaluate_together(trainings: Sequence[Training]) -> dict[str, float]:
    """Metrics on the test split of one model whose output is the mean of the trained models' outputs.

    Raises:
        JobError: the job has no test split, or computes its loss inside the model, where there is no output to average.
    """
    jobs = [build_job(training) for training in trainings]
    job = jobs[0]
    test = as_splits(job.data).test
    if test is None or job.loss is None:
        missing = (
            "has no test split" if test is None else "has an objective and no loss, so there is no output to average"
        )
        raise JobError(f"job {job.name} {missing}: an ensemble cannot be evaluated")
    device = torch.device("cpu")
    members = []
    for one, training in zip(jobs, trainings, strict=True):
        member = build_model(one, device)
        load_weights(member, RunFolder.open(training.folder).weights_path)
        members.append(member)
    together = replace(job, model=lambda: Ensemble(members), schedule=None)
    plan = Plan(layout=Layout(), threads=1)
    assembly = assemble(together, plan, Group.world(), device, total_steps=None)
    return evaluate(assembly, test)[0]


@final
class Ensemble(nn.Module):
    """The mean of several models' outputs."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _mean([member(*args, **kwargs) for member in self.members])


def _mean(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, dict):
        return {key: _mean([output[key] for output in outputs]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_mean([output[index] for output in outputs]) for index in range(len(first)))
    return torch.stack(outputs).mean(0)


def _is_run(place: Path) -> bool:
    """Whether there is something to go on from; what a kill left of a folder that was being made is removed."""
    try:
        RunFolder.open(place)
    except FolderError:
        if place.is_dir():
            shutil.rmtree(place)
        return False
    return True
