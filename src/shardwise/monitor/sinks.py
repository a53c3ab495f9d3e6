"""Sinks: where events go besides the page: tables, TensorBoard, and whatever somebody writes a few lines for.

A sink of one's own is any object with `take` and `close`, or a subclass of `Sink`; `rows` turns an event into numbers.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

from shardwise.errors import UserError
from shardwise.spec.events import EvaluationEvent, Event, StepsEvent
from shardwise.spec.observations import ExpertsEvent, RanksEvent

COLUMNS = ("run", "t", "step", "name", "rank", "value")

_ROWS_A_GROUP = 100_000


class Row(NamedTuple):
    """One number.

    Attributes:
        t: unix seconds.
        step: global number of the step, from 0; of an evaluation, of the last step before it.
        name: `loss`, `step_seconds`, `gradient_norm`, `learning_rate/0`, `test/accuracy`, `seconds/backward`, ...
        rank: whose; -1 for the whole run.
    """

    t: float
    step: int
    name: str
    rank: int
    value: float


class Sink(ABC):
    """Takes the events of runs, each once, in order."""

    @abstractmethod
    def take(self, run: str, event: Event) -> None:
        """One event.

        Args:
            run: name of the run's folder.
            event: see `docs/run-folder.md` for the kinds.
        """

    @abstractmethod
    def close(self) -> None:
        """There will be no more."""


def rows(event: Event) -> Iterator[Row]:
    """The numbers of an event; none of those that are words."""
    t = event.t
    if isinstance(event, StepsEvent):
        for offset, (loss, seconds) in enumerate(zip(event.losses, event.seconds, strict=True)):
            yield Row(t, event.first_step + offset, "loss", -1, loss)
            yield Row(t, event.first_step + offset, "step_seconds", -1, seconds)
        for name, losses in event.objectives.items():
            for offset, value in enumerate(losses):
                if value is not None:
                    yield Row(t, event.first_step + offset, f"loss/{name}", -1, value)
        last = event.first_step + len(event.losses) - 1
        if event.gradient_norm is not None:
            yield Row(t, last, "gradient_norm", -1, event.gradient_norm)
        for group, rate in enumerate(event.learning_rates):
            yield Row(t, last, f"learning_rate/{group}", -1, rate)
        if sum(event.seconds):
            yield Row(t, last, "samples_per_second", -1, event.samples / sum(event.seconds))
    elif isinstance(event, EvaluationEvent):
        for name, value in event.metrics.items():
            yield Row(t, event.step - 1, f"{event.split}/{name}", -1, value)
    elif isinstance(event, RanksEvent):
        last = event.first_step + event.steps - 1
        for phase, column in event.phase_seconds.items():
            for rank, seconds in enumerate(column):
                yield Row(t, last, f"seconds/{phase}", rank, seconds / max(1, event.timed_steps))
        for name in ("late_seconds", "memory_bytes"):
            for rank, value in enumerate(getattr(event, name)):
                yield Row(t, last, name, rank, float(value))
        for rank, seconds in enumerate(event.core_wait_seconds):
            yield Row(t, last, "core_wait_seconds", rank, seconds / max(1, event.steps))
    elif isinstance(event, ExpertsEvent):
        for layer, tokens in event.tokens.items():
            for expert, count in enumerate(tokens):
                yield Row(t, event.step - 1, f"expert_tokens/{layer}/{expert}", -1, float(count))


@final
class CsvSink(Sink):
    """A CSV file with a heading: one number a line. Readable at any time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)

    def take(self, run: str, event: Event) -> None:
        """Append the numbers of an event."""
        self._writer.writerows((run, *row) for row in rows(event))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@final
class ParquetSink(Sink):
    """A Parquet file of the same columns; complete when it is closed, and not there before."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(f"--export {path} needs PyArrow: pip install 'shardwise[tables]', or take .csv") from error
        self._path, self._aside = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        types = {"t": pyarrow.float64(), "step": pyarrow.int64(), "rank": pyarrow.int32(), "value": pyarrow.float64()}
        self._schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in COLUMNS])
        self._table = pyarrow.Table
        self._writer = parquet.ParquetWriter(self._aside, self._schema)
        self._rows: list[tuple[Any, ...]] = []

    def take(self, run: str, event: Event) -> None:
        """Keep the numbers of an event; full groups are written."""
        self._rows += [(run, *row) for row in rows(event)]
        if len(self._rows) >= _ROWS_A_GROUP:
            self._flush()

    def close(self) -> None:
        """Write the rest and give the file its name."""
        self._flush()
        self._writer.close()
        self._aside.replace(self._path)

    def _flush(self) -> None:
        records = [dict(zip(COLUMNS, row, strict=True)) for row in self._rows]
        self._writer.write_table(self._table.from_pylist(records, schema=self._schema))
        self._rows = []


@final
class TensorBoardSink(Sink):
    """Event files for TensorBoard, a folder a run; numbers of single ranks are named `.../rank 3`."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"--export tensorboard:{folder} needs tensorboardX: pip install 'shardwise[tensorboard]'"
            ) from error
        self._make, self._folder = SummaryWriter, folder
        self._writers: dict[str, Any] = {}

    def take(self, run: str, event: Event) -> None:
        """Write the numbers of an event."""
        if run not in self._writers:
            self._writers[run] = self._make(logdir=str(self._folder / run), flush_secs=2)
        for row in rows(event):
            name = row.name if row.rank < 0 else f"{row.name}/rank {row.rank}"
            self._writers[run].add_scalar(name.replace(" ", "_"), row.value, row.step, walltime=row.t)

    def close(self) -> None:
        """Flush and close."""
        for writer in self._writers.values():
            writer.close()


def make_sink(where: str) -> Sink:
    """The sink that an `--export` asks for: `FILE.csv`, `FILE.parquet`, `tensorboard:FOLDER` or `FILE.py:FUNCTION`.

    Raises:
        UserError: it is none of these, cannot be written, or what it needs is not installed.
    """
    kind, _, rest = where.partition(":")
    try:
        if kind == "tensorboard" and rest:
            return TensorBoardSink(Path(rest))
        if kind.endswith(".py") and rest:
            return _own_sink(Path(kind), rest)
        path = Path(where)
        if path.suffix == ".csv":
            return CsvSink(path)
        if path.suffix == ".parquet":
            return ParquetSink(path)
    except OSError as error:
        raise UserError(f"--export {where}: {error.strerror}; give another place") from error
    raise UserError(
        f"--export {where!r}: give FILE.csv, FILE.parquet, tensorboard:FOLDER, or FILE.py:FUNCTION that returns a sink"
    )


def _own_sink(path: Path, function: str) -> Sink:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--export {path}:{function}: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        raise UserError(f"--export {path}:{function}: {path} has no function {function!r}")
    sink: Sink = make()
    for name in ("take", "close"):
        if not callable(getattr(sink, name, None)):
            raise UserError(
                f"--export {path}:{function}: it returned a {type(sink).__name__} without the method {name!r}; "
                "derive it from shardwise.monitor.sinks.Sink"
            )
    return sink
