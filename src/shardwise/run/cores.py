"""How many cores there are for this process; needs no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores() -> int:
    """Cores this process may use: its affinity, further limited by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_cores(Path("/sys/fs/cgroup/cpu.max"))
    return max(1, min(cores, math.ceil(quota)) if quota is not None else cores)


def _cgroup_cores(path: Path) -> float | None:
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return None if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        return None
