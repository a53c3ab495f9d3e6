"""Whether others use this machine while something is measured, and measuring again where they did."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shardwise.run.choose import usable_cores
from shardwise.spec.measured import Measured

T = TypeVar("T")

BUSY_LOAD = 0.5
"""Processes that want a core, over the cores, from which on others' work is in the figures."""

OTHERS_SHARE = 0.1
"""Part of the cores that other programs may take while something is measured. The system itself takes 0.01 to 0.03 here, and the
clock of /proc/stat, of hundredths of a second, is off by as much in a quarter of a second (2026-11-26)."""

MOST_ATTEMPTS = 3
"""How often a part of a probe that others disturbed is measured at most."""

PATIENCE_SECONDS = 2.0
"""How long others are given to end before a disturbed part is measured again."""


def was_busy(measured: Measured) -> bool:
    """Whether other programs used the cores while the figures were taken."""
    return measured.load > BUSY_LOAD * measured.cores or measured.others_cores > OTHERS_SHARE * measured.cores


def others_words(measured: Measured) -> str:
    """What tells that it was busy."""
    if measured.others_cores > OTHERS_SHARE * measured.cores:
        return f"they kept {measured.others_cores:.1f} of {measured.cores} cores busy"
    return f"{measured.load:g} processes wanted one of {measured.cores} cores"


def others_running(samples: int = 8) -> float:
    """Processes of others that want a core right now, on average over a tenth of a second; 0 where the system does not say."""
    found = []
    for number in range(samples):
        if number:
            time.sleep(0.1 / samples)
        try:
            running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0]
        except (OSError, IndexError):
            return 0.0
        found.append(max(0, int(running) - 1))  # this process is one of them
    return sum(found) / len(found)


def cores_busy_seconds() -> float | None:
    """Seconds that the usable cores were not idle since the system started, together; with what other virtual machines took of
    them. None where the system does not say.

    /proc/stat of Linux, in hundredths of a second: a difference over less than half a second is rough.
    """
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        fields = [[int(value) for value in words[1:9]] for words in lines if words and words[0] in usable]
        # user, nice, system, idle, iowait, irq, softirq, steal
        return sum(sum(found[:3]) + sum(found[5:]) for found in fields) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def others_cores(busy_before: float | None, own_seconds: float, wall_seconds: float) -> float:
    """Cores of this machine that others kept busy since `cores_busy_seconds` was `busy_before`; 0 where the system does not say.

    Args:
        busy_before: what it was.
        own_seconds: processor time that our own processes took since then.
        wall_seconds: time since then.
    """
    busy = cores_busy_seconds()
    if busy is None or busy_before is None:
        return 0.0
    return max(0.0, busy - busy_before - own_seconds) / wall_seconds


def is_busy() -> bool:
    """Whether others use so much of this machine that whatever is measured would measure them."""
    return others_running() > BUSY_LOAD * usable_cores()


def undisturbed(
    measure: Callable[[], T],
    tell: Callable[[str], None] = lambda text: None,
    *,
    attempts: int = MOST_ATTEMPTS,
    may_go_on: Callable[[], bool] = lambda: True,
) -> tuple[list[T], float]:
    """What `measure` gave, again and again until others left the cores alone meanwhile; and the cores that they kept busy then.

    Args:
        measure: starts processes and waits for their ends.
        tell: receives a sentence where it is called again.
        attempts: calls at most.
        may_go_on: whether there is time for another one.

    Returns:
        All results, the least disturbed first; and the cores that others kept busy during that one.
    """
    found: list[tuple[float, T]] = []
    while True:
        busy, own, began = cores_busy_seconds(), _own_seconds(), time.perf_counter()
        result = measure()
        others = others_cores(busy, _own_seconds() - own, time.perf_counter() - began)
        found.append((others, result))
        if others <= OTHERS_SHARE * usable_cores() or len(found) >= attempts or not may_go_on():
            break
        tell(f"others kept {others:.1f} cores busy meanwhile: measuring again")
        ends = time.monotonic() + PATIENCE_SECONDS
        while is_busy() and time.monotonic() < ends:
            time.sleep(0.1)
    found.sort(key=lambda one: one[0])
    return [result for _, result in found], found[0][0]


def _own_seconds() -> float:
    """Processor time of this process and of those that it started and waited for."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
