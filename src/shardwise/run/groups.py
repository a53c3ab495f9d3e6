"""The control groups (containers) that this process is in, of version 1 and 2 of Linux; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def control_groups(controller: str, proc: Path = PROC, groups: Path = GROUPS) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's group and of each around it that may limit something, from the inside; and whether they are
    of version 2.

    A container may see its own group at the root, under whatever path the host has it, so a folder need not exist.

    Args:
        controller: what is limited, as version 1 calls it: `cpu`, `memory`.
        proc: where proc is mounted.
        groups: where control groups are mounted.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines):
        second = number == "0"
        if not second and controller not in controllers.split(","):
            continue
        # Several controllers may be mounted as one, with or without a link for each.
        roots = [groups] if second else [groups / controller, groups / controllers]
        root = next((folder for folder in roots if folder.is_dir()), roots[0])
        place = root / path.lstrip("/")
        for group in (place, *place.parents):
            yield group, second
            if group == root:
                break
