"""Tables with a target column, from CSV and Parquet: numbers are standardised, categories coded.

What is learned from the data (means, categories, classes) is learned from the training table alone.
"""

import bz2
import csv as csv_module
import gzip
import lzma
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shardwise.data.gather import Arrays
from shardwise.data.readers.files import missing as missing_file
from shardwise.data.readers.tablecode import (
    Coder,
    Table,
    TableForm,
    fit,
    from_arrow,
    load_pyarrow,
    parse_rows,
    summarise,
)
from shardwise.data.source import Splits
from shardwise.data.transforms import Transform
from shardwise.errors import DataError

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def csv(
    train: str | Path,
    test: str | Path | None = None,
    *,
    target: str,
    names: Sequence[str] | None = None,
    categorical: Sequence[str] = (),
    drop: Sequence[str] = (),
    onehot: bool = False,
    missing: Sequence[str] = ("", "?", "NA", "nan", "NaN"),
    delimiter: str = ",",
    strip_target: str = "",
    transform: Transform | None = None,
) -> Splits:
    """Tables as text, one row a line, also compressed (.gz, .bz2, .xz); spaces around values and empty lines do not count.

    Inputs are float32 (N, numbers), standardised over the training rows, a missing number being the mean; where there
    are columns of categories, `(numbers, codes)` with int64 codes (N, columns) that start from 1 in sorted order, 0
    being missing or not seen in training. Targets that are numbers are float32 (N,); others are int64 class numbers, and
    `Splits.classes` their names.

    Args:
        target: name of the column to predict.
        names: names of the columns, for files without a header line.
        categorical: columns of numbers that are categories; as the target, numbers that are classes.
        drop: columns to leave out.
        onehot: instead of codes, one number (0 or 1) for each category, after the other numbers in one tensor.
        missing: what stands for a missing value.
        strip_target: characters taken off the end of a target, such as "." where one file has "yes." for "yes".
        transform: whole-batch transform of both splits.
    """
    form = TableForm(
        target=target,
        categorical=tuple(categorical),
        drop=tuple(drop),
        onehot=onehot,
        strip_target=strip_target,
    )

    def read(path: str | Path) -> Table:
        return _read_csv(Path(path), names, delimiter, frozenset(missing))

    return _splits(train, test, read, form, transform)


def parquet(
    train: str | Path,
    test: str | Path | None = None,
    *,
    target: str,
    categorical: Sequence[str] = (),
    drop: Sequence[str] = (),
    onehot: bool = False,
    transform: Transform | None = None,
) -> Splits:
    """The same from Parquet files; needs pyarrow (`pip install "shardwise[tables]"`)."""
    form = TableForm(target=target, categorical=tuple(categorical), drop=tuple(drop), onehot=onehot)
    return _splits(train, test, lambda path: _read_parquet(Path(path)), form, transform)


def _splits(train: Any, test: Any, read: Any, form: TableForm, transform: Transform | None) -> Splits:
    @cache
    def fitted() -> tuple[Coder, tuple[Any, Any]]:
        table = read(train)
        coder = fit(summarise(table, form), form, str(train))
        return coder, coder.code(table, str(train))

    def classes() -> tuple[str, ...]:
        return fitted()[0].classes

    return Splits(
        lambda: Arrays(fitted()[1], transform),
        None if test is None else lambda: Arrays(fitted()[0].code(read(test), str(test)), transform),
        about=f"table {train}",
        classes=classes,
    )


def _read_csv(path: Path, names: Sequence[str] | None, delimiter: str, missing: frozenset[str]) -> Table:
    layout = f"Expected text with {delimiter!r} between the values" + (" and a header line." if names is None else ".")
    try:
        opener: Any = _OPENERS.get(path.suffix, open)
        with opener(path, "rt", newline="", encoding="utf-8-sig") as file:
            table = parse_rows(file, str(path), names, delimiter, missing)
    except OSError as error:
        raise missing_file(path, error, layout) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged or not complete ({error}); get it again") from error
    except (UnicodeDecodeError, csv_module.Error) as error:
        raise DataError(f"{path} is no readable table ({error}). {layout}") from error
    if not table:
        raise DataError(f"{path} has no rows. {layout}")
    return table


def _read_parquet(path: Path) -> Table:
    pyarrow, parquet_module = load_pyarrow()
    try:
        table = parquet_module.read_table(path)
    except OSError as error:
        raise missing_file(path, error, "Expected a Parquet file.") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no Parquet file or is damaged ({error})") from error
    return from_arrow(table, str(path))
