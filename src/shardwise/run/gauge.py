"""Gauge: what one rank did since the last settlement, and the message in which all ranks tell each other."""

from __future__ import annotations

import math
import resource
from contextlib import suppress
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from shardwise.dist.collectives import Group
from shardwise.run.clock import PhaseClock
from shardwise.spec.observations import PHASES, RanksEvent

_PAGE_BYTES = resource.getpagesize()
_AFTER_PHASES = ("late", "samples", "sent", "memory", "peak", "cpu", "core_wait", "timed")


@final
class Gauge:
    """Reads this rank's clocks and counters, each time since the time before.

    Reading costs two small files of /proc (about 30 us on Linux) a settlement, which is about twice a second.
    """

    def __init__(self, clock: PhaseClock, device: torch.device) -> None:
        self._clock, self._device = clock, device
        self.samples = 0
        self._before = self._counters()

    def exchange(
        self,
        group: Group,
        phase_seconds: dict[str, float],
        *,
        first_step: int,
        seconds: list[float],
        late_seconds: float,
    ) -> RanksEvent:
        """What all ranks did. Collective.

        Args:
            group: all ranks.
            phase_seconds: of this rank since the last time, as `PhaseClock.take` gives them.
            first_step: global number of the first step since the last time.
            seconds: of each step since then, on this rank.
            late_seconds: how much later than the mean of the ranks this one came to the first collective, a step.
        """
        now = self._counters()
        sent, cpu, core_wait, timed = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        core_wait = 0.0 if math.isnan(core_wait) else core_wait
        memory, peak = memory_bytes(self._device), peak_memory_bytes(self._device)
        row = [phase_seconds.get(phase, 0.0) for phase in PHASES]
        row += [late_seconds, self.samples, sent, memory, peak, cpu, core_wait, timed]
        self.samples = 0
        # The accelerator may not know float64; these numbers live on the host anyway, but gloo may not be there.
        own = torch.tensor(row, dtype=torch.float64, device=self._device)
        table: Tensor = group.gather(own, "what each rank did").T.cpu()
        columns = dict(zip((*PHASES, *_AFTER_PHASES), table.tolist(), strict=True))
        earliest = min(columns["late"])
        return RanksEvent(
            first_step=first_step,
            steps=len(seconds),
            seconds=sum(seconds),
            timed_steps=round(max(columns["timed"])),
            phase_seconds={phase: columns[phase] for phase in PHASES},
            late_seconds=[late - earliest for late in columns["late"]],
            samples=_whole(columns["samples"]),
            sent_bytes=_whole(columns["sent"]),
            memory_bytes=_whole(columns["memory"]),
            peak_memory_bytes=_whole(columns["peak"]),
            cpu_seconds=columns["cpu"],
            core_wait_seconds=columns["core_wait"],
        )

    def _counters(self) -> tuple[float, float, float, float]:
        return (*self._clock.used(), float(self._clock.timed_steps))


def _whole(values: list[float]) -> list[int]:
    return [round(value) for value in values]


def memory_bytes(device: torch.device) -> int:
    """Bytes in use: allocated on the accelerator, or resident in this process on CPU."""
    if device.type != "cpu":
        return int(torch.accelerator.memory_allocated(device))
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    return peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes: allocated on the accelerator, or resident in this process on CPU.

    `getrusage` is for systems without /proc: on Linux a program begins with the peak of the one that started it.
    """
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/status").read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
