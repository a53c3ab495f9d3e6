"""Sentinel: a thread beside each rank's training that notices when a step takes far too long, and finds out why.

Nothing is stopped for it. Every rank leaves its position in a file of the run folder, which works on one machine as on
several, with any launcher, and needs no rank to be well: who cannot answer is looked up in /proc by the others. The lowest
rank that is well tells: an event, and a line to people. It costs one waking of a thread every half second.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch.distributed as c10d

from shardwise.monitor.stall import diagnose, where
from shardwise.run.assemble import Assembly
from shardwise.run.clock import BETWEEN_STEPS
from shardwise.run.eventlog import EventLog
from shardwise.run.failure import STALLED_EXIT
from shardwise.run.folder import RunFolder
from shardwise.run.position import Peer, own_position, process_facts
from shardwise.spec.event import Event
from shardwise.spec.observations import PHASES, RecoveryEvent, StallEvent

TICK_SECONDS = 0.5
FLOOR_SECONDS = 5.0
"""No step is called stalled before, unless the user asks for less: an oversubscribed machine holds a process up for as long."""

TIMES_SLOWEST = 20.0
"""A step may take so many times as long as the slowest of the last ones."""

STOP_SECONDS = 5.0
"""A stalled step has so long to end after all when the user asks to stop."""

_HISTORY = 100
_GRACE_SECONDS = 1.5  # for all ranks to leave their positions
_GAP_SECONDS = 3.0  # a thread that did not run for so long was itself stopped, and accuses nobody


@final
class Sentinel:
    """Use it as a context manager around the training.

    Args:
        assembly: what this rank trains; only looked at.
        folder: the run folder.
        rank: of this process.
        peers: all ranks' processes.
        stall_seconds: the largest bound; 0 looks at nothing.
        say: shows a line to people.
        stop_requested: whether this process was asked to stop: a stalled step never comes to where that is looked at.
    """

    def __init__(
        self,
        assembly: Assembly,
        folder: RunFolder,
        rank: int,
        peers: Sequence[Peer],
        *,
        stall_seconds: float,
        say: Callable[[str], None],
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._assembly, self._folder, self._rank, self._peers = assembly, folder, rank, list(peers)
        self._stall_seconds, self._say, self._stop_requested = stall_seconds, say, stop_requested
        self._asked_at = 0.0  # when the request to stop was seen first; 0 while there is none
        self._places = folder.path / "positions"
        self._seconds: deque[float] = deque(maxlen=_HISTORY)
        self._trainer = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="shardwise sentinel", daemon=True)
        self._told_at = 0.0  # how long the stall that was told last had lasted; 0 while there is none

    def __enter__(self) -> Sentinel:
        if self._stall_seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(TICK_SECONDS)

    def bound_seconds(self) -> float:
        """How long the step under way may take before it is looked into."""
        slowest = max(self._seconds, default=0.0)
        if not slowest or self._assembly.clock.current not in PHASES:
            return max(self._stall_seconds, 2 * slowest)
        wanted = max(min(FLOOR_SECONDS, self._stall_seconds), TIMES_SLOWEST * slowest)
        return max(min(wanted, self._stall_seconds), 2 * slowest)

    def _watch(self) -> None:
        seen: tuple[int, bool] = (-1, False)
        since = before = time.monotonic()
        while not self._ended.wait(TICK_SECONDS):
            now = time.monotonic()
            if now - before > _GAP_SECONDS:
                since += now - before  # this process was stopped, not the step
            before = now
            if self._assembly.clock.current == BETWEEN_STEPS:
                since = now
            at = (self._assembly.step, self._assembly.clock.current in PHASES)
            if at != seen:
                if at[0] > seen[0] >= 0 and at[1] and seen[1]:
                    self._seconds.append((now - since) / (at[0] - seen[0]))
                self._recovered(now - since)
                seen, since = at, now
                continue
            waited = now - since
            with suppress(OSError, RuntimeError):  # a full disk, a folder that went away: the training goes on
                self._look(waited)
            self._end_stalled(now)
        if self._assembly.step > seen[0] >= 0:  # the last step ended since the last look, and the run with it
            self._recovered(time.monotonic() - since)

    def _look(self, waited: float) -> None:
        bound = self.bound_seconds()
        if waited > max(bound, 2 * self._told_at):
            self._leave_position(ask=True)
            self._ended.wait(_GRACE_SECONDS)
            self._leave_position(ask=False)
            if self._ended.is_set():
                return
            self._told_at = waited
            found = self._collect()
            if self._is_reporter(found):
                self._tell(found, waited, bound)
        elif self._asked():
            self._leave_position(ask=False)

    def _end_stalled(self, now: float) -> None:
        """End this process where it was asked to stop and its step hangs: it would be ended after the launcher's grace anyway.

        The training thread waits inside a collective, where no exception reaches it.
        """
        if not self._stop_requested():
            return
        self._asked_at = self._asked_at or now
        if self._told_at and now - self._asked_at > STOP_SECONDS:
            os._exit(STALLED_EXIT)

    def _leave_position(self, *, ask: bool) -> None:
        position = own_position(self._assembly, self._trainer, self._rank)
        position["left"] = time.time()
        recorder = _flight_recorder(self._assembly)
        if recorder:
            position["flight_recorder"] = recorder
        self._places.mkdir(exist_ok=True)
        path = self._places / f"rank-{self._rank:05d}.json"
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(position), encoding="utf-8")
        aside.replace(path)
        if ask:
            (self._places / "asked").touch()

    def _asked(self) -> bool:
        """Another rank asked for positions after this one left its last."""
        try:
            asked = (self._places / "asked").stat().st_mtime
        except OSError:
            return False
        try:
            return (self._places / f"rank-{self._rank:05d}.json").stat().st_mtime < asked - TICK_SECONDS
        except OSError:
            return True

    def _collect(self) -> list[dict[str, Any]]:
        """Every rank's position: its own answer, and what the system says of its process."""
        mine = next(peer for peer in self._peers if peer.rank == self._rank)
        found = []
        for peer in self._peers:
            position: dict[str, Any] = {"rank": peer.rank, "pid": peer.pid, "host": peer.host, "answered": False}
            with suppress(OSError, ValueError):
                answer = json.loads((self._places / f"rank-{peer.rank:05d}.json").read_text(encoding="utf-8"))
                if answer["pid"] == peer.pid and time.time() - answer.pop("left") < _GRACE_SECONDS + 10 * TICK_SECONDS:
                    position = answer
            if peer.machine == mine.machine:
                position.update(process_facts(peer.pid) if peer.rank != self._rank else {"process": "running"})
            position["where"] = where(position)
            found.append(position)
        return found

    def _is_reporter(self, found: list[dict[str, Any]]) -> bool:
        well = [
            each["rank"]
            for each in found
            if each["answered"] and each.get("process") not in ("stopped", "gone", "zombie")
        ]
        return bool(well) and min(well) == self._rank

    def _tell(self, found: list[dict[str, Any]], waited: float, bound: float) -> None:
        diagnosis = diagnose(found, waited)
        self._write(
            StallEvent(
                step=self._assembly.step,
                waited_seconds=waited,
                bound_seconds=bound,
                what=diagnosis.what,
                missing=list(diagnosis.missing),
                message=diagnosis.message,
                positions=found,
            )
        )
        self._say(f"stall: {diagnosis.message}")

    def _recovered(self, waited: float) -> None:
        if self._told_at:
            self._told_at = 0.0
            if self._rank == 0:
                self._write(RecoveryEvent(step=self._assembly.step, waited_seconds=waited))
                self._say(f"stall: the step ended after {waited:.1f} s")

    def _write(self, event: Event) -> None:
        # A log of its own, because the one of rank 0 may be in the hands of a rank that hangs. Appending keeps lines whole.
        with EventLog(self._folder.events_path) as log:
            log.write(event)


def _flight_recorder(assembly: Assembly) -> str:
    """NCCL's own record of its last collectives, as JSON text; "" where there is none."""
    if assembly.device.type != "cuda" or not c10d.is_initialized():
        return ""
    with suppress(AttributeError, RuntimeError, TypeError):
        import torch._C._distributed_c10d as native

        record: Any = native._dump_nccl_trace_json(includeCollectives=True, onlyActive=True)  # type: ignore[attr-defined]
        return record.decode() if isinstance(record, bytes) else str(record)
    return ""


def clear_positions(folder: Path) -> None:
    """Forget the positions of an earlier start of the run."""
    with suppress(OSError):
        for path in (folder / "positions").iterdir():
            path.unlink()
