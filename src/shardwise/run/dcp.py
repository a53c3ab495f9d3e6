"""How `torch.distributed.checkpoint` (DCP) writes a checkpoint that is complete or absent. Slow to import.

DCP runs its steps on every rank, gathers at rank 0, and hands the first error to all ranks. Everything that decides
over a checkpoint hooks into those steps, so that it needs no further collective and fails on all ranks alike: clearing
the place, merging what the ranks describe, the manifest, and the rename.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.run.state import Structure, merge
from shardwise.units import format_bytes

FULL_BYTES = 1 << 22
"""Free bytes below which a failed write is put down to a full disk: what was half written still takes its place then. Chosen."""

DCP_METADATA = ".metadata"
"""The file in which DCP says where each piece of each tensor is."""


class _SavePlanner(DefaultSavePlanner):
    """Adds each rank's structure to its plan; rank 0 merges them, and takes unsplit buffers from the lowest rank.

    Unsplit parameters and optimizer state are the same on all ranks that have them, so DCP spreads the writing. Buffers
    may differ (BatchNorm statistics of each worker's own samples), and which rank's are kept must not hang on sizes.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.structure = structure

    def create_local_plan(self) -> SavePlan:
        self.plan = dataclasses.replace(super().create_local_plan(), planner_data=self.structure)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.structure = merge(plan.planner_data for plan in all_plans)
        buffers = {f"model/{name}" for name in self.structure["buffers"]}
        taken: set[str] = set()
        lean = []
        for plan in all_plans:
            whole = {item.index.fqn for item in plan.items if item.type == WriteItemType.TENSOR} & buffers
            items = [item for item in plan.items if item.index.fqn not in whole & taken]
            taken |= whole
            lean.append(dataclasses.replace(plan, items=items, planner_data=None))
        return super().create_global_plan(lean)


class _Writer(FileSystemWriter):
    """Writes into a temporary folder and, once all ranks have written, hands over to `complete` on rank 0."""

    def __init__(self, aside: Path, clear: Callable[[], None], complete: Callable[[dict[str, int]], None]) -> None:
        super().__init__(aside, sync_files=True, overwrite=False)
        self.aside = aside
        self._clear = clear
        self._complete = complete

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the usual one makes the folder, before rank 0 has cleared what a killed run left there

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._clear()
        self.aside.mkdir(parents=True)
        prefixed: list[SavePlan] = super().prepare_global_plan(plans)
        return prefixed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        sizes: dict[str, int] = {DCP_METADATA: (self.aside / DCP_METADATA).stat().st_size}
        for result in (result for of_rank in results for result in of_rank):
            place = result.storage_data
            sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
        self._complete(sizes)


class _Reader(FileSystemReader):
    """Checks each piece that this rank reads against the checksum that `torch.save` wrote with it.

    Torch itself does not: a flipped bit on disk would be a wrong weight without an error.
    """

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        places = {(place.relative_path, place.offset, place.length) for place in map(self._place, plan.items)}
        for name, of_file in itertools.groupby(sorted(places), key=lambda place: place[0]):
            with (self.place / name).open("rb") as file:
                for _, offset, length in of_file:
                    file.seek(offset)
                    _check_piece(f"checkpoint {self.place} is damaged: {name} at byte {offset}", file.read(length))
        done: Future[None] = super().read_data(plan, planner)
        return done

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.place = place

    def _place(self, item: ReadItem) -> Any:
        return self.storage_data[item.storage_index]


def _check_piece(what: str, content: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as piece:
            bad = piece.testzip()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{what} is no tensor any more ({error})") from error
    if bad is not None:
        raise CheckpointError(f"{what} is not what was written (CRC-32 of {bad})")


@final
class OtherModelError(CheckpointError):
    """The checkpoint is whole, and the model is not the one it was made of."""


class _LoadPlanner(DefaultLoadPlanner):
    """Checks on rank 0 that the ranks together ask for every name of the checkpoint."""

    def __init__(self, wanted: set[str], expected: set[str], place: Path) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.wanted = wanted
        self.expected = expected
        self.place = place

    def create_local_plan(self) -> LoadPlan:
        # The names are sent only by a rank that lacks some: usually every rank has all.
        data = None if self.wanted == self.expected else self.wanted
        return dataclasses.replace(super().create_local_plan(), planner_data=data)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        parts = [plan.planner_data for plan in global_plan]
        if all(part is not None for part in parts):
            unexpected = self.expected.difference(*parts)
            if unexpected:
                raise OtherModelError(
                    f"checkpoint {self.place} holds {some(unexpected)} that the model does not have: "
                    "resume with the model that the run was started with"
                )
        return super().create_global_plan([dataclasses.replace(plan, planner_data=None) for plan in global_plan])


def write(
    aside: Path,
    tensors: dict[str, Tensor],
    structure: Structure,
    *,
    clear: Callable[[], None],
    complete: Callable[[Structure, dict[str, int]], None],
) -> None:
    """Write tensors with DCP; every rank calls.

    Args:
        aside: folder to write into.
        tensors: this rank's, by name.
        structure: this rank's.
        clear: called on rank 0 before anything is written.
        complete: called on rank 0 when everything is on disk, with the merged structure and the bytes of each file.

    Raises:
        CheckpointError: on every rank, whichever failed.
    """
    planner = _SavePlanner(structure)
    writer = _Writer(aside, clear, lambda sizes: complete(planner.structure, sizes))
    with _one_process_is_fine(), _readable(f"checkpoint {aside} cannot be written", aside):
        dcp_save(tensors, storage_writer=writer, planner=planner)


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of every tensor of a checkpoint.

    Raises:
        CheckpointError: DCP cannot read its own file.
    """
    with _readable(f"checkpoint {path} is damaged: {DCP_METADATA} cannot be read"):
        metadata = FileSystemReader(path).read_metadata()
    return {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }


def read(path: Path, tensors: dict[str, Tensor], *, names: set[str], expected: set[str]) -> None:
    """Fill tensors from a checkpoint; every rank calls.

    Args:
        path: of the checkpoint.
        tensors: to fill, in place, by name; each as this rank holds it.
        names: of the model's tensors on this rank, as the checkpoint calls them.
        expected: all names of model tensors in the checkpoint, which the ranks must ask for together.

    Raises:
        CheckpointError: on every rank, whichever failed.
    """
    planner = _LoadPlanner(names, expected, path)
    with _one_process_is_fine(), _readable(f"checkpoint {path} is damaged or cannot be read"):
        dcp_load(tensors, storage_reader=_Reader(path), planner=planner)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """DCP warns where no process group is; a serial run has none on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


@contextmanager
def _readable(what: str, written: Path | None = None) -> Iterator[None]:
    """Turn DCP's collected errors into one that names the rank and its cause.

    Args:
        what: how the message begins.
        written: the folder that is being written into, if any. torch does not say that a disk is full, but what that broke.
    """
    full = ""
    try:
        yield
    except ShardwiseError:
        raise
    except CheckpointException as error:
        full = _told_if_full(written) if written is not None else ""
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, ShardwiseError):
            raise cause from None
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise CheckpointError(f"{what} (rank {rank}: {type(cause).__name__}: {cause}){full}") from error
    except Exception as error:  # pickle and the zip reader raise what they like on damaged files
        raise CheckpointError(f"{what} ({type(error).__name__}: {error})") from error


def _told_if_full(folder: Path) -> str:
    """Words about a disk that holds nothing more, counting what our own half-written files take."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    if free >= FULL_BYTES:
        return ""
    free_text = f"{format_bytes(free)} are free on that of {folder.parent}"
    return f". The disk is full: {free_text}; make room, or give --out a place on another one"


def some(names: set[str] | list[str] | Mapping[str, Any]) -> str:
    """The first few names, for a message."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:5])
    return shown if len(ordered) <= 5 else f"{shown} and {len(ordered) - 5} more"


def remove(path: Path) -> None:
    """Delete a folder that no longer counts. What resists is left for the next time and told in the log."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logging.getLogger("shardwise").warning("cannot remove %s: %s", os.fspath(path), error)
