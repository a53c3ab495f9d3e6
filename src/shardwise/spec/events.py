"""Event: one line of `events.jsonl`, the only thing `watch` and reports read.

A line is one JSON object `{"v": 1, "t": unix seconds, "kind": ..., ...}`. The version counts breaking changes only: a
newer shardwise may add kinds and fields, and a reader steps over those it does not know. Numbers that JSON lacks are
written as the words `nan`, `inf` and `-inf`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from shardwise.errors import FolderError
from shardwise.spec.event import LOSS, SECONDS, VERSION
from shardwise.spec.event import Event as Event
from shardwise.spec.fields import field_readers
from shardwise.spec.observations import (
    BalanceEvent,
    BottleneckEvent,
    ExpertsEvent,
    RanksEvent,
    RecoveryEvent,
    StallEvent,
    StragglerEvent,
    SweepEvent,
    TraceEvent,
)


@dataclass(frozen=True, kw_only=True)
class RunEvent(Event):
    """A run starts, or goes on: the first event of every start.

    Attributes:
        name: of the job.
        settings: resolved settings as `Settings.to_dict` gives them.
        plan: as `Plan.to_dict` gives it.
        versions: package -> version.
        host: name of the machine of rank 0.
        ranks: number of workers.
        first_step: global steps that were done before, 0 for a new run.
        total_steps: global steps at the end of the run, None when unknown.
        device: kind of device, such as `cpu`.
        cores: of the machine of rank 0 that the run may use, None when not known.
        batch_size: samples of a global batch.
        stall_seconds: the largest bound of a stalled step; 0 where nobody looks.
    """

    kind: ClassVar[str] = "run"
    name: str
    settings: dict[str, Any]
    plan: dict[str, Any]
    versions: dict[str, str]
    host: str
    ranks: int
    first_step: int = 0
    total_steps: int | None = None
    device: str = ""
    cores: int | None = None
    batch_size: int | None = None
    stall_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepsEvent(Event):
    """Some consecutive optimizer steps, ended by time `t`.

    Attributes:
        first_step: global number of the first of them; the first step of a run is 0.
        losses: mean loss over each global batch, one a step.
        seconds: wall seconds, one a step.
        phase_seconds: phase (data, forward, backward, ...) -> wall seconds on rank 0, summed over these steps.
        samples: samples of all workers, summed over these steps.
        gradient_norm: norm of the whole gradient in the last of these steps, before clipping; None when not known.
        learning_rates: of each parameter group, in the last of these steps.
        objectives: of a job with several, name -> mean loss a step, None of a step that did not take it; `losses` are their
            sums.
    """

    kind: ClassVar[str] = "steps"
    first_step: int
    losses: list[float] = field(metadata=LOSS)
    seconds: list[float] = field(metadata=SECONDS)
    samples: int
    phase_seconds: dict[str, float] = field(default_factory=dict, metadata=SECONDS)
    gradient_norm: float | None = field(default=None, metadata=LOSS)
    learning_rates: list[float] = field(default_factory=list, metadata=LOSS)
    objectives: dict[str, list[float | None]] = field(default_factory=dict, metadata=LOSS)


@dataclass(frozen=True, kw_only=True)
class EpochEvent(Event):
    """A pass over the training split ended.

    Attributes:
        epoch: number of the pass; the first is 0.
        step: global steps done.
        seconds: wall seconds of the pass in this start of the run.
        loss_mean: mean over the samples of the pass, as far as this start of the run saw them.
    """

    kind: ClassVar[str] = "epoch"
    epoch: int
    step: int
    seconds: float = field(metadata=SECONDS)
    loss_mean: float | None = field(default=None, metadata=LOSS)


@dataclass(frozen=True, kw_only=True)
class EvaluationEvent(Event):
    """Metrics over a split, each sample counted once.

    Attributes:
        step: global steps done.
        split: such as `test`.
        metrics: name -> value; the loss is `loss`.
        samples: in the split.
        seconds: wall seconds.
    """

    kind: ClassVar[str] = "evaluation"
    step: int
    split: str
    metrics: dict[str, float] = field(metadata=LOSS)
    samples: int
    seconds: float = field(metadata=SECONDS)


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(Event):
    """A checkpoint is complete on disk.

    Attributes:
        step: global steps done.
        path: relative to the run folder.
        seconds: that the training stood still for it.
        bytes: size on disk, None when not measured.
    """

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str
    seconds: float = field(metadata=SECONDS)
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class RestartEvent(Event):
    """The workers were started again after a failure.

    Attributes:
        attempt: 1 for the first restart.
        step: global steps done in the checkpoint it goes on from, 0 without one.
        reason: what failed, one line.
    """

    kind: ClassVar[str] = "restart"
    attempt: int
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class WarningEvent(Event):
    """Something the user should know that did not stop the run."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, kw_only=True)
class SummaryEvent(Event):
    """The run ended well or was stopped by a signal; `summary` is what `shardwise train --json` prints."""

    kind: ClassVar[str] = "summary"
    summary: dict[str, Any] = field(metadata=LOSS)


@dataclass(frozen=True, kw_only=True)
class FailureEvent(Event):
    """The run ended badly.

    Attributes:
        message: one line.
        rank: the global rank that failed first, None when unknown.
        details: its traceback or exit signal.
    """

    kind: ClassVar[str] = "failure"
    message: str
    rank: int | None = None
    details: str = ""


KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        RunEvent,
        StepsEvent,
        EpochEvent,
        EvaluationEvent,
        CheckpointEvent,
        RestartEvent,
        WarningEvent,
        SummaryEvent,
        FailureEvent,
        RanksEvent,
        ExpertsEvent,
        StragglerEvent,
        BottleneckEvent,
        StallEvent,
        RecoveryEvent,
        BalanceEvent,
        TraceEvent,
        SweepEvent,
    )
}


_LATEST = 1e11
"""Unix seconds beyond this (the year 5138) are no times of events."""


def parse_line(line: str, *, place: str = "event") -> Event | None:
    """The event of one line, or None for a kind this version does not know.

    Args:
        line: one JSON object, with or without the line end.
        place: named in errors, such as `runs/x/events.jsonl line 7`.

    Raises:
        ValueError: the line is torn or is no event.
        FolderError: the line was written in a newer, incompatible format.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("v"), int) or "t" not in record:
        raise ValueError(f"{place}: no event")
    if record["v"] > VERSION:
        raise FolderError(
            f"{place} is in event format {record['v']}, and this shardwise reads up to {VERSION}: "
            "read the run with the shardwise that wrote it, or a newer one"
        )
    kind = record.get("kind")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        return None
    values = {name: read(record[name]) for name, read in field_readers(cls).items() if name in record}
    if not 0 <= values["t"] < _LATEST:
        raise ValueError(f"{place}: {values['t']} is no time")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{place}: {error}") from error


class EventReader:
    """Reads `events.jsonl`, again and again while it grows.

    A line counts once its line end is there, so a line that is being written, or was torn by a kill, is never half
    read. Lines that are no events (a torn line that a resumed run ended) are stepped over and counted in `skipped`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = 0
        self._offset = 0
        self._line_number = 0

    def poll(self) -> list[Event]:
        """Events that were completed since the last call; none while the file does not exist.

        Raises:
            FolderError: a line of a newer, incompatible format.
        """
        return list(self.new())

    def new(self) -> Iterator[Event]:
        """The same one by one, so that a long file need not be in memory.

        Raises:
            FolderError: a line of a newer, incompatible format.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._line_number += 1
                if not line.strip():
                    continue
                try:
                    event = parse_line(line.decode("utf-8"), place=f"{self.path} line {self._line_number}")
                except (ValueError, RecursionError):  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
                    self.skipped += 1
                    continue
                if event is not None:
                    yield event


def read_events(path: Path) -> list[Event]:
    """All complete events of a file, oldest first; torn lines and unknown kinds are left out.

    Raises:
        FolderError: the file does not exist, or is of a newer, incompatible format.
    """
    if not path.is_file():
        raise FolderError(f"{path} does not exist: a run folder holds its events there; check the path of the run")
    return EventReader(path).poll()
