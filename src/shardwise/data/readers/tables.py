"""Tables with a target column, from CSV and Parquet: numbers are standardised, categories coded.

What is learned from the data (means, categories, classes) is learned from the training table alone.
"""

import csv as csv_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from shardwise.data.gather import Arrays
from shardwise.data.readers.files import missing as missing_file
from shardwise.data.source import Splits
from shardwise.data.transforms import Transform
from shardwise.errors import DataError, JobError

Column = NDArray[np.str_] | NDArray[np.float64]
Table = dict[str, Column]
"""Name -> values: strings with "" for a missing one, or float64 with NaN for a missing one. All of one length."""


@dataclass(frozen=True, kw_only=True)
class TableForm:
    """What a table looks like and what to make of it.

    Attributes:
        target: name of the column to predict.
        categorical: columns of numbers that are categories.
        drop: columns to leave out.
        onehot: one number a category instead of a code.
        strip_target: characters taken off the end of a target.
    """

    target: str
    categorical: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    onehot: bool = False
    strip_target: str = ""


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
    """Tables as text, one row a line; spaces around values and empty lines do not count.

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
    def fitted() -> tuple["_Coder", tuple[Any, Any]]:
        table = read(train)
        coder = _fit(table, form, str(train))
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
    columns: list[list[str]] = [] if names is None else [[] for _ in names]
    header = None if names is None else list(names)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv_module.reader(file, delimiter=delimiter, skipinitialspace=True)
            for row in reader:
                if not row or (len(row) == 1 and not row[0].strip()):
                    continue
                if header is None:
                    header = [name.strip() for name in row]
                    columns = [[] for _ in header]
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} values in a table of {len(header)} columns; "
                        "correct the line, the delimiter or the names"
                    )
                for column, value in zip(columns, row, strict=True):
                    value = value.strip()
                    column.append("" if value in missing else value)
    except OSError as error:
        raise missing_file(path, error, layout) from error
    except (UnicodeDecodeError, csv_module.Error) as error:
        raise DataError(f"{path} is no readable table ({error}). {layout}") from error
    if header is None or not columns or not columns[0]:
        raise DataError(f"{path} has no rows. {layout}")
    if len(set(header)) != len(header):
        raise DataError(f"{path}: two columns have the same name in {header}; give names=")
    return {name: _typed(values) for name, values in zip(header, columns, strict=True)}


def _typed(values: list[str]) -> Column:
    """Numbers where every value that is not missing is one, else strings."""
    try:
        return np.array([value or "nan" for value in values], dtype=np.str_).astype(np.float64)
    except ValueError:
        return np.array(values, dtype=np.str_)


def _read_parquet(path: Path) -> Table:
    try:
        pyarrow, parquet_module = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError('reading Parquet needs pyarrow: pip install "shardwise[tables]"') from error
    try:
        table = parquet_module.read_table(path)
    except OSError as error:
        raise missing_file(path, error, "Expected a Parquet file.") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no Parquet file or is damaged ({error})") from error
    columns: Table = {}
    for name in table.column_names:
        column = table.column(name)
        kind = column.type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        types = pyarrow.types
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind):
            values = [np.nan if value is None else float(value) for value in column.to_pylist()]
            columns[name] = np.array(values, dtype=np.float64)
        elif types.is_string(kind) or types.is_large_string(kind):
            columns[name] = np.array([value or "" for value in column.to_pylist()], dtype=np.str_)
        else:
            raise DataError(
                f"{path}: column {name!r} holds {column.type}: give numbers or strings, or drop it in the file"
            )
    if not table.num_rows:
        raise DataError(f"{path} has no rows")
    return columns


@dataclass(frozen=True)
class _Coder:
    """What was learned from the training table."""

    form: TableForm
    numbers: Mapping[str, tuple[float, float]]  # name -> mean, deviation
    categories: Mapping[str, NDArray[np.str_]]  # name -> sorted values
    classes: tuple[str, ...]

    def code(self, table: Table, where: str) -> tuple[Any, Any]:
        """`(inputs, targets)` of one table."""
        lacking = [name for name in (*self.numbers, *self.categories, self.form.target) if name not in table]
        if lacking:
            raise DataError(
                f"{where} has no column {lacking[0]!r}, the training table has; its columns are {list(table)}"
            )
        rows = len(next(iter(table.values())))
        numbers = np.zeros((rows, len(self.numbers)), np.float32)
        for place, (name, (mean, deviation)) in enumerate(self.numbers.items()):
            values = table[name]
            if not _are_numbers(values):
                raise DataError(f"{where}: column {name!r} holds text, in the training table it holds numbers")
            numbers[:, place] = np.nan_to_num((values - mean) / deviation, nan=0.0)
        codes = np.zeros((rows, len(self.categories)), np.int64)
        for place, (name, known) in enumerate(self.categories.items()):
            codes[:, place] = _codes(_strings(table[name]), known)
        return self._inputs(numbers, codes), self._targets(table, where)

    def _inputs(self, numbers: NDArray[np.float32], codes: NDArray[np.int64]) -> Any:
        if not self.categories:
            return numbers
        if not self.form.onehot:
            return numbers, codes
        blocks = [numbers]
        for place, known in enumerate(self.categories.values()):
            blocks.append(np.equal.outer(codes[:, place], np.arange(1, len(known) + 1)).astype(np.float32))
        return np.concatenate(blocks, axis=1)

    def _targets(self, table: Table, where: str) -> Any:
        values = table[self.form.target]
        if not self.classes:
            if not _are_numbers(values):
                raise DataError(
                    f"{where}: target {self.form.target!r} holds text, in the training table it holds numbers"
                )
            if np.isnan(values).any():
                raise DataError(f"{where}: row {int(np.isnan(values).argmax()) + 1} has no target")
            return values.astype(np.float32)
        labels = (
            np.char.rstrip(_strings(values), self.form.strip_target) if self.form.strip_target else _strings(values)
        )
        codes = _codes(labels, np.array(self.classes)) - 1
        if (codes < 0).any():
            row = int((codes < 0).argmax())
            raise DataError(
                f"{where}: row {row + 1} has the target {str(labels[row])!r}, the classes are {list(self.classes)}; correct "
                "the file, or see strip_target="
            )
        return codes


def _fit(table: Table, form: TableForm, where: str) -> _Coder:
    for name in (form.target, *form.categorical, *form.drop):
        if name not in table:
            raise JobError(f"{where} has no column {name!r}: its columns are {list(table)}")
    numbers: dict[str, tuple[float, float]] = {}
    categories: dict[str, NDArray[np.str_]] = {}
    for name, values in table.items():
        if name == form.target or name in form.drop:
            continue
        if _are_numbers(values) and name not in form.categorical:
            known = values[~np.isnan(values)]
            deviation = float(known.std()) if len(known) else 1.0
            numbers[name] = (float(known.mean()) if len(known) else 0.0, deviation if deviation > 0 else 1.0)
        else:
            strings = _strings(values)
            categories[name] = np.unique(strings[strings != ""])
    targets = table[form.target]
    classes: tuple[str, ...] = ()
    if not _are_numbers(targets) or form.target in form.categorical:
        labels = np.unique(np.char.rstrip(_strings(targets), form.strip_target or None))
        classes = tuple(str(label) for label in labels if label)
    if not numbers and not categories:
        raise JobError(f"{where}: no column is left to predict {form.target!r} from")
    return _Coder(form, numbers, categories, classes)


def _are_numbers(values: Column) -> TypeGuard[NDArray[np.float64]]:
    return values.dtype.kind == "f"


def _strings(values: Column) -> NDArray[np.str_]:
    """Numbers as categories: 3.0 is "3", missing is ""."""
    if not _are_numbers(values):
        return values.astype(np.str_, copy=False)
    return np.array(["" if np.isnan(value) else f"{value:.15g}" for value in values], dtype=np.str_)


def _codes(values: NDArray[np.str_], known: NDArray[np.str_]) -> NDArray[np.int64]:
    """1 + place in the sorted `known`; 0 for anything else."""
    if not len(known):
        return np.zeros(len(values), np.int64)
    places = np.searchsorted(known, values).clip(max=len(known) - 1)
    return np.where(known[places] == values, places + 1, 0)
