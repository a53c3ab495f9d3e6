"""Packing text, as map and reduce: characters counted in all parts give the vocabulary, then each part is coded by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import DataError, JobError
from shardwise.pack.files import Piece, find_data, read_range
from shardwise.pack.parts import Made, Maker, PackOptions, Part, Prepared, Run, cut, fingerprint, numbered

_LONGEST = 4
"""Bytes of the longest character in UTF-8 (RFC 3629)."""


def prepare_text(source: str, options: PackOptions, run: Run) -> Prepared:
    """Look through a text, or a folder of texts that are read one after another in the order of their names.

    Raises:
        DataError: nothing is there, or it is not UTF-8.
        JobError: an unknown unit.
    """
    if options.unit not in ("char", "byte"):
        raise JobError(f"unit is {options.unit!r}: give 'char' or 'byte'")
    if options.test is not None:
        raise JobError("a text is divided when it is read (test_fraction=): leave the test source out")
    files = [file for file in find_data(source) if file[1]]
    if not files:
        raise DataError(f"{source} holds no text")
    pieces = cut(files, options.shard_bytes)
    vocabulary: tuple[int, ...] = ()
    counts: Counter[int] = Counter()
    if options.unit == "char":
        for result in run(_count, pieces, "counting characters"):
            if isinstance(result, str):
                raise DataError(result)
            counts.update(result)
        vocabulary = tuple(sorted(counts))
    return Prepared(
        kind="text",
        settings={"unit": options.unit, "shard_bytes": options.shard_bytes},
        source=fingerprint("", [(url.rsplit("/", 1)[-1], size) for url, size in files]),
        parts=tuple(numbered("all", [(piece,) for piece in pieces])),
        maker=_TextMaker(vocabulary=vocabulary, counts=tuple(counts[point] for point in vocabulary)),
        classes=tuple(map(chr, vocabulary)) if vocabulary else tuple(str(value) for value in range(256)),
    )


def _points(piece: Piece) -> NDArray[np.uint32]:
    """The code points of the characters that begin in the piece."""
    content = read_range(piece.url, piece.start, piece.bytes + _LONGEST - 1)
    start, stop = 0, min(piece.bytes, len(content))
    if piece.start:
        while start < min(_LONGEST, stop) and _continues(content[start]):
            start += 1
        if start == piece.bytes:  # all of it belongs to a character that begins before
            return np.zeros(0, np.uint32)
    while stop < len(content) and _continues(content[stop]):
        stop += 1
    try:
        text = content[start:stop].decode("utf-8")
    except UnicodeDecodeError as error:
        place = piece.start + start + error.start
        raise DataError(
            f"{piece.url} is not UTF-8 (byte {place}: {error.reason}); convert it, or pack it with --unit byte"
        ) from error
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _count(piece: Piece) -> dict[int, int] | str:
    try:
        points, counts = np.unique(_points(piece), return_counts=True)
    except DataError as error:
        return str(error)
    return dict(zip(points.tolist(), counts.tolist(), strict=True))


@final
@dataclass(frozen=True, kw_only=True)
class _TextMaker(Maker):
    vocabulary: tuple[int, ...]
    """Code points in order; () keeps bytes."""
    counts: tuple[int, ...]

    def make(self, part: Part) -> Made:
        (piece,) = part.pieces
        if not self.vocabulary:
            codes = np.frombuffer(read_range(piece.url, piece.start, piece.bytes), np.uint8)
            return Made(arrays={"tokens": codes} if len(codes) else {})
        points = _points(piece)
        width = np.uint8 if len(self.vocabulary) <= 256 else np.int32
        codes = np.searchsorted(np.array(self.vocabulary, np.uint32), points).astype(width)
        return Made(arrays={"tokens": codes} if len(codes) else {})

    def statistics(self, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """How often each character of the vocabulary occurs."""
        return {"counts": list(self.counts)}
