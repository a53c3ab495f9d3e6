"""What a packing is made of: the parts of a source that become shards, and what makes arrays of a part."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from shardwise.pack.files import Piece
from shardwise.spec.packed import Kind

Run = Callable[[Callable[[Any], Any], Sequence[Any], str], list[Any]]
"""`run(function, items, what)`: the function's result for every item, in order; `what` is for a progress display."""


def run_here(function: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
    """One item after another, in this process."""
    return [function(item) for item in items]


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How to pack; which of them count depends on the kind.

    Attributes:
        kind: `images`, `table` or `text`; None goes by the names of the files.
        test: where the test split is, for a table or tar files; image folders and texts divide themselves.
        size: pixels of an image's side.
        target, names, categorical, drop, onehot, strip_target, delimiter, missing: as in `shardwise.data.csv`.
        unit: a token of a text, `char` or `byte`.
        shard_bytes: size to aim at: of a shard of images, of the part of a table or text that becomes a shard.
        skip_unreadable: leave out images that cannot be read, and say which, instead of ending.
    """

    kind: Kind | None = None
    test: str | None = None
    size: int = 224
    target: str = ""
    names: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    onehot: bool = False
    strip_target: str = ""
    delimiter: str = ","
    missing: tuple[str, ...] = ("", "?", "NA", "nan", "NaN")
    unit: str = "char"
    shard_bytes: int = 64 << 20
    skip_unreadable: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """What becomes one shard."""

    name: str
    split: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Made:
    """One part as arrays, and what the whole has to know of it.

    Attributes:
        arrays: field name -> array; every part has the same fields; {} for a part without a row.
        notes: plain data that JSON keeps, for `Maker.statistics`.
        skipped: inputs left out, each with its reason.
    """

    arrays: dict[str, NDArray[Any]]
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


class Maker(ABC):
    """Makes arrays of parts, in any process and order: it holds all that was learned of the source before."""

    @abstractmethod
    def make(self, part: Part) -> Made:
        """The arrays of one part.

        Raises:
            DataError: something in it cannot be read.
        """

    @abstractmethod
    def statistics(self, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of the training rows, from the notes of their shards in order."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A source that was looked through and is ready to be packed."""

    kind: Kind
    settings: dict[str, Any]
    source: str
    parts: tuple[Part, ...]
    maker: Maker
    classes: tuple[str, ...]


def balanced(pieces: Sequence[Piece], groups: int) -> list[tuple[Piece, ...]]:
    """Consecutive pieces in at most `groups` groups of about equal bytes; a pure function of the sizes."""
    total = sum(piece.bytes for piece in pieces)
    found: dict[int, list[Piece]] = {}
    before = 0
    for piece in pieces:
        middle = before + piece.bytes / 2
        found.setdefault(min(groups - 1, int(middle * groups / total)) if total else 0, []).append(piece)
        before += piece.bytes
    return [tuple(group) for _, group in sorted(found.items())]


def numbered(split: str, groups: Iterable[tuple[Piece, ...]]) -> list[Part]:
    """The parts of a split, named by their place."""
    return [Part(name=f"{split}-{place:05d}", split=split, pieces=group) for place, group in enumerate(groups)]


def cut(files: Sequence[tuple[str, int]], piece_bytes: int) -> list[Piece]:
    """Files as pieces of about `piece_bytes` each, a large file as several of equal size."""
    pieces = []
    for url, size in files:
        count = max(1, round(size / piece_bytes))
        bounds = [size * place // count for place in range(count + 1)]
        for start, stop in pairwise(bounds):
            if stop > start:
                pieces.append(Piece(url=url, start=start, bytes=stop - start, name=url))
    return pieces


def fingerprint(root: str, files: Sequence[tuple[str, int]]) -> str:
    """sha256 over the names below the root, the sizes and their order: the same for a copy of the source elsewhere."""
    digest = hashlib.sha256()
    for url, size in files:
        digest.update(f"{url.removeprefix(root).lstrip('/')}\0{size}\n".encode())
    return digest.hexdigest()
