"""What a task needs to run, what there is, and the accounts of what is free."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from shardwise.errors import UserError
from shardwise.run.available import available_memory
from shardwise.run.cores import usable_cores
from shardwise.units import format_bytes, parse_bytes

_CLOSE = 1e-9
"""Fractions of cores and GPUs are added and subtracted; what is this small is rounding."""


@final
@dataclass(frozen=True)
class Need:
    """What one task holds while it runs.

    Attributes:
        cores: CPU cores; a task gets as many compute threads, at least one. 0.1 suits a task that mostly waits.
        gpus: devices that it alone sees; a fraction shares one device with other tasks.
        memory_bytes: of its own data. Given, the task fails with a MemoryError beyond it; None learns it from what tasks
            of the same function used.
        tokens: name -> how many of a named, limited thing (a licence, a database connection).
        expected_bytes: of memory, as long as no task of the function was measured; 0 for not known.
    """

    cores: float = 1.0
    gpus: float = 0.0
    memory_bytes: int | None = None
    tokens: tuple[tuple[str, int], ...] = ()
    expected_bytes: int = 0

    @classmethod
    def make(
        cls,
        *,
        cores: float = 1.0,
        gpus: float = 0.0,
        memory: str | int | None = None,
        tokens: Mapping[str, int] | None = None,
        expected_memory: str | int | None = None,
    ) -> Need:
        """From what users write: `memory="2GiB"`, `tokens={"licences": 2}`.

        Raises:
            UserError: a number below 0, or no cores at all.
        """
        if not 0 < cores < math.inf or not 0 <= gpus < math.inf:
            raise UserError(f"cores={cores}, gpus={gpus}: a task needs more than 0 cores, and 0 or more GPUs")
        if gpus > 1 and gpus != int(gpus):
            raise UserError(f"gpus={gpus}: a task gets whole GPUs, or a fraction of one (0.5)")
        size = parse_bytes(memory) if isinstance(memory, str) else memory
        if size is not None and size <= 0:
            raise UserError(f"memory={memory!r}: give a size above 0, such as '2GiB'")
        expected = parse_bytes(expected_memory) if isinstance(expected_memory, str) else expected_memory or 0
        if expected < 0:
            raise UserError(f"expected_memory={expected_memory!r}: give a size of 0 or more, such as '2GiB'")
        for name, count in (tokens or {}).items():
            if count < 1:
                raise UserError(f"tokens {name}={count}: a task takes at least 1, or leaves the name out")
        return cls(cores, gpus, size, tuple(sorted((tokens or {}).items())), expected)

    @property
    def threads(self) -> int:
        """Compute threads of the task, so that all running tasks together have no more than there are cores."""
        return max(1, int(self.cores + _CLOSE))


@final
@dataclass(frozen=True)
class Capacity:
    """What there is for all tasks together.

    Attributes:
        cores: CPU cores.
        gpus: names of the devices, as the variable for visible devices lists them.
        memory_bytes: for the data of all running tasks.
        tokens: name -> how many there are.
    """

    cores: float
    gpus: tuple[str, ...] = ()
    memory_bytes: int = 1 << 62
    tokens: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_this_machine(
        cls,
        *,
        workers: int | None = None,
        gpus: int | None = None,
        memory: str | int | None = None,
        tokens: Mapping[str, int] | None = None,
    ) -> Capacity:
        """Everything this process may use, where the arguments say nothing else.

        Args:
            workers: take this for the number of cores.
            gpus: the first so many devices; 0 for none.
            memory: a size such as "16GiB"; None takes what is available now.
            tokens: the named things that tasks take.

        Raises:
            UserError: fewer than one worker, or more GPUs than the machine has.
        """
        if workers is not None and workers < 1:
            raise UserError(f"workers={workers}: at least 1 is needed")
        found = visible_gpus()
        if gpus is not None and gpus > len(found):
            raise UserError(f"gpus={gpus}: this machine shows {len(found)}; give at most that many")
        size = parse_bytes(memory) if isinstance(memory, str) else memory
        return cls(
            cores=float(workers if workers is not None else usable_cores()),
            gpus=found if gpus is None else found[:gpus],
            memory_bytes=size if size is not None else available_memory(),
            tokens=dict(tokens or {}),
        )

    def check(self, need: Need) -> None:
        """Refuse a task that could never start.

        Raises:
            UserError: names what it asks for and what there is.
        """
        if need.cores > self.cores + _CLOSE:
            raise UserError(f"a task asks for {need.cores:g} cores, and there are {self.cores:g}: ask for fewer")
        if need.gpus > len(self.gpus):
            raise UserError(f"a task asks for {need.gpus:g} GPUs, and there are {len(self.gpus)}: ask for fewer")
        if need.memory_bytes is not None and need.memory_bytes > self.memory_bytes:
            raise UserError(
                f"a task asks for {format_bytes(need.memory_bytes)} of memory, and there are "
                f"{format_bytes(self.memory_bytes)}: ask for less"
            )
        for name, count in need.tokens:
            if count > self.tokens.get(name, 0):
                raise UserError(
                    f"a task asks for {count} of {name!r}, and there are {self.tokens.get(name, 0)}: "
                    f"say how many there are with Pool(tokens={{{name!r}: N}})"
                )


@final
@dataclass(frozen=True)
class Allocation:
    """What one task was given.

    Attributes:
        devices: names of its GPUs.
        share: of each of them.
        memory_bytes: set aside, declared or learned.
    """

    need: Need
    devices: tuple[str, ...]
    share: float
    memory_bytes: int


@final
class Free:
    """The accounts: what no task holds at the moment."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.cores = capacity.cores
        self.memory_bytes = capacity.memory_bytes
        self.tokens = dict(capacity.tokens)
        self.gpus = dict.fromkeys(capacity.gpus, 1.0)
        self.held = 0

    def copy(self) -> Free:
        other = Free(self.capacity)
        other.cores, other.memory_bytes, other.held = self.cores, self.memory_bytes, self.held
        other.tokens, other.gpus = dict(self.tokens), dict(self.gpus)
        return other

    def lacking(self, need: Need, memory_bytes: int) -> frozenset[str]:
        """What there is too little of for this task now; empty when it can start."""
        lacks = set()
        if need.cores > self.cores + _CLOSE:
            lacks.add("cores")
        if need.gpus and self._devices(need) is None:
            lacks.add("GPUs")
        # A task whose learned memory is more than there is runs when nothing else does.
        if memory_bytes > self.memory_bytes and self.held:
            lacks.add("memory")
        lacks.update(name for name, count in need.tokens if count > self.tokens.get(name, 0))
        return frozenset(lacks)

    def take(self, need: Need, memory_bytes: int) -> Allocation:
        """Give a task what it needs; `lacking` must have been empty."""
        devices = self._devices(need) if need.gpus else ()
        assert devices is not None
        share = min(1.0, need.gpus)
        for device in devices:
            self.gpus[device] -= share
        self.cores -= need.cores
        self.memory_bytes -= memory_bytes
        for name, count in need.tokens:
            self.tokens[name] -= count
        self.held += 1
        return Allocation(need, devices, share, memory_bytes)

    def give_back(self, allocation: Allocation) -> None:
        """Undo `take`."""
        for device in allocation.devices:
            self.gpus[device] = min(1.0, self.gpus[device] + allocation.share)
        self.cores = min(self.capacity.cores, self.cores + allocation.need.cores)
        self.memory_bytes += allocation.memory_bytes
        for name, count in allocation.need.tokens:
            self.tokens[name] += count
        self.held -= 1

    def _devices(self, need: Need) -> tuple[str, ...] | None:
        if need.gpus >= 1:
            whole = [device for device, left in self.gpus.items() if left >= 1 - _CLOSE]
            return tuple(whole[: int(need.gpus)]) if len(whole) >= need.gpus else None
        # The fullest device that still has room: fractions must not break into devices that whole tasks wait for.
        fitting = [(left, device) for device, left in self.gpus.items() if left + _CLOSE >= need.gpus]
        return (min(fitting)[1],) if fitting else None


def shared_resources(need: Need, lacks: Iterable[str]) -> bool:
    """Whether a task with this need uses anything of what another one lacks."""
    uses = {"cores", *(name for name, _ in need.tokens)}
    if need.gpus:
        uses.add("GPUs")
    if need.memory_bytes:
        uses.add("memory")
    return not uses.isdisjoint(lacks)


_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs this process may use, without starting any of their libraries."""
    for variable in _DEVICE_VARIABLES:
        if variable in os.environ:
            return tuple(name.strip() for name in os.environ[variable].split(",") if name.strip() not in ("", "-1"))
    found = sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    return tuple(str(number) for number in range(len(found)))


def device_environment(devices: tuple[str, ...]) -> dict[str, str]:
    """The variables under which a process sees these GPUs and no others."""
    return dict.fromkeys(_DEVICE_VARIABLES[:2], ",".join(devices))
