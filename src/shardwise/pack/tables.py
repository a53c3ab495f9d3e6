"""Packing tables, as map and reduce: summaries of all parts merge into what is learned, then each part is coded by it.

A CSV file is cut at line ends: a part has the lines that begin in its bytes. A Parquet file is cut into its row groups.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from shardwise.data.readers.tablecode import (
    Coder,
    Summary,
    Table,
    TableForm,
    fit,
    from_arrow,
    load_pyarrow,
    merge,
    parse_rows,
    summarise,
)
from shardwise.errors import DataError, JobError
from shardwise.pack.files import BLOCK_BYTES, Piece, canonical, find_data, open_file, read_range
from shardwise.pack.parts import Made, Maker, PackOptions, Part, Prepared, Run, cut, fingerprint, numbered

TEXT_SUFFIXES = (".csv", ".tsv", ".data", ".txt")
PARQUET_SUFFIXES = (".parquet", ".pq")


@final
@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads one piece as a table."""

    parquet: bool
    names: tuple[str, ...]
    headed: bool
    delimiter: str
    missing: frozenset[str]
    as_text: frozenset[str] = frozenset()

    def table(self, piece: Piece) -> Table:
        if self.parquet:
            return _row_group(piece)
        lines = io.StringIO("".join(_own_lines(piece)), newline="")
        if self.headed and piece.start == 0:
            lines.readline()
        where = f"{piece.url}, bytes {piece.start} to {piece.start + piece.bytes}"
        try:
            return parse_rows(lines, where, self.names, self.delimiter, self.missing, self.as_text, whole_lines=True)
        except csv.Error as error:
            raise DataError(f"{where}: no readable table ({error})") from error


def prepare_table(source: str, options: PackOptions, run: Run) -> Prepared:
    """Look through CSV or Parquet files; what is learned is learned from the training rows alone.

    Raises:
        DataError: the files cannot be read, or differ in their columns.
        JobError: no target, or a column that is not there.
    """
    if not options.target:
        raise JobError("a table needs the column to predict: give --target NAME")
    form = TableForm(
        target=options.target,
        categorical=options.categorical,
        drop=options.drop,
        onehot=options.onehot,
        strip_target=options.strip_target,
    )
    sources = {"train": source, **({} if options.test is None else {"test": options.test})}
    files = {split: _table_files(place) for split, place in sources.items()}
    parquet = files["train"][0][0].endswith(PARQUET_SUFFIXES)
    pieces = {split: _pieces(listed, parquet, options.shard_bytes) for split, listed in files.items()}
    reader = _Reader(
        parquet=parquet,
        names=() if parquet else options.names or _header(files["train"][0][0], options.delimiter),
        headed=not options.names,
        delimiter=options.delimiter,
        missing=frozenset(options.missing),
    )
    if not parquet and not options.names:
        for url, _ in (file for listed in files.values() for file in listed):
            columns = _header(url, options.delimiter)
            if columns != reader.names:
                raise DataError(
                    f"{url} has the columns {list(columns)}, the others {list(reader.names)}; if these are values, the files "
                    "have no header line: give --names"
                )
    summary, reader = _survey(pieces["train"], reader, form, run)
    parts = tuple(part for split, cuts in pieces.items() for part in numbered(split, [(piece,) for piece in cuts]))
    coder = fit(summary, form, source)
    return Prepared(
        kind="table",
        settings={**asdict(form), "names": list(options.names), "delimiter": options.delimiter,
                  "missing": sorted(options.missing), "shard_bytes": options.shard_bytes},
        source=fingerprint("", [(url.rsplit("/", 1)[-1], size) for listed in files.values() for url, size in listed]),
        parts=parts,
        maker=_TableMaker(reader=reader, coder=coder, summary=summary),
        classes=coder.classes,
    )  # fmt: skip


def _table_files(source: str) -> list[tuple[str, int]]:
    found = [file for file in find_data(source) if file[0].endswith((*TEXT_SUFFIXES, *PARQUET_SUFFIXES))]
    kinds = {url.endswith(PARQUET_SUFFIXES) for url, _ in found}
    if not found:
        raise DataError(f"{source} has no table: expected {', '.join((*TEXT_SUFFIXES, *PARQUET_SUFFIXES))}")
    root = canonical(source)
    for folder in (part for url, _ in found for part in url.removeprefix(root).split("/")[:-1]):
        if "=" in folder:
            raise DataError(
                f"the column {folder.partition('=')[0]} of {source} is in the names of its folders ({folder}) and not in its "
                "files, from which tables are read: write it without partitionBy, or pack one of the folders"
            )
    if len(kinds) > 1:
        raise DataError(f"{source} has both text and Parquet tables: give one kind")
    filled = [file for file in found if file[1]]  # a reducer that was given nothing writes an empty file
    if not filled:
        raise DataError(f"{source} is empty")
    return filled


def _pieces(files: Sequence[tuple[str, int]], parquet: bool, shard_bytes: int) -> list[Piece]:
    if not parquet:
        return cut(files, shard_bytes)
    pieces = []
    for url, _ in files:
        meta = _parquet(url).metadata
        for group in range(meta.num_row_groups):
            size = meta.row_group(group).total_byte_size
            pieces.append(Piece(url=url, start=group, bytes=size, name=f"{url}, row group {group}"))
    return pieces


def _parquet(url: str) -> Any:
    pyarrow, parquet = load_pyarrow()
    try:
        return parquet.ParquetFile(open_file(url))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{url} is no Parquet file or is damaged ({error})") from error


def _row_group(piece: Piece) -> Table:
    pyarrow = load_pyarrow()[0]
    try:
        table = _parquet(piece.url).read_row_group(piece.start)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{piece.name} is damaged ({error})") from error
    return from_arrow(table, piece.name)


def _header(url: str, delimiter: str) -> tuple[str, ...]:
    first = read_range(url, 0, BLOCK_BYTES).split(b"\n", 1)[0]
    try:
        rows = list(csv.reader([first.decode("utf-8-sig")], delimiter=delimiter, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{url} is no readable table ({error})") from error
    if not rows:
        raise DataError(f"{url} begins with an empty line: its first line must name the columns, or give --names")
    return tuple(name.strip() for name in rows[0])


def _own_lines(piece: Piece) -> Iterator[str]:
    """The lines that begin in the piece: its last one is read to its end, the rest of the line before is left out."""
    start = max(0, piece.start - 1)  # one byte more tells whether a line begins at the very start
    content = read_range(piece.url, start, piece.bytes + piece.start - start)
    if not piece.start:
        content = content.removeprefix(codecs.BOM_UTF8)
    else:
        first = content.find(b"\n")
        content = b"" if first < 0 else content[first + 1 :]
    position = piece.start + piece.bytes
    if content and not content.endswith(b"\n"):
        while block := read_range(piece.url, position, BLOCK_BYTES):
            end = block.find(b"\n")
            content += block if end < 0 else block[: end + 1]
            position += len(block)
            if end >= 0:
                break
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{piece.url} is not UTF-8 near byte {piece.start + error.start}: {error.reason}") from error


@final
@dataclass(frozen=True, kw_only=True)
class _Summarise:
    reader: _Reader
    form: TableForm

    def __call__(self, piece: Piece) -> Summary | str:
        try:
            return summarise(self.reader.table(piece), self.form)
        except DataError as error:
            return str(error)


def _survey(pieces: Sequence[Piece], reader: _Reader, form: TableForm, run: Run) -> tuple[Summary, _Reader]:
    """What the training rows hold. Columns that are numbers in one part and text in another are read again as text."""
    while True:
        found: list[Summary] = []
        for result in run(_Summarise(reader=reader, form=form), pieces, "looking through the table"):
            if isinstance(result, str):
                raise DataError(result)
            found.append(result)
        summary = merge(found)
        if not summary:
            raise DataError(f"{pieces[0].url if pieces else 'the table'} has no rows")
        # a part whose values are all missing says "numbers" of any column, so text elsewhere decides
        mixed = {
            name for name, column in summary.items()
            if not column.numbers and any(part[name].numbers for part in found if name in part)
        }  # fmt: skip
        if mixed <= reader.as_text or reader.parquet:
            text = frozenset(name for name, column in summary.items() if not column.numbers)
            return summary, _Reader(**{**vars(reader), "as_text": text})
        reader = _Reader(**{**vars(reader), "as_text": frozenset(mixed | reader.as_text)})


@final
@dataclass(frozen=True, kw_only=True)
class _TableMaker(Maker):
    reader: _Reader
    coder: Coder
    summary: Summary

    def make(self, part: Part) -> Made:
        (piece,) = part.pieces
        table = self.reader.table(piece)
        if not table:
            return Made(arrays={})
        inputs, targets = self.coder.code(table, piece.name)
        named = {"inputs": inputs}
        if isinstance(inputs, tuple):
            named = {f"inputs.{place}": array for place, array in enumerate(inputs)}
        return Made(arrays={**named, "targets": targets})

    def statistics(self, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Mean and deviation of each column of numbers, the number of categories of each other column."""
        numbers = {name: {"mean": mean, "std": deviation} for name, (mean, deviation) in self.coder.numbers.items()}
        categories = {name: values.tolist() for name, values in self.coder.categories.items()}
        counts = {name: self.summary[name].count for name in numbers}
        return {"numbers": numbers, "categories": categories, "known": counts}
