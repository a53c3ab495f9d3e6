"""What this machine is, as far as it can be read and not measured; where figures of machines are kept."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch

from shardwise.errors import UserError
from shardwise.run.available import memory_limit
from shardwise.run.choose import accelerators, usable_cores
from shardwise.spec.machine import Machine
from shardwise.spec.measured import METHOD, Measured

FRESH_DAYS = 90
"""Older figures are still used, with a word about their age: kernels and drivers change more often than machines."""

BUSY_LOAD = 0.5
"""Processes that want a core, over the cores, from which on others' work is in the figures."""


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
        found.append(
            f"other programs were running ({measured.load:g} processes wanted one of {measured.cores} cores): measure again "
            "when it is quiet"
        )
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


def was_busy(measured: Measured) -> bool:
    """Whether other programs used the cores while the figures were taken."""
    return measured.load > BUSY_LOAD * measured.cores


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


def is_busy() -> bool:
    """Whether others use so much of this machine that whatever is measured would measure them."""
    return others_running() > BUSY_LOAD * usable_cores()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
