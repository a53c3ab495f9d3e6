"""How many cores there are for this process; needs no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

from shardwise.run.groups import GROUPS, PROC, control_groups


def usable_cores() -> int:
    """Cores this process may use: its affinity, further limited by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    quota = quota_cores()
    return max(1, min(cores, math.ceil(quota)) if quota is not None else cores)


def quota_cores(proc: Path = PROC, groups: Path = GROUPS) -> float | None:
    """Processor seconds a second that the control groups around this process leave it; None where they leave all.

    Args:
        proc: where proc is mounted.
        groups: where control groups are mounted.
    """
    found = [_quota(group, second) for group, second in control_groups("cpu", proc, groups)]
    return min((quota for quota in found if quota is not None), default=None)


def _quota(group: Path, second: bool) -> float | None:
    """None where the group has no limit (`max`, or -1 in version 1), or is none."""
    try:
        if second:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / name).read_text(encoding="ascii") for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        return None if quota == "max" or float(quota) <= 0 else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
