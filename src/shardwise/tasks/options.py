"""Options: what a user says about a task beside what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, final

from shardwise.errors import UserError
from shardwise.tasks.need import Need
from shardwise.tasks.outcome import KINDS, FailureKind
from shardwise.units import parse_seconds


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """What a task needs and how it is treated.

    Attributes:
        cores: CPU cores it holds while it runs, and compute threads it gets (at least one).
        gpus: GPUs that it alone sees; a fraction shares one.
        memory: of its own data, such as "2GiB"; beyond it the task fails with a MemoryError. None sets no limit and learns
            what tasks of the same function use, so that they are not started together where they do not fit.
        expected_memory: what it and the processes it starts are expected to take, such as "2GiB". No limit: it is set aside until
            a task of the function was measured, and stays the least for tasks of several cores, because what their other
            processes take is not measured.
        tokens: name -> how many it takes of a limited thing, such as `{"licences": 2}`.
        priority: tasks with a higher number start first.
        timeout: seconds (or "10m") after which it is ended; None for never.
        retries: how often it is started again after it failed.
        retry_on: the kinds of failure that are worth it, see `TaskFailure.kind`.
        leaks: what becomes of a task that leaves processes running. They are ended in any case; `remark` keeps its result and
            says so in `Outcome.remarks`, `fail` makes it a failure.
        seconds: how long it is expected to take. Only the ratio to other tasks matters: longer ones start first. None
            takes what was measured.
    """

    cores: float = 1.0
    gpus: float = 0.0
    memory: str | int | None = None
    expected_memory: str | int | None = None
    tokens: Mapping[str, int] | None = None
    priority: int = 0
    timeout: float | str | None = None
    retries: int = 0
    retry_on: tuple[FailureKind, ...] = ("error", "timeout", "killed", "memory", "exit", "leak", "lost")
    leaks: Literal["remark", "fail"] = "remark"
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise UserError(f"retries={self.retries}: give 0 or more")
        if self.leaks not in ("remark", "fail"):
            raise UserError(f"leaks={self.leaks!r}: give 'remark' or 'fail'")
        unknown = [kind for kind in self.retry_on if kind not in KINDS]
        if unknown:
            raise UserError(f"retry_on={unknown[0]!r}: kinds of failure are {', '.join(KINDS)}")
        limit = self.timeout_seconds
        if limit is not None and not limit > 0:
            raise UserError(f"timeout={self.timeout!r}: give a time above 0, or None")
        _ = self.need

    @cached_property
    def need(self) -> Need:
        return Need.make(
            cores=self.cores,
            gpus=self.gpus,
            memory=self.memory,
            tokens=self.tokens,
            expected_memory=self.expected_memory,
        )

    @cached_property
    def timeout_seconds(self) -> float | None:
        return parse_seconds(self.timeout) if isinstance(self.timeout, str) else self.timeout


def make_options(options: Options | None, given: Mapping[str, Any]) -> Options:
    """The options with some of them overruled.

    Raises:
        UserError: there is no such option.
    """
    known = [item.name for item in fields(Options)]
    for name in given:
        if name not in known:
            raise UserError(f"a task has no option {name!r}: options are {', '.join(known)}")
    return replace(options or Options(), **given)
