"""Where the time of a step goes: wall-clock seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple, final

import torch

from shardwise.dist.meter import Meter
from shardwise.run.record import Recorder, waiting_for_core_seconds
from shardwise.spec.observations import PHASES

_NEXT = {
    "data": "forward",
    "forward": "backward",
    "backward": "synchronisation",
    "synchronisation": "optimizer",
    "optimizer": "other",
    "other": "forward",
}
"""What a step does after each phase, to say what is under way. (`data` is named by `begin_step`.)"""

BETWEEN_STEPS = "between steps"
"""What is under way where the loop is the user's own: it takes as long as it takes."""


@final
class Used(NamedTuple):
    """What this rank used so far: bytes sent, processor seconds, and seconds in which it was ready and had no core."""

    sent_bytes: float
    cpu_seconds: float
    core_wait_seconds: float


@final
class PhaseClock:
    """Adds the time since the last mark to a phase, and what of it was spent waiting for others to `synchronisation`.

    Accelerators run behind the host, so there a mark means little unless the device is waited for. Waiting costs speed;
    on an accelerator only every `sample_every`-th step is timed, with waits, and shares are taken over those steps.

    Attributes:
        current: what is under way, a phase or another activity. Other threads may look.
        timed_steps: steps that were taken so far and timed.
    """

    def __init__(
        self,
        device: torch.device,
        meter: Meter | None = None,
        *,
        sample_every: int = 25,
        recorder: Recorder | None = None,
    ) -> None:
        self._waits = device.type != "cpu"
        self._sample_every = sample_every if self._waits else 1
        self._device = device
        self._recorder = recorder
        self._meter = meter or Meter()
        self._blocked = self._meter.blocked_seconds
        self.current = "start"
        self.timed_steps = 0
        self._steps = 0
        self._last = perf_counter()
        self._timing = True
        self._away = Used(0.0, 0.0, 0.0)
        self._taken = dict.fromkeys(PHASES, 0.0)
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def begin_step(self, step: int = 0) -> None:
        """Start of a step, or of several on one batch; decides whether they are timed.

        Args:
            step: its global number, for the record of a measured run.
        """
        self._timing = self._steps % self._sample_every == 0
        self._steps += 1
        self.current = "data"
        self._meter.begin_step(keep=False)
        if self._waits and self._timing:
            torch.accelerator.synchronize(self._device)
            self.restart()
        if self._recorder is not None:
            self._recorder.begin_step(perf_counter(), step)
            self.restart()  # the parts of a recorded step are exactly the step

    def stepped(self) -> None:
        """A step was taken."""
        self.timed_steps += self._timing

    def end_step(self) -> None:
        """The step is over; `begin_step` without it was the end of an epoch and no step."""
        if self._recorder is not None:
            self._recorder.end_step(perf_counter())

    def restart(self) -> None:
        """Forget the time since the last mark."""
        self._last = perf_counter()
        self._blocked = self._meter.blocked_seconds

    @contextmanager
    def away(self, what: str) -> Iterator[None]:
        """Around what is no part of any step: an evaluation, a checkpoint. Nothing that it takes counts for a step."""
        self.current = what
        began, before = perf_counter(), self._used()
        yield
        used = Used(*(new - old for new, old in zip(self._used(), before, strict=True)))
        self._away = Used(*(old + new for old, new in zip(self._away, used, strict=True)))
        if self._recorder is not None:
            self._recorder.away(perf_counter() - began, used.cpu_seconds, used.core_wait_seconds)
        self.restart()

    def used(self) -> Used:
        """What the steps used so far, and what is between them."""
        return Used(*(all_ - away for all_, away in zip(self._used(), self._away, strict=True)))

    def _used(self) -> Used:
        return Used(self._meter.traffic_bytes, time.process_time(), waiting_for_core_seconds())

    def mark(self, phase: str) -> None:
        """Add the time since the last mark to `phase`, one of `PHASES`."""
        self.current = _NEXT[phase]
        if not self._timing:
            return
        if self._waits:
            torch.accelerator.synchronize(self._device)
        now = perf_counter()
        blocked = self._meter.blocked_seconds
        waited = blocked - self._blocked
        self.seconds[phase] += now - self._last - waited
        self.seconds["synchronisation"] += waited
        if self._recorder is not None:
            self._recorder.phase(phase, self._last, now)
        self._last, self._blocked = now, blocked

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call of `take`; phases without any are left out."""
        since = {phase: seconds - self._taken[phase] for phase, seconds in self.seconds.items()}
        self._taken = dict(self.seconds)
        return {phase: seconds for phase, seconds in since.items() if seconds > 0}

    def shares(self) -> dict[str, float]:
        """Each phase's share of all timed seconds; zeros when nothing was timed."""
        total = sum(self.seconds.values())
        return {phase: seconds / total if total else 0.0 for phase, seconds in self.seconds.items()}
