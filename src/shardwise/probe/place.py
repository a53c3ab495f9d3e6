"""What this machine is, as far as it can be read and not measured; where figures of machines are kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch

from shardwise.errors import UserError
from shardwise.probe.busy import others_words, was_busy
from shardwise.run.available import memory_limit
from shardwise.run.choose import accelerators, usable_cores
from shardwise.spec.machine import Machine
from shardwise.spec.measured import METHOD, Measured

FRESH_DAYS = 90
"""Older figures are still used, with a word about their age: kernels and drivers change more often than machines."""
WAIT_SECONDS = 60.0
"""How long to wait for another command that measures this machine."""


def this_place() -> dict[str, str]:
    """What figures depend on: processor, cores, memory, system, torch, accelerators."""
    device = torch.accelerator.current_accelerator() if accelerators() else None
    name = "none"
    if device is not None:
        name = f"{accelerators()} x {device_name(device.type)}"
    return {
        "processor": _processor(),
        "cores": str(usable_cores()),
        "memory": f"{round(memory_bytes() / 2**30)} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "accelerators": name,
    }


def device_name(kind: str) -> str:
    """What the driver calls the device, such as `NVIDIA H100 80GB HBM3`."""
    module = torch.get_device_module(kind)
    return str(module.get_device_name(0))


def memory_bytes() -> float:
    """Memory of the machine, or of the container's limit where that is less."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = memory_limit()
    return total if limit is None else min(total, float(limit))


def cache_folder() -> Path:
    """Where figures of machines and models are kept between runs: `$XDG_CACHE_HOME/shardwise` or `~/.cache/shardwise`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardwise"


def cached_path(place: Mapping[str, str]) -> Path:
    """The machine file of a place: another machine with the same home folder has another one."""
    text = "/".join(f"{name}={value}" for name, value in sorted(place.items()))
    return cache_folder() / f"machine-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.toml"


def warnings_about(measured: Measured, place: Mapping[str, str], today: date | None = None) -> list[str]:
    """Why figures may not hold here: taken elsewhere, on other software, or long ago. One sentence each."""
    found = measured.differs_from(place)
    if measured.method != METHOD:
        found.append("it was measured in the way of another version of shardwise")
    try:
        age = ((today or date.today()) - date.fromisoformat(measured.date)).days
    except ValueError:
        return [*found, f"its date {measured.date!r} is no date"]
    if age > FRESH_DAYS:
        found.append(f"it was measured {age} days ago")
    if was_busy(measured):
        found.append(f"other programs were running ({others_words(measured)}): measure again when it is quiet")
    if age < 0:
        found.append(f"it was measured on {measured.date}, which is yet to come")
    return found


def cached_machine() -> Machine | None:
    """The figures kept for this machine, None where there are none that hold."""
    place = this_place()
    path = cached_path(place)
    if not path.is_file():
        return None
    try:
        machine = Machine.read(path)
    except UserError:
        return None  # damaged, or of another version: it is ours, and is measured again
    measured = machine.measured
    if measured is None or measured.method != METHOD or measured.differs_from(place):
        return None
    return machine


@contextmanager
def measuring(wait_seconds: float = 0.0) -> Iterator[bool]:
    """Whether no other command of shardwise measures on this machine while the block runs, as this one does: both would measure
    each other.

    Args:
        wait_seconds: how long to wait for the other one.
    """
    path = cache_folder() / "measuring.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="ascii")
    except OSError:  # no place to meet
        yield True
        return
    with file:
        ends = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= ends:
                    yield False
                    return
                time.sleep(0.1)
            else:
                break
        yield True


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
