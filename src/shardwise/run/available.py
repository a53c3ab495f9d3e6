"""How much memory this machine has left, as its system says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shardwise.run.groups import GROUPS, PROC, control_groups

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("memory.max", "memory.current", "")
"""Files of a control group with its limit and use, and what the names in its memory.stat begin with that count groups below it
(cgroup-v1/memory.rst and cgroup-v2.rst of Linux)."""


def available_memory(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Bytes that new data can take without anything being swapped or killed: Linux's own estimate, within the limits of the
    control groups (containers) that this process is in.

    Args:
        proc: where proc is mounted.
        groups: where control groups are mounted.
    """
    free = memory_figures(proc).get("MemAvailable", 1 << 62)
    return max(0, min([free, *_left_in_groups(proc, groups)]))


def memory_figures(proc: Path = PROC) -> dict[str, int]:
    """Name -> bytes of /proc/meminfo; empty where there is none."""
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}


def memory_limit(proc: Path = PROC, groups: Path = GROUPS) -> int | None:
    """Bytes that the control groups around this process leave it at most; None where they set no limit."""
    found = []
    for group, second in control_groups("memory", proc, groups):
        try:
            found.append(int((group / (_V2 if second else _V1)[0]).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or `max`
            continue
    return min(found, default=None)


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Of this process's group and of each around it; pages of files are given up where memory is short, and count as left."""
    for group, second in control_groups("memory", proc, groups):
        left = _left(group, *(_V2 if second else _V1))
        if left is not None:
            yield left


def _left(group: Path, limit_name: str, used_name: str, prefix: str) -> int | None:
    """None where the group has no limit, or is none."""
    try:
        limit = (group / limit_name).read_text(encoding="ascii").strip()
        used = int((group / used_name).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return None if limit == "max" else int(limit) - used + files
    except (OSError, ValueError):
        return None
