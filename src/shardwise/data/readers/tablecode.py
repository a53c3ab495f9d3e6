"""Tables as arrays, needing NumPy alone: parsing, what is learned from the training rows, and coding with it.

What is learned is a `ColumnSummary` for each column. Summaries of parts of a table merge into that of the whole, so a
table that is read in many pieces gives what the same table read at once gives.
"""

from __future__ import annotations

import csv as csv_module
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

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


def parse_rows(
    lines: Iterable[str],
    where: str,
    header: Sequence[str] | None,
    delimiter: str,
    missing: frozenset[str],
    as_text: frozenset[str] = frozenset(),
    whole_lines: bool = False,
) -> Table:
    """A table from lines of text; {} where there is no row.

    Args:
        where: what messages call the text.
        header: names of the columns; None takes the first line.
        as_text: columns to keep as strings, though all their values here are numbers.
        whole_lines: the lines are a part of a file, so a quoted value must not go over a line's end.

    Raises:
        DataError: a row of another length, two columns of one name, or a quoted value that runs over several lines.
    """
    columns: list[list[str]] = [] if header is None else [[] for _ in header]
    names = None if header is None else list(header)
    reader = csv_module.reader(lines, delimiter=delimiter, skipinitialspace=True)
    before = 0
    for row in reader:
        if whole_lines and reader.line_num > before + 1:
            raise DataError(
                f"{where}: a quoted value runs over several lines, so the file cannot be cut at line ends; write it "
                "without line breaks in values, or as Parquet"
            )
        before = reader.line_num
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if names is None:
            names = [name.strip() for name in row]
            columns = [[] for _ in names]
            continue
        if len(row) != len(names):
            raise DataError(
                f"{where}, line {reader.line_num}: {len(row)} values in a table of {len(names)} columns; "
                "correct the line, the delimiter or the names"
            )
        for column, value in zip(columns, row, strict=True):
            value = value.strip()
            column.append("" if value in missing else value)
    if names is None or not columns or not columns[0]:
        return {}
    if len(set(names)) != len(names):
        raise DataError(f"{where}: two columns have the same name in {names}; give names=")
    return {name: _typed(values, name in as_text) for name, values in zip(names, columns, strict=True)}


def _typed(values: list[str], as_text: bool) -> Column:
    """Numbers where every value that is not missing is one, else strings."""
    if not as_text:
        try:
            return np.array([value or "nan" for value in values], dtype=np.str_).astype(np.float64)
        except ValueError:
            pass
    return np.array(values, dtype=np.str_)


def load_pyarrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError('reading Parquet needs pyarrow: pip install "shardwise[tables]"') from error


def from_arrow(table: Any, where: str) -> Table:
    """A `pyarrow.Table` of numbers and strings.

    Raises:
        DataError: no rows, or a column of another type; `where` names the file.
    """
    types = load_pyarrow()[0].types
    columns: Table = {}
    for name in table.column_names:
        column = table.column(name)
        kind = column.type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind):
            values = [np.nan if value is None else float(value) for value in column.to_pylist()]
            columns[name] = np.array(values, dtype=np.float64)
        elif types.is_string(kind) or types.is_large_string(kind):
            columns[name] = np.array([value or "" for value in column.to_pylist()], dtype=np.str_)
        else:
            raise DataError(
                f"{where}: column {name!r} holds {column.type}: give numbers or strings, or drop it in the file"
            )
    if not table.num_rows:
        raise DataError(f"{where} has no rows")
    return columns


@dataclass(frozen=True, kw_only=True)
class ColumnSummary:
    """What one column of a table, or of a part of it, holds.

    Attributes:
        numbers: all values that are there are numbers.
        count, mean, squares: of the numbers; `squares` is the sum of squared differences from the mean.
        values: the distinct strings, sorted, where the column is text or is to be coded; without the missing one.
    """

    numbers: bool
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    values: tuple[str, ...] = ()

    def merged(self, other: ColumnSummary) -> ColumnSummary:
        """The summary of both parts together (Chan, Golub and LeVeque 1979, equations 2.1)."""
        values = tuple(sorted({*self.values, *other.values}))
        count = self.count + other.count
        if not count:
            return replace(self, numbers=self.numbers and other.numbers, values=values)
        step = other.mean - self.mean
        return ColumnSummary(
            numbers=self.numbers and other.numbers,
            count=count,
            mean=self.mean + step * other.count / count,
            squares=self.squares + other.squares + step * step * self.count * other.count / count,
            values=values,
        )


MANY_NUMBERS, FEW_WORDS = 10, 0.1
"""A column of text with so many different numbers, and at most this share of other values, is taken for a broken one. Chosen."""

MOST_WHOLE = 1e15
"""From here on `_strings`, which writes 15 digits, gives close whole numbers one name."""

Summary = dict[str, ColumnSummary]


def summarise(table: Table, form: TableForm) -> Summary:
    """What the columns hold; of those to drop, only that they are there."""
    found = {}
    for name, values in table.items():
        if name in form.drop:
            found[name] = ColumnSummary(numbers=True)
            continue
        coded: tuple[str, ...] = ()
        if not _are_numbers(values) or name in form.categorical:
            strings = _strings(values)
            if name == form.target:
                strings = np.char.rstrip(strings, form.strip_target or None)
            if _are_numbers(values):
                _check_digits(name, values)
            coded = tuple(str(value) for value in np.unique(strings[strings != ""]))
        if _are_numbers(values):
            known = values[~np.isnan(values)]
            with np.errstate(over="ignore", invalid="ignore"):  # `fit` refuses what is too large, and knows the file
                mean = float(known.mean()) if len(known) else 0.0
                squares = float(((known - mean) ** 2).sum())
            found[name] = ColumnSummary(numbers=True, count=len(known), mean=mean, squares=squares, values=coded)
        else:
            found[name] = ColumnSummary(numbers=False, values=coded)
    return found


def merge(summaries: Iterable[Summary]) -> Summary:
    """The summary of a table from those of its parts, in their order."""
    whole: Summary = {}
    for part in summaries:
        for name, column in part.items():
            whole[name] = whole[name].merged(column) if name in whole else column
    return whole


@dataclass(frozen=True)
class Coder:
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
            with np.errstate(over="ignore"):
                coded = ((values - mean) / deviation).astype(np.float32)
            if np.isinf(coded).any():
                row = int(np.isinf(coded).argmax())
                raise DataError(
                    f"{where}: row {row + 1}, column {name!r}: {values[row]:g} is too large a number; correct it"
                )
            numbers[:, place] = np.nan_to_num(coded, nan=0.0)
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
            with np.errstate(over="ignore"):
                targets = values.astype(np.float32)
            if np.isinf(targets).any():
                row = int(np.isinf(targets).argmax())
                raise DataError(
                    f"{where}: row {row + 1} has the target {values[row]:g}, too large a number; correct it"
                )
            return targets
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


def fit(summary: Summary, form: TableForm, where: str) -> Coder:
    """What a training table with this summary teaches.

    Args:
        where: what messages call the table.

    Raises:
        JobError: a column that the form names is not there, or none is left to predict from.
    """
    for name in (form.target, *form.categorical, *form.drop):
        if name not in summary:
            raise JobError(
                f"{where} has no column {name!r}: its columns are {list(summary)}; if these are values, the file has no header "
                "line: name the columns (names=, --names)"
            )
    numbers: dict[str, tuple[float, float]] = {}
    categories: dict[str, NDArray[np.str_]] = {}
    for name, column in summary.items():
        if name == form.target or name in form.drop:
            continue
        if column.numbers and name not in form.categorical:
            if not np.isfinite([column.mean, column.squares]).all():
                raise DataError(
                    f"{where}: column {name!r} holds infinity, or numbers too large to square, so it has no mean and deviation. "
                    "Correct these rows; or say that it stands for a missing value (missing=), or drop the column (drop=, --drop)"
                )
            deviation = float(np.sqrt(column.squares / column.count)) if column.count else 1.0
            numbers[name] = (column.mean, deviation if deviation > 0 else 1.0)
        else:
            if not column.numbers and name not in form.categorical:
                _check_category(name, column.values, where)
            categories[name] = np.array(column.values, dtype=np.str_)
    target = summary[form.target]
    classes = () if target.numbers and form.target not in form.categorical else target.values
    if not numbers and not categories:
        raise JobError(f"{where}: no column is left to predict {form.target!r} from")
    return Coder(form, numbers, categories, classes)


def _check_category(name: str, values: Sequence[str], where: str) -> None:
    """Refuse a column of numbers with a few words in it, which would make a category of every number."""
    words = [value for value in values if not _is_number(value)]
    if len(values) - len(words) < MANY_NUMBERS or len(words) > FEW_WORDS * len(values):
        return
    shown = ", ".join(map(repr, words[:3])) + (", ..." if len(words) > 3 else "")
    raise DataError(
        f"{where}: column {name!r} holds {len(values) - len(words)} different numbers, but also {shown}. Correct these rows; or "
        f"say that it stands for a missing value (missing=), or that all are categories (categorical=, --categorical {name})"
    )


def _check_digits(name: str, values: NDArray[np.float64]) -> None:
    """Refuse numbers whose last digits a float does not hold: different ones would become one category."""
    large = values[np.abs(values) >= MOST_WHOLE]
    if len(large):
        raise DataError(
            f"column {name!r} is to be categories, but holds numbers of more than 15 digits, such as {large[0]:.0f}: close ones "
            "cannot be told apart. Write them as text (with a letter in front), or drop the column (drop=, --drop)"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
