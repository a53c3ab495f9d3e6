"""Who may write a run folder: one run, and only as what it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.errors import FolderError, UserError
from shardwise.run.folder import RunFolder, write_aside, writing_in
from shardwise.run.holdings import difference, held
from shardwise.spec.events import read_events
from shardwise.spec.job import Job

_BEFORE_STEPS = {
    *("run.json", "identity.json", "settings.json", "plan.json", "tensor.txt"),
    *("events.jsonl", "checkpoints", "positions", ".lock"),
}
"""What a run writes before its first step."""


@contextmanager
def open_folder(
    out: str | Path | None, name: str, world: Group, *, resume: bool, ready: bool = False
) -> Iterator[tuple[RunFolder, bool]]:
    """The run folder on every rank, and whether its run goes on, as rank 0 found it. Collective.

    A folder that rank 0 cannot have is an error on every rank, raised on all of them alike.

    Args:
        out: where; None lets rank 0 make one.
        name: of the job.
        world: all ranks.
        resume: a run is to go on; one rank that says so is enough.
        ready: the launching process made the folder and holds its lock; else rank 0 does both.
    """
    if ready:
        yield RunFolder.open(out or ""), resume
        return
    with ExitStack() as stack:
        # Of nodes that torchrun starts again together, only one whose own worker failed counts a restart.
        resume = any(world.gather_objects(resume))
        answer: tuple[str, bool] | UserError = ("", False)
        if world.rank == 0:
            try:
                folder = stack.enter_context(claimed(out, name, resume=resume))
                answer = (str(folder.path), resume)
            except UserError as error:
                answer = error
        agreed = world.gather_objects(answer)[0]
        if isinstance(agreed, UserError):
            raise agreed
        path, resume = agreed
        blind = [rank for rank, seen in enumerate(world.gather_objects(Path(path).is_dir())) if not seen]
        if blind:
            raise FolderError(
                f"rank {blind[0]} does not see the run folder {path}, which rank 0 has made: --out must be on a disk that all "
                "machines share, by the same path on each"
            )
        yield RunFolder.open(path), resume
        world.barrier()


def check_place(out: str | Path | None, *, resume: bool) -> None:
    """What `claimed` would refuse, so far as it shows by looking: before a plan is tried or a proof is run for nothing.

    Raises:
        FolderError: as there.
    """
    if resume:
        _to_resume(out)
    elif out is not None and not _never_trained(folder := RunFolder(Path(out))):
        folder.check_empty()


def _to_resume(out: str | Path | None) -> RunFolder:
    if out is None:
        raise FolderError("resume needs the run folder: give the one to continue with --out (out=)")
    return RunFolder.open(out)


@contextmanager
def claimed(out: str | Path | None, name: str, *, resume: bool) -> Iterator[RunFolder]:
    """A new run folder, or with `resume` the existing one, owned for the length of the block.

    A new one that is left with a `UserError` before a step was taken is removed: nothing was started. One that such a run left
    by other ways, such as `kill -9`, counts as empty.

    Raises:
        FolderError: `resume` without a folder to resume, or a folder that cannot be used.
    """
    if resume:
        folder = _to_resume(out)
        with folder.lock():
            yield folder
        return
    own = out is None or not Path(out).exists()
    if out is not None and _never_trained(left := RunFolder(Path(out))):
        with left.lock():
            _clear(left)
    folder = RunFolder.create(out, name)
    with folder.lock():
        try:
            yield folder
        except UserError:
            if _never_trained(folder):
                _clear(folder)
                if own:
                    folder.path.rmdir()
            raise


def _never_trained(folder: RunFolder) -> bool:
    """Whether the folder holds what a run writes before its first step, and nothing else."""
    if not (folder.path / "run.json").is_file():
        return False
    for item in folder.path.iterdir():
        half_written = item.name.startswith(".") and item.suffix == ".tmp"
        if not half_written and (item.name not in _BEFORE_STEPS or (item.is_dir() and any(item.iterdir()))):
            return False
    kinds = {event.kind for event in read_events(folder.events_path)} if folder.events_path.exists() else set()
    return kinds <= {"run", "warning", "failure", "restart"}


def _clear(folder: RunFolder) -> None:
    with writing_in(folder.path):
        for item in folder.path.iterdir():
            if item.is_dir():
                item.rmdir()
            else:
                item.unlink()


def check_alike(job: Job, splits: Splits, identity: Mapping[str, Any], world: Group) -> None:
    """Ranks that were started one by one were started for the same run, with the same code and data. Collective.

    Raises:
        UserError: names what differs.
    """
    every = world.gather_objects((json.loads(json.dumps(dict(identity), default=str)), held(job, splits)))
    for rank, (theirs, holds) in enumerate(every):
        # Copies of the weights stay equal where only the data, its order or the loss differs.
        file = {"job": theirs["job"]} if "job" in theirs else {}  # it may lie elsewhere on another node
        first = {**every[0][0], **file}
        if theirs != first:
            changes = _changes(first, theirs, "{key} is {before!r} on rank 0 and {now!r} on rank {rank}", rank)
            raise UserError(f"the workers were started with different settings: {changes}; start all with the same")
        differs = difference(every[0][1], holds, rank)
        if differs is not None:
            raise UserError(f"the workers were started for different runs: {differs}")


def check_identity(folder: RunFolder, identity: Mapping[str, Any], *, resume: bool, world: Group) -> None:
    """A run is resumed only as what it was. Collective.

    Raises:
        UserError: names the settings that differ.
    """
    path = folder.path / "identity.json"
    now = json.loads(json.dumps(dict(identity), default=str))
    every = world.gather_objects(path.exists())
    if not every[0]:
        if world.rank == 0:
            with writing_in(folder.path):
                write_aside(path, json.dumps(dict(identity), indent=2, default=str).encode() + b"\n")
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FolderError(f"{path} cannot be read ({error}): the run folder is damaged") from error
    changes = _changes(before, now, "{key} was {before!r} and is now {now!r}")
    if resume and changes:
        raise FolderError(
            f"{folder.path} holds another run: {changes}. A resumed run must be the same run; start a new one in "
            "another --out, or give the settings it was started with"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], form: str, rank: int = 0) -> str:
    differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return ", ".join(form.format(key=key, before=before.get(key), now=now.get(key), rank=rank) for key in differ)
