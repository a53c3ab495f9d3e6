"""Writing one shard: arrays into .npy files, complete or absent, with their checksums and a record that it is done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import DataError
from shardwise.spec.packed import PackedShard


def write_shard(
    folder: Path, name: str, arrays: Mapping[str, NDArray[Any]], notes: Mapping[str, Any]
) -> tuple[PackedShard, dict[str, Any]]:
    """Write the arrays of one shard and, after them, its record.

    Args:
        folder: of the packed data set.
        name: such as `train-00003`.
        arrays: field name -> array; all have the same number of rows. None at all is a shard without rows.
        notes: what else the packing has to know of this shard, as plain data; given back by `finished_shard`.

    Raises:
        DataError: the disk is full or cannot be written; what was half written is removed.
    """
    files, checksums, total = {}, {}, 0
    for field, array in arrays.items():
        file = f"{name}-{field}.npy"
        checksums[field], written = _write_npy(folder / file, array)
        files[field] = file
        total += written
    rows = len(next(iter(arrays.values()))) if arrays else 0
    shard = PackedShard(rows=rows, files=files, sha256=checksums, bytes=total)
    record = json.dumps({"shard": asdict(shard), "notes": dict(notes)}, sort_keys=True)
    write_whole(_record(folder, name), record.encode())
    return shard, dict(notes)


def finished_shard(folder: Path, name: str) -> tuple[PackedShard, dict[str, Any]] | None:
    """The shard and its notes if it was written before and its files are there with their sizes; None otherwise."""
    try:
        record = json.loads(_record(folder, name).read_text(encoding="utf-8"))
        shard = PackedShard(**record["shard"])
        present = sum((folder / file).stat().st_size for file in shard.files.values())
        return (shard, record["notes"]) if present == shard.bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file that is complete or absent, and on the disk when this returns."""
    _replace(path, lambda file: file.write(content))


def checksum(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; pack the data again") from error
    return digest.hexdigest()


def _record(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name}.json"


class _Hashing:
    """A file that hashes what is written to it, so that the bytes are not read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        self.bytes += len(block)
        return self._file.write(block)


def _write_npy(path: Path, array: NDArray[Any]) -> tuple[str, int]:
    hashing: list[_Hashing] = []

    def write(file: BinaryIO) -> None:
        hashing.append(_Hashing(file))
        np.lib.format.write_array(hashing[0], np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)

    _replace(path, write)
    return hashing[0].digest.hexdigest(), hashing[0].bytes


def _replace(path: Path, write: Any) -> None:
    part = path.with_name(path.name + f".part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error.strerror or error}; free the disk and run again") from error
