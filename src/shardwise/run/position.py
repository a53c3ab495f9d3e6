"""Where a rank is, found out from a thread beside the training, without stopping it, and from /proc about the others."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
from torch import nn

from shardwise.run.assemble import Assembly

MOST_FRAMES = 40

_STATES = {"R": "running", "S": "sleeping", "D": "disk", "T": "stopped", "t": "stopped", "Z": "zombie", "X": "gone"}
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent.parent)
_DISTRIBUTED = f"{os.sep}torch{os.sep}distributed{os.sep}"
_WRAPPERS = ("wrapper", "wrapped", "inner", "_fn")
_STANDARD = str(Path(os.__file__).parent)


@final
@dataclass(frozen=True)
class Peer:
    """A rank's process, as all ranks know it.

    Attributes:
        clock: equal for processes whose readings of `time.perf_counter` can be compared.
        machine: equal for processes that see each other in /proc.
    """

    rank: int
    pid: int
    host: str
    clock: str
    machine: str


def this_peer(rank: int) -> Peer:
    """This process."""
    clock = _clock()
    return Peer(rank, os.getpid(), socket.gethostname(), clock, clock + _namespace())


def _clock() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return socket.gethostname()


def _namespace() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    return ""


def own_position(assembly: Assembly, thread: int, rank: int) -> dict[str, Any]:
    """Where the training thread of this process is; see `shardwise.monitor.stall` for the fields."""
    frames = _frames(sys._current_frames().get(thread))
    call = assembly.mesh.meter.inside
    inside = str(call) if call is not None else ""
    if not inside:
        inside = _foreign_collective(frames)
    last = assembly.mesh.meter.last
    return {
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "answered": True,
        "step": assembly.step,
        "activity": assembly.clock.current,
        "inside": inside,
        "last": str(last) if last is not None else "",
        "calls": assembly.mesh.meter.calls,
        "module": _module(assembly.model, frames),
        "line": next((_line(frame) for frame in frames if _is_users(frame)), ""),
        "stack": [_line(frame) for frame in frames[:MOST_FRAMES]],
    }


def process_facts(pid: int, *, seconds: float = 0.2) -> dict[str, Any]:
    """State, swap and page faults of a process of this machine, from /proc; `gone` where there is none."""
    state, before = _stat(pid)
    if state is None:
        return {"process": "gone"} if Path("/proc/self/stat").exists() else {"process": ""}
    time.sleep(seconds)
    after = _stat(pid)[1]
    return {
        "process": _STATES.get(state, state),
        "swap_bytes": _swap(pid),
        "faults_per_second": (after - before) / seconds if after >= before else 0.0,
    }


def _stat(pid: int) -> tuple[str | None, int]:
    """State letter and major page faults (fields 3 and 12 of proc(5) stat)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return words[0], int(words[9])
    except (OSError, ValueError, IndexError):
        return None, 0


def _swap(pid: int) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmSwap:"):
                return int(line.split()[1]) * 1024
    return 0


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _line(frame: FrameType) -> str:
    code = frame.f_code
    path = code.co_filename
    for root, short in ((_TORCH, "torch"), (_OURS, "shardwise")):
        if path.startswith(root):
            path = short + path[len(root) :]
    return f"{path}:{frame.f_lineno} in {code.co_name}"


def _is_users(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return not path.startswith((_TORCH, _OURS, _STANDARD, "<")) and os.sep in path


def _foreign_collective(frames: list[FrameType]) -> str:
    """A collective that the user's code, or torch itself, calls past our groups."""
    for frame in frames[:12]:
        name = frame.f_code.co_name
        if _DISTRIBUTED in frame.f_code.co_filename and name not in _WRAPPERS:
            return f"torch.distributed's {name}"
    return ""


def _module(model: nn.Module, frames: list[FrameType]) -> str:
    """The innermost module of the model whose forward pass is under way."""
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    for frame in frames:
        if frame.f_code.co_name == "forward":
            found = names.get(id(frame.f_locals.get("self")))
            if found:
                return found
    return ""
