"""Events that tell how a run behaves: what each rank's time went to, who holds the others up, who hangs, and where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from shardwise.spec.event import LOSS, SECONDS, Event

PHASES = ("data", "forward", "backward", "synchronisation", "optimizer", "other")
"""Parts of a step, in their order. `synchronisation` is the time blocked in collectives, wherever in the step it was."""


@dataclass(frozen=True, kw_only=True)
class RanksEvent(Event):
    """What every rank did in some consecutive steps. Each list has one number a rank, in rank order.

    Attributes:
        first_step: global number of the first of the steps.
        steps: how many.
        seconds: wall seconds of these steps, on rank 0.
        timed_steps: of them, those whose phases were timed: all on CPU, a sample on accelerators.
        phase_seconds: phase -> seconds over the timed steps; without what was blocked in collectives, which all counts
            as `synchronisation`.
        late_seconds: mean over the steps of how long after the earliest rank each came to its first collective.
        samples: samples that the rank computed on, over the steps.
        sent_bytes: bytes that the rank sent, over the steps, by the bandwidth-optimal algorithm for each collective.
        memory_bytes: in use now: resident on CPU, allocated on an accelerator.
        peak_memory_bytes: most that was in use so far.
        cpu_seconds: processor time of the rank's process, over the steps.
        core_wait_seconds: how long its main thread was ready to run and had no core, over the steps; 0 where the system
            does not tell.
    """

    kind: ClassVar[str] = "ranks"
    first_step: int
    steps: int
    seconds: float = field(metadata=SECONDS)
    timed_steps: int
    phase_seconds: dict[str, list[float]] = field(metadata=SECONDS)
    late_seconds: list[float] = field(metadata=SECONDS)
    samples: list[int]
    sent_bytes: list[int]
    memory_bytes: list[int]
    peak_memory_bytes: list[int]
    cpu_seconds: list[float] = field(metadata=SECONDS)
    core_wait_seconds: list[float] = field(metadata=SECONDS)


@dataclass(frozen=True, kw_only=True)
class ExpertsEvent(Event):
    """How tokens were given to experts since the last such event.

    Attributes:
        step: global steps done.
        tokens: name of each module with experts -> tokens of each expert, over all ranks.
        dropped: name of each module with experts -> tokens that found no room.
    """

    kind: ClassVar[str] = "experts"
    step: int
    tokens: dict[str, list[int]]
    dropped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class StragglerEvent(Event):
    """One rank holds the others up, step after step.

    Attributes:
        step: global steps done.
        rank: the slow one.
        phase: where it loses most.
        cause: `computing` (the processor was busy), `core` (it waited for a core), `waiting` (it slept, or waited for
            input and output), or `unknown`.
        lost_seconds: what the others lose to it in every step.
        step_seconds: mean wall seconds of a step.
        shares: parts of the global batch, one a rank, with which all ranks would take equally long; empty where speed
            does not depend on the number of samples.
        message: all of it in one sentence.
    """

    kind: ClassVar[str] = "straggler"
    step: int
    rank: int
    phase: str
    cause: str
    lost_seconds: float = field(metadata=SECONDS)
    step_seconds: float = field(metadata=SECONDS)
    shares: list[float] = field(default_factory=list, metadata=SECONDS)
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class BottleneckEvent(Event):
    """All ranks lose time to the same thing.

    Attributes:
        step: global steps done.
        what: `data` (batches come too slowly) or `cores` (more is to be computed than there are cores for).
        share: part of the step time that is lost, over all ranks.
        message: what it is and what helps, in one sentence.
    """

    kind: ClassVar[str] = "bottleneck"
    step: int
    what: str
    share: float = field(metadata=SECONDS)
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class StallEvent(Event):
    """A step takes far longer than those before it. The run goes on: nothing was stopped to find this out.

    Attributes:
        step: the step under way, as a number of steps done before it.
        waited_seconds: how long it has been under way.
        bound_seconds: what was exceeded.
        what: the likely class: `dead`, `stopped`, `swap`, `uneven`, `diverged`, `data`, `slow`, `alone`, `unknown`.
        missing: ranks that the others wait for.
        message: who waits where, who is missing, and what it most likely is, in a few sentences.
        positions: every rank's position; see `docs/watch.md`.
    """

    kind: ClassVar[str] = "stall"
    step: int
    waited_seconds: float = field(metadata=SECONDS)
    bound_seconds: float = field(metadata=SECONDS)
    what: str
    missing: list[int]
    message: str
    positions: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RecoveryEvent(Event):
    """A stalled step ended after all.

    Attributes:
        step: global steps done.
        waited_seconds: how long the step took.
    """

    kind: ClassVar[str] = "recovery"
    step: int
    waited_seconds: float = field(metadata=SECONDS)


@dataclass(frozen=True, kw_only=True)
class BalanceEvent(Event):
    """The global batch is divided anew from the next step on.

    Attributes:
        step: global steps done.
        shares: parts of the global batch, one for each rank that takes samples, in rank order.
        samples: what that is of a full global batch.
    """

    kind: ClassVar[str] = "balance"
    step: int
    shares: list[float] = field(metadata=LOSS)
    samples: list[int]


@dataclass(frozen=True, kw_only=True)
class TraceEvent(Event):
    """A trace of some steps was written.

    Attributes:
        first_step: global number of the first step in it.
        steps: how many.
        path: relative to the run folder.
    """

    kind: ClassVar[str] = "trace"
    first_step: int
    steps: int
    path: str


@dataclass(frozen=True, kw_only=True)
class SweepEvent(Event):
    """How far a sweep is, and what has just happened to one of its trials. In the sweep's own folder.

    Attributes:
        metric: what trials are compared by.
        goal: `max` or `min`.
        trials: combinations of the whole sweep, as far as is known.
        ended: of them, those that were trained to the end or failed.
        failed: of them, those that failed.
        running: trainings that run.
        best: number of the best trial so far, None before the first result.
        best_value: its metric.
        best_setting: its hyper-parameters, as texts.
        left_seconds: until the last trial has ended, at the speed so far; None where not known.
        number: of the trial that something happened to; None where nothing did since the last event.
        setting: its hyper-parameters.
        value: its metric, the mean over folds and seeds.
        trained: epochs (or steps) it was trained.
        state: `done`, `paused` or `failed`.
        failure: why it failed, one line.
    """

    kind: ClassVar[str] = "sweep"
    metric: str
    goal: str
    trials: int
    ended: int
    failed: int
    running: int
    best: int | None = None
    best_value: float | None = None
    best_setting: dict[str, str] = field(default_factory=dict)
    left_seconds: float | None = None
    number: int | None = None
    setting: dict[str, str] = field(default_factory=dict)
    value: float | None = None
    trained: int = 0
    state: str = ""
    failure: str = ""
