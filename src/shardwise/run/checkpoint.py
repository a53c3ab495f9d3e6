"""Checkpoints: complete or absent, and readable under another layout.

A checkpoint is a folder `checkpoints/step-00000500` with DCP's files and `checkpoint.json`, the manifest: progress,
scheduler, the structure of model and optimizer, and the size of every file. It is written as `.writing-step-00000500`,
brought to disk, and renamed; the rename is the moment from which it counts.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwise.dist.collectives import Group
from shardwise.errors import CheckpointError
from shardwise.run import state as states
from shardwise.run.encoding import decode, encode, tensor_paths
from shardwise.run.folder import RunFolder, sync_folder, write_aside

if TYPE_CHECKING:
    from shardwise.run.state import Collected, Structure
    from shardwise.run.turns import Schedules

T = TypeVar("T")

VERSION = 2
"""Version of the manifest; a checkpoint of a higher one is refused. Those of version 1 have no checksums."""

MANIFEST = "checkpoint.json"

_LOST = "it was complete once, so the disk or a copy has lost data"

_SEAL = re.compile(rb',"crc32":"([0-9a-f]{8})"}\Z')
"""How a manifest ends: with the CRC-32 of all before it."""

_STEP = re.compile(r"(?:\.replaced-)?step-(\d{8,})")


def warm_up() -> threading.Thread:
    """Import what checkpoints need in the background, so that the first one need not wait for it.

    It pays where nothing has loaded `torch._dynamo` yet (then the import takes about a second, and steps meanwhile are
    slower); the first optimizer that a process makes usually has, and then the import takes 0.1 s.
    """

    def work() -> None:
        import shardwise.run.dcp  # noqa: F401

    thread = threading.Thread(target=work, name="shardwise-checkpoint-warm-up", daemon=True)
    thread.start()
    return thread


def save(
    folder: RunFolder,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | Schedules | None = None,
    progress: dict[str, Any],
    keep_last: int = 2,
) -> Path:
    """Write a checkpoint; every rank calls, and all return once it counts.

    Unsplit tensors are taken to be the same on all ranks that have them; of unsplit buffers, the lowest rank's count.
    A checkpoint of the same step is replaced.

    Args:
        folder: of the run.
        step: global steps done.
        model: parameters, buffers (also those that are not persistent) and extra state are kept.
        optimizer: of parameters of this model.
        scheduler: any with a `state_dict` of plain values.
        progress: the loop's own plain values and small tensors; rank 0's are kept.
        keep_last: how many checkpoints to keep, this one included; older ones are removed.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: on every rank: something cannot be kept, or the disk refuses. Earlier checkpoints still count.
    """
    if keep_last < 1:
        raise CheckpointError(f"keep_last is {keep_last}: at least the newest checkpoint is kept; give 1 or more")
    from shardwise.run import dcp

    place = folder.checkpoints / f"step-{step:08d}"
    aside = folder.checkpoints / f".writing-{place.name}"
    record: dict[str, Any] = {"version": VERSION, "step": step, "torch": torch.__version__, "ranks": Group.world().size}

    def describe() -> Collected:
        collected = states.collect(model, optimizer)
        if Group.world().rank == 0:
            record["progress"] = encode(progress, "progress", collected.tensors)
            record["scheduler"] = _scheduler_record(scheduler, collected.tensors)
        return collected

    def complete(structure: Structure, sizes: dict[str, int]) -> None:
        _check_sizes(aside, sizes, advice="the run folder must be on a file system that all ranks share")
        record.update(created=time.time(), structure=structure, files=sizes)
        record["dcp_crc32"] = _crc32((aside / dcp.DCP_METADATA).read_bytes())
        write_aside(aside / MANIFEST, _sealed(json.dumps(record, separators=(",", ":"), allow_nan=False).encode()))
        _put_in_place(aside, place)
        for old in _found(folder.checkpoints)[keep_last:]:
            if old != place:
                _retire(old)

    collected = _on_every_rank(describe)
    try:
        dcp.write(
            aside,
            collected.tensors,
            collected.structure,
            clear=lambda: _clear_leftovers(folder.checkpoints),
            complete=complete,
        )
    except CheckpointError:
        # On a full disk, what was written of it is in the way of all that could help.
        if Group.world().rank == 0:
            with contextlib.suppress(OSError):
                dcp.remove(aside)
        Group.world().barrier()  # the first rank to leave with an error ends the others, rank 0 in the middle of removing
        raise
    return place


def load(
    path: Path, *, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | Schedules | None = None
) -> dict[str, Any]:
    """Put model, optimizer and scheduler where the checkpoint stands, in place; every rank calls.

    The layout may be another than that of the run that saved. Options of the optimizer come from the checkpoint, except
    those that only choose how a step is computed (`fused`, `foreach`, `capturable`, `differentiable`).

    Returns:
        the `progress` that was saved.

    Raises:
        CheckpointError: on every rank: the checkpoint is damaged, or model, optimizer or scheduler are not those it was
            made of. All this is checked before anything is changed, except damage inside a file.
    """
    from shardwise.run import restore

    manifest, target = _on_every_rank(lambda: _prepare(path, model, optimizer, scheduler))
    try:
        restore.read(target, path)
    except restore.OtherModelError:
        raise
    except CheckpointError as error:  # only reading the pieces shows whether their checksums hold
        raise CheckpointError(f"{error}; {_way_out(path)}") from error
    if scheduler is not None:
        scheduler.load_state_dict(decode(manifest["scheduler"]["state"], "scheduler", target.tensors))
    progress = decode(manifest["progress"], "progress", target.tensors)
    assert isinstance(progress, dict)
    return progress


def latest(folder: RunFolder) -> Path | None:
    """The newest checkpoint, or None where the run has none yet. No collective; changes nothing.

    What a killed write left does not count. A checkpoint that was complete once and is damaged now is an error, never
    passed over in silence: falling back to an older one loses work, so that is for the user to choose.

    Raises:
        CheckpointError: the newest checkpoint is damaged; the message names the file and the one to fall back to.
    """
    found = _found(folder.checkpoints)
    if not found:
        return None
    try:
        read_manifest(found[0])
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_way_out(found[0])}") from error
    return found[0]


def _way_out(damaged: Path) -> str:
    older = [path for path in _found(damaged.parent) if step_of(path) < step_of(damaged)]
    intact = next((path for path in older if _is_intact(path)), None)
    instead = f"continue from {intact.name}" if intact else "start anew, for there is no older one"
    return f"to {instead}, move {damaged} out of the run folder"


def step_of(path: Path) -> int:
    """Global steps done in a checkpoint, from its name."""
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint: their names are step- and a number")
    return int(match.group(1))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking that all files are there in full size.

    Raises:
        CheckpointError: no checkpoint, a damaged one (the file is named), or one of a newer form.
    """
    file = path / MANIFEST
    try:
        content = file.read_bytes()
        manifest = json.loads(content.decode())
        version, sizes, step = manifest["version"], manifest["files"], manifest["step"]
    except FileNotFoundError:
        what = "has no" if path.is_dir() else "does not exist, nor its"
        raise CheckpointError(f"checkpoint {path} {what} {MANIFEST}: it is damaged or no checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})") from error
    if version > VERSION:
        raise CheckpointError(
            f"checkpoint {path} has the form {version}, and this shardwise knows up to {VERSION}: "
            "load it with the shardwise that wrote it, or a newer one"
        )
    if version != 1:
        _check_seal(path, content)
    if _STEP.fullmatch(path.name) and step != step_of(path):
        raise CheckpointError(
            f"checkpoint {path} was written after step {step}, and its name says another: which checkpoint is the newest goes "
            f"by the names; call it step-{step:08d} again"
        )
    _check_sizes(path, sizes, advice=_LOST)
    if version != 1:
        _check_dcp(path, manifest["dcp_crc32"])
    assert isinstance(manifest, dict)
    return manifest


def _crc32(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def _sealed(content: bytes) -> bytes:
    """JSON of a record with its own checksum as the last entry."""
    return content[:-1] + f',"crc32":"{_crc32(content[:-1])}"}}'.encode()


def _check_seal(path: Path, content: bytes) -> None:
    seal = _SEAL.search(content)
    if seal is None or _crc32(content[: seal.start()]) != seal[1].decode():
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is not what was written (CRC-32); {_LOST}")


def _check_dcp(path: Path, crc32: str) -> None:
    """Its list of what lies where is a pickle, and one flipped bit would put rows of a weight elsewhere."""
    from shardwise.run.dcp import DCP_METADATA

    try:
        content = (path / DCP_METADATA).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {DCP_METADATA} cannot be read ({error.strerror})"
        ) from None
    if _crc32(content) != crc32:
        raise CheckpointError(f"checkpoint {path} is damaged: {DCP_METADATA} is not what was written (CRC-32); {_LOST}")


def _prepare(
    path: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | Schedules | None
) -> tuple[dict[str, Any], Any]:
    from shardwise.run import restore

    manifest = read_manifest(path)
    saved = manifest["scheduler"]
    here = None if scheduler is None else states.class_name(scheduler)
    before = None if saved is None else saved["class"]
    if here != before:
        raise CheckpointError(
            f"checkpoint {path} was made with the scheduler {before}, and this run has {here}: "
            "resume with the schedule that the run was started with"
        )
    target = restore.prepare(path, manifest["structure"], model, optimizer)
    for record, name in ((saved and saved["state"], "scheduler"), (manifest["progress"], "progress")):
        restore.add_plain(target, tensor_paths(record, name))
    return manifest, target


def _scheduler_record(scheduler: LRScheduler | Schedules | None, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    if scheduler is None:
        return None
    return {"class": states.class_name(scheduler), "state": encode(scheduler.state_dict(), "scheduler", tensors)}


def _on_every_rank(action: Callable[[], T]) -> T:
    """Do something on every rank; where it fails on one, all raise its error instead of waiting for that rank."""
    world = Group.world()
    result: T | None = None
    problem: str | None = None
    try:
        result = action()
    except CheckpointError as error:
        if world.size == 1:
            raise
        problem = str(error)
    problems = world.gather_objects(problem)
    for rank, text in enumerate(problems):
        if text is not None:
            raise CheckpointError(text if all(other == text for other in problems) else f"rank {rank}: {text}")
    assert result is not None
    return result


def _check_sizes(path: Path, sizes: dict[str, int], *, advice: str) -> None:
    for name, size in sizes.items():
        try:
            with (path / name).open("rb") as file:
                found = file.seek(0, 2)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} is missing ({error.strerror}); {advice}"
            ) from None
        if found != size:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has {found} of {size} bytes; {advice}")


def _is_intact(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def _found(checkpoints: Path) -> list[Path]:
    """Checkpoints that count, newest first. One that was being replaced counts until its successor is there."""
    places: dict[int, Path] = {}
    if checkpoints.is_dir():
        for path in sorted(checkpoints.iterdir()):  # .replaced- sorts before step-, which then takes its place
            match = _STEP.fullmatch(path.name)
            if match:
                places[int(match.group(1))] = path
    return [places[step] for step in sorted(places, reverse=True)]


def _clear_leftovers(checkpoints: Path) -> None:
    """Remove what killed writes and removals left."""
    from shardwise.run.dcp import remove

    checkpoints.mkdir(parents=True, exist_ok=True)
    for path in sorted(checkpoints.iterdir()):
        if path.name.startswith((".writing-step-", ".removed-step-")):
            remove(path)
        elif path.name.startswith(".replaced-step-"):
            successor = path.with_name(path.name.removeprefix(".replaced-"))
            if successor.exists():
                remove(path)
            else:
                path.rename(successor)


def _put_in_place(aside: Path, place: Path) -> None:
    from shardwise.run.dcp import remove

    sync_folder(aside)
    replaced = place.with_name(f".replaced-{place.name}")
    if place.exists():
        place.rename(replaced)
    aside.rename(place)
    sync_folder(place.parent)
    if replaced.exists():
        remove(replaced)


def _retire(path: Path) -> None:
    """Remove a checkpoint so that it counts whole or not at all meanwhile."""
    from shardwise.run.dcp import remove

    going = path.with_name(f".removed-{path.name.removeprefix('.replaced-')}")
    path.rename(going)
    remove(going)
