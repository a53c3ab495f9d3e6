"""How much memory this machine has left, as its system says."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int:
    """Bytes that new data can take without anything being swapped or killed: Linux's own estimate, within the cgroup."""
    free = memory_figures().get("MemAvailable", 1 << 62)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def memory_figures() -> dict[str, int]:
    """Name -> bytes of /proc/meminfo; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
