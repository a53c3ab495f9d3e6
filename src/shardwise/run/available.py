"""How much memory this machine has left, as its system says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")

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


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Of this process's group and of each around it; pages of files are given up where memory is short, and count as left."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root, names = (groups, _V2) if number == "0" else (groups / "memory", _V1)
        # A container may see its own group at the root, under whatever path the host has it.
        place = root / path.lstrip("/")
        for group in (place, *place.parents):
            left = _left(group, *names)
            if left is not None:
                yield left
            if group == root:
                break


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
