"""Packing a data set: look through the source, make the shards in parallel, write the index last.

What is written depends on the source and the options alone. An interrupted packing goes on with the shards that are
missing, and ends in the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from shardwise.errors import DataError, FolderError, JobError
from shardwise.pack.files import find_data, is_remote
from shardwise.pack.images import prepare_images
from shardwise.pack.parts import Maker, PackOptions, Part, Prepared, Run, run_here
from shardwise.pack.shard import checksum, finished_shard, write_shard, write_whole
from shardwise.pack.tables import PARQUET_SUFFIXES, prepare_table
from shardwise.pack.text import prepare_text
from shardwise.spec.packed import INDEX_NAME, KINDS, PackedField, PackedIndex, PackedShard, PackedSplit

_PREPARE = {"images": prepare_images, "table": prepare_table, "text": prepare_text}
_PARTS = "parts"
_PLAN = "packing.json"


def pack(source: str, out: str | Path, options: PackOptions, run: Run = run_here) -> PackedIndex:
    """Pack a source into a folder of memory-mappable shards.

    Args:
        source: a file or folder, or an address that fsspec reads.
        out: a folder of this machine; made where it is missing. An unfinished packing of the same source with the same
            options goes on; a finished one is left as it is.
        run: calls a function on many items; the seam for a pool of processes.

    Raises:
        DataError: the source cannot be read or holds nothing; the disk is full.
        FolderError: the folder holds something else, or another packing is writing to it.
        JobError: options that are missing or contradict each other.
    """
    if options.shard_bytes < 1:
        raise JobError(f"shard_bytes is {options.shard_bytes}: give at least 1 byte")
    folder = Path(out)
    with _locked(folder):
        kind = options.kind or guess_kind(source)
        prepared = _PREPARE[kind](source, options, run)
        claim = {"kind": kind, "settings": prepared.settings, "source": prepared.source}
        index = _finished(folder, claim, prepared.parts)
        if index is None:
            index = _pack_parts(folder, prepared, run)
            write_whole(folder / INDEX_NAME, index.to_json().encode())
        shutil.rmtree(folder / _PARTS, ignore_errors=True)
        return index


def guess_kind(source: str) -> str:
    """The kind of a source by the names of its files.

    Raises:
        DataError: nothing there says what it is.
    """
    names = [url.lower() for url, _ in find_data(source)]
    if any(name.endswith((".csv", ".tsv", *PARQUET_SUFFIXES)) for name in names):
        return "table"
    if any(name.endswith((".tar", ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm")) for name in names):
        return "images"
    if names and all(name.endswith((".txt", ".md", ".text")) for name in names):
        return "text"
    if any(name.endswith((".gz", ".bz2", ".xz", ".zip", ".zst")) for name in names):
        raise DataError(
            f"{source} is compressed, and is packed from parts of its bytes: unpack it first, or write it as Parquet"
        )
    raise DataError(f"{source}: its file names do not say what it holds; give --kind, one of {', '.join(KINDS)}")


def check(folder: Path, run: Run = run_here) -> PackedIndex:
    """Read all files of a packed data set and compare their checksums with the index.

    Raises:
        DataError: a file is missing or has other bytes; the message names the first.
    """
    index = PackedIndex.read(folder)
    files = [
        (folder / shard.files[field], shard.sha256[field])
        for split in index.splits.values() for shard in split.shards for field in sorted(shard.files)
    ]  # fmt: skip
    for problem in run(_compare, files, "checking"):
        if problem:
            raise DataError(problem)
    return index


def _compare(item: tuple[Path, str]) -> str:
    path, expected = item
    try:
        found = checksum(path)
    except DataError as error:
        return str(error)
    return "" if found == expected else f"{path} has other bytes than were packed (sha256 {found}); pack the data again"


def _pack_parts(folder: Path, prepared: Prepared, run: Run) -> PackedIndex:
    done = {part.name: found for part in prepared.parts if (found := finished_shard(folder, part.name))}
    todo = [part for part in prepared.parts if part.name not in done]
    # the largest first, so that none is left alone at the end
    todo.sort(key=lambda part: -sum(piece.bytes for piece in part.pieces))
    results = run(_Write(folder=folder, maker=prepared.maker), todo, "packing")
    failures = sorted(
        (part.name, result) for part, result in zip(todo, results, strict=True) if isinstance(result, str)
    )
    if failures:
        raise DataError(failures[0][1])
    for part, result in zip(todo, results, strict=True):
        done[part.name] = result
    in_order = [(part.split, *done[part.name]) for part in prepared.parts]
    splits = {}
    for name in dict.fromkeys(split for split, _, _ in in_order):
        shards = [shard for split, shard, _ in in_order if split == name and shard.rows]
        if not shards:
            raise DataError(f"the {name} split has no rows: there is nothing to pack")
        fields = next(tuple(notes["fields"]) for split, shard, notes in in_order if split == name and shard.rows)
        described = tuple(PackedField(**{**item, "shape": tuple(item["shape"])}) for item in fields)
        splits[name] = PackedSplit(fields=described, shards=tuple(shards))
    counted = [notes["notes"] for split, _, notes in in_order if split in ("train", "all")]
    return PackedIndex(
        kind=prepared.kind,
        settings=prepared.settings,
        source=prepared.source,
        splits=splits,
        classes=prepared.classes,
        statistics=prepared.maker.statistics(counted),
        skipped=tuple(reason for _, _, notes in in_order for reason in notes["skipped"]),
    )


@final
@dataclass(frozen=True, kw_only=True)
class _Write:
    """Makes and writes one shard, in any process; an error comes back as its message."""

    folder: Path
    maker: Maker

    def __call__(self, part: Part) -> tuple[PackedShard, dict[str, Any]] | str:
        try:
            made = self.maker.make(part)
            fields = [
                {"name": name, "dtype": array.dtype.str, "shape": list(array.shape[1:])}
                for name, array in made.arrays.items()
            ]
            notes = {"fields": fields, "notes": made.notes, "skipped": list(made.skipped)}
            return write_shard(self.folder, part.name, made.arrays, notes)
        except DataError as error:
            return str(error)


def _finished(folder: Path, claim: dict[str, Any], parts: tuple[Part, ...]) -> PackedIndex | None:
    """The index of a finished packing of the same thing. None: begin, or go on with, an unfinished one."""
    advice = "give another folder, or delete this one"
    text = json.dumps(claim, sort_keys=True)
    if (folder / INDEX_NAME).exists():
        index = PackedIndex.read(folder)
        found = {"kind": index.kind, "settings": index.settings, "source": index.source}
        if json.dumps(found, sort_keys=True) != text:
            raise FolderError(f"{folder} holds a packed data set of another source or with other options: {advice}")
        _check_unchanged(folder, folder / INDEX_NAME, parts)
        return index
    plan = folder / _PARTS / _PLAN
    if plan.exists():
        if plan.read_text(encoding="utf-8") not in (text, _before_skipping(claim)):
            raise FolderError(f"{folder} holds an unfinished packing of another source or with other options: {advice}")
        _check_unchanged(folder, plan, parts)
    elif any(entry.name not in (".lock", _PARTS) for entry in folder.iterdir()):
        raise FolderError(f"{folder} holds files that are no packed data set: {advice}")
    for leftover in folder.rglob("*.part-*"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    if not plan.exists() or plan.read_text(encoding="utf-8") != text:
        write_whole(plan, text.encode())
    return None


def _check_unchanged(folder: Path, since: Path, parts: tuple[Part, ...]) -> None:
    """Refuse files of this machine that were written after this one: sizes do not tell of a value that was corrected in place."""
    when = since.stat().st_mtime_ns
    for url in {piece.url: None for part in parts for piece in part.pieces}:
        if not is_remote(url) and Path(url).stat().st_mtime_ns > when:
            raise FolderError(
                f"{url} was written after it was packed into {folder}: delete that folder to pack it anew; if the content is "
                f"the same, as after copying it, run: touch {since}"
            )


def _before_skipping(claim: dict[str, Any]) -> str:
    """The same packing without --skip-unreadable: the shards that it has finished hold no unreadable image, and count."""
    settings = claim["settings"]
    if not settings.get("skip_unreadable"):
        return ""
    return json.dumps({**claim, "settings": {**settings, "skip_unreadable": False}}, sort_keys=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise FolderError(f"{folder} cannot be written: {error.strerror or error}; give a writable folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(
                f"{folder} is being packed by another process: wait for it, or give another folder"
            ) from error
        yield
