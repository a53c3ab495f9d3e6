"""Who may write a run folder: one run, and only as what it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shardwise.dist.collectives import Group
from shardwise.errors import FolderError, UserError
from shardwise.run.folder import RunFolder, write_aside, writing_in


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
        resume: a run is to go on.
        ready: the launching process made the folder and holds its lock; else rank 0 does both.
    """
    if ready:
        yield RunFolder.open(out or ""), resume
        return
    with ExitStack() as stack:
        answer: tuple[str, bool] | UserError = ("", False)
        if world.rank == 0:
            try:
                folder = claim_folder(out, name, resume=resume)
                stack.enter_context(folder.lock())
                answer = (str(folder.path), resume)
            except UserError as error:
                answer = error
        agreed = world.gather_objects(answer)[0]
        if isinstance(agreed, UserError):
            raise agreed
        path, resume = agreed
        yield RunFolder.open(path), resume
        world.barrier()


def claim_folder(out: str | Path | None, name: str, *, resume: bool) -> RunFolder:
    """A new run folder, or with `resume` the existing one.

    Raises:
        FolderError: `resume` without a folder to resume, or a folder that cannot be used.
    """
    if not resume:
        return RunFolder.create(out, name)
    if out is None:
        raise FolderError("resume needs the run folder: give the one to continue with --out (out=)")
    return RunFolder.open(out)


def check_identity(folder: RunFolder, identity: Mapping[str, Any], *, resume: bool, world: Group) -> None:
    """A run is one run on all ranks, and resumed only as what it was. Collective.

    Raises:
        UserError: names the settings that differ.
    """
    path = folder.path / "identity.json"
    now = json.loads(json.dumps(dict(identity), default=str))
    every = world.gather_objects((now, path.exists()))
    for rank, (theirs, _) in enumerate(every):
        # Nodes, and ranks of torchrun, are started one by one: copies stay equal where only the data or its order differs.
        first = {
            **every[0][0],
            **({"job": theirs["job"]} if "job" in theirs else {}),
        }  # a file may lie elsewhere on another node
        if theirs != first:
            changes = _changes(first, theirs, "{key} is {before!r} on rank 0 and {now!r} on rank {rank}", rank)
            raise UserError(f"the workers were started with different settings: {changes}; start all with the same")
    if not every[0][1]:
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
