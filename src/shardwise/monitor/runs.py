"""Finding the runs of a folder and following their events, whatever happens to the files meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

from shardwise.errors import FolderError
from shardwise.monitor.state import RunState
from shardwise.spec.events import Event, EventReader

EVENTS = "events.jsonl"

_DEPTH = 3  # folders below the given one that are searched for runs
_MOST_RUNS = 200
_INSIDE = {"checkpoints", "records", "traces", "positions"}  # of a run folder: no runs there


@final
class FollowedRun:
    """One run folder. `poll` reads what is new; a file that was replaced or cut is read again from its start."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name  # which can be printed
        self.state = RunState(path=name)
        self._reader = EventReader(folder / EVENTS)
        self._identity: tuple[int, int] | None = None
        self._size = 0

    def poll(self) -> Iterator[Event]:
        """Events that are new since the last call; a file that cannot be read is told in `error`."""
        status = _events_status(self.folder)
        if status is None:
            return
        identity = (status.st_dev, status.st_ino)
        if self._identity not in (None, identity) or status.st_size < self._size:
            self._reader = EventReader(self.folder / EVENTS)
            self.state = RunState(path=self.name)
        self._identity, self._size = identity, status.st_size
        try:
            for event in self._reader.new():
                if self.state.apply(event):
                    yield event
        except (FolderError, OSError) as error:
            self.state.error = str(error)

    @property
    def skipped(self) -> int:
        """Lines that were no events."""
        return self._reader.skipped + self.state.malformed


@final
class Watcher:
    """All runs at a place: a run folder, or a folder of them, searched again at every poll for new ones.

    Args:
        place: the folder.
        on_event: called with each new event and its run, for exports and plain text.

    Raises:
        FolderError: there is no such folder, or it is a file.
    """

    def __init__(self, place: Path, on_event: Callable[[FollowedRun, Event], None] | None = None) -> None:
        if not place.is_dir():
            what = "is a file" if place.exists() else "does not exist"
            raise FolderError(
                f"{place} {what}: give a run folder that `shardwise train` has made, or a folder that holds some"
            )
        self.place = place
        self.runs: dict[str, FollowedRun] = {}
        self._on_event = on_event

    @property
    def single(self) -> bool:
        """The place is itself a run folder."""
        return _is_run(self.place)

    def size_bytes(self) -> int:
        """Of all event files."""
        found = map(_events_status, find_runs(self.place))
        return sum(status.st_size for status in found if status is not None)

    def poll(self) -> bool:
        """Read what is new everywhere; returns whether there was anything."""
        changed = self._drop_vanished()
        for folder in find_runs(self.place):
            name = printable(folder.name if folder == self.place else folder.relative_to(self.place))
            run = self.runs.get(name)
            if run is None:
                run = self.runs[name] = FollowedRun(folder, name)
                changed = True
            for event in run.poll():
                changed = True
                if self._on_event is not None:
                    self._on_event(run, event)
        return changed

    def newest_first(self) -> list[FollowedRun]:
        """Runs, those under way first, then the one that was started last; the sweep whose folder is watched before all.

        What several runs write meanwhile does not change the order.
        """

        def order(run: FollowedRun) -> tuple[bool, bool, float, float]:
            under_way = run.state.status() in ("running", "stalled")
            return run.folder != self.place, not under_way, -(run.state.begun or 0.0), -(run.state.last or 0.0)

        return sorted(self.runs.values(), key=order)

    def _drop_vanished(self) -> bool:
        """Forget runs whose folder was removed. What is watched itself stays: its last state is all there is."""
        gone = [name for name, run in self.runs.items() if run.folder != self.place and not os.path.lexists(run.folder)]
        for name in gone:
            del self.runs[name]
        return bool(gone)


def find_runs(place: Path) -> list[Path]:
    """Run folders at a place: itself, or those up to three folders below, by name; links are not followed.

    A sweep's folder is one, and holds those of its trainings. Of more than 200, those that were written to last.
    """
    found: list[Path] = []
    if _is_run(place):
        if not _is_sweep(place):
            return [place]
        found.append(place)

    def search(folder: Path, depth: int) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            if entry.name in _INSIDE or not entry.is_dir(follow_symlinks=False):
                continue
            inside = Path(entry.path)
            if _is_run(inside):
                found.append(inside)
            if depth > 1 and (not _is_run(inside) or _is_sweep(inside)):
                search(inside, depth - 1)

    search(place, _DEPTH)
    if len(found) <= _MOST_RUNS:
        return found
    latest = set(sorted(found, key=_written, reverse=True)[:_MOST_RUNS])
    return [folder for folder in found if folder in latest or folder == place]


def printable(path: str | Path) -> str:
    """A name as text that can be printed, sent and told from others, whatever bytes it has."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _written(folder: Path) -> float:
    status = _events_status(folder)
    return 0.0 if status is None else status.st_mtime


def _events_status(folder: Path) -> os.stat_result | None:
    try:
        return (folder / EVENTS).stat()
    except OSError:
        return None


def _is_run(folder: Path) -> bool:
    return _is_file(folder / EVENTS) or _is_file(folder / "run.json")


def _is_sweep(folder: Path) -> bool:
    return _is_file(folder / "sweep.json")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # we may not look
        return False
