"""PackedIndex: what a packed data set holds, as written in its `index.json`.

A packed data set is a folder of .npy files, cut into shards that are memory-mapped in training, and this index. The
index is written last, so a folder without one is an unfinished packing. It holds nothing that depends on when, where or
by how many workers it was made: the same source packed twice gives the same bytes.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shardwise.errors import DataError

INDEX_NAME = "index.json"
FORMAT = "shardwise-packed"
VERSION = 1

Kind = Literal["images", "table", "text"]
KINDS = ("images", "table", "text")


@dataclass(frozen=True, kw_only=True)
class PackedField:
    """One array of a split: its place in the samples and the form of a row.

    Attributes:
        name: `inputs`, `targets`, or `inputs.0`, `inputs.1` where the inputs are a tuple.
        dtype: as NumPy writes it, such as `uint8`.
        shape: of one row; () for one number a row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PackedShard:
    """A run of consecutive rows of a split: one file for each field.

    Attributes:
        rows: how many.
        files: field name -> file name, relative to the folder.
        sha256: field name -> checksum of the file's bytes.
        bytes: of all its files together.
    """

    rows: int
    files: dict[str, str]
    sha256: dict[str, str]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PackedSplit:
    """The shards of one split, in the order of the samples."""

    fields: tuple[PackedField, ...]
    shards: tuple[PackedShard, ...]

    @property
    def rows(self) -> int:
        """Samples of the split; tokens for text."""
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class PackedIndex:
    """A complete packed data set.

    Attributes:
        kind: `images` (uint8 (3, size, size) and int64 labels), `table` (what `shardwise.data.csv` gives), `text` (one
            code a token, in one split `all`).
        settings: what the packing was asked for.
        source: fingerprint of the source's files: their names, sizes and order.
        splits: `train` and, where there is one, `test`; `all` for text.
        classes: names of the classes, or the vocabulary, in the order of their numbers.
        statistics: over the training rows; what is in it depends on the kind.
        skipped: inputs that were left out, each with its reason.
    """

    kind: Kind
    settings: dict[str, Any]
    source: str
    splits: dict[str, PackedSplit]
    classes: tuple[str, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Text that `from_json` reads back; the same bytes for the same content."""
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> PackedIndex:
        """Read an index.

        Raises:
            DataError: no index of a packed data set, or one of a later version; `where` names it.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is no JSON ({error}); pack the data again") from error
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise DataError(f"{where} is not the index of a packed data set; make one with `shardwise data pack`")
        version = record.pop("version", None)
        if version != VERSION:
            raise DataError(
                f"{where} has version {version}, this shardwise reads {VERSION}: pack the data again, or update shardwise"
            )
        try:
            splits = {name: _split(split) for name, split in record.pop("splits").items()}
            record["classes"] = tuple(record["classes"])
            record["skipped"] = tuple(record["skipped"])
            return cls(splits=splits, **record)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is damaged ({error!r}); pack the data again") from error

    @classmethod
    def read(cls, folder: Path) -> PackedIndex:
        """The index of a packed folder.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = folder / INDEX_NAME
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), str(path))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} has no {INDEX_NAME}: it is no packed data set, or its packing was not finished; "
                f"make it with `shardwise data pack SOURCE {shlex.quote(str(folder))}` (which goes on where it stopped)"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error


def _split(record: dict[str, Any]) -> PackedSplit:
    fields = tuple(PackedField(**{**item, "shape": tuple(item["shape"])}) for item in record["fields"])
    return PackedSplit(fields=fields, shards=tuple(PackedShard(**item) for item in record["shards"]))
