"""Runs that a user measured, in the columns of docs/predict.md: what they were, and what came out."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import DataError
from shardwise.planner.runs import BLANKS, Row, read_table, rows_of

GIB = 2**30
MOST = 200
"""Rows at most: solving for their weights takes a second, and more teach next to nothing."""

OUT_OF_MEMORY = ("oom", "out of memory")
RAN = (*BLANKS, "ok")
"""Of rows with any other status nothing is learned."""


UNMEASURED = tuple(word for word in BLANKS if word != "nan")
"""Cells in which nothing was measured; a NaN is what went wrong while measuring."""


@dataclass(frozen=True)
class MeasuredRow:
    """One run: its description, and seconds of a step, bytes of a rank, or that it ran out of memory."""

    row: Row
    step_seconds: float | None
    memory_bytes: float | None
    out_of_memory: bool = False


def read_measured(path: Path) -> list[MeasuredRow]:
    """The runs of a table that have something measured.

    Raises:
        DataError: no table, no row with anything measured, too many, or a measured cell that is no number above 0.
    """
    table = read_table(path)
    name = str(path)
    header, lines = table
    found = []
    for row, (number, cells) in zip(rows_of(table, name, strict=False), lines, strict=True):
        measured = _measured(row, dict(zip(header, cells, strict=False)), f"table {name}, line {number}")
        if measured is not None:
            found.append(measured)
    if not found:
        raise DataError(
            f"table {name} has no measured run: fill in step_seconds (or tokens_per_s_per_gpu), memory_gib, or status oom, "
            "of at least one row"
        )
    if len(found) > MOST:
        raise DataError(
            f"table {name} has {len(found)} measured runs: give at most {MOST}, those most like what you plan"
        )
    return found


def _measured(row: Row, cells: Mapping[str, str], where: str) -> MeasuredRow | None:
    """What was measured of one row; None for one without."""
    status = _status(cells)
    if status in OUT_OF_MEMORY:
        return MeasuredRow(row, None, None, out_of_memory=True)
    if status not in RAN:
        return None
    step = _positive(cells, "step_seconds", where)
    rate = _positive(cells, "tokens_per_s_per_gpu", where)
    if step is None and rate is not None:
        if not all(column in row for column in ("gpus", "global_batch", "seq_len")):
            raise DataError(f"{where}: tokens_per_s_per_gpu tells a step only beside gpus, global_batch and seq_len")
        step = int(row["global_batch"]) * int(row["seq_len"]) / (rate * int(row["gpus"]))
    memory = _positive(cells, "memory_gib", where)
    if step is None and memory is None:
        return None
    return MeasuredRow(row, step, None if memory is None else memory * GIB)


def other_statuses(path: Path) -> Counter[str]:
    """Status -> rows that have it, of those from which nothing is learned for their status.

    Raises:
        DataError: as `read_table`.
    """
    header, lines = read_table(path)
    found = Counter(_status(dict(zip(header, cells, strict=False))) for _, cells in lines)
    return Counter({status: rows for status, rows in found.items() if status not in (*RAN, *OUT_OF_MEMORY)})


def _status(cells: Mapping[str, str]) -> str:
    return cells.get("status", "").strip().lower()


def _positive(cells: Mapping[str, str], column: str, where: str) -> float | None:
    text = cells.get(column, "").strip()
    if text.lower() in UNMEASURED:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(
            f"{where}, column {column}: {text!r} must be a number above 0; leave it blank if nothing was measured"
        )
    return value


def names_of(runs: Iterable[MeasuredRow]) -> tuple[str, ...]:
    """The labels of the runs."""
    return tuple(str(run.row["run_id"]) for run in runs)
