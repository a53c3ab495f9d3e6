"""RunFolder: the places of one run on disk, and the lock that keeps two runs out of one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from shardwise.errors import FolderError

VERSION = 1
"""Version of the folder's form, kept in `run.json`."""

DEFAULT_PARENT = Path("runs")
"""Where runs go that are given no place, relative to the working directory."""

ORPHAN_SECONDS = 10.0
"""How long to wait for the workers of a killed run to end, before its folder counts as in use."""

_MARKER = "run.json"
_LOCK = ".lock"


@final
@dataclass(frozen=True)
class RunFolder:
    """The places of one run. Made by `create` or `open`.

    Attributes:
        path: of the folder.
    """

    path: Path

    @classmethod
    def create(cls, path: Path | str | None, name: str) -> RunFolder:
        """Make the folder of a new run.

        Args:
            path: where; it must not exist or be empty. None takes `runs/<name>-<date>-<n>`, the first free n.
            name: of the job; kept in the folder.

        Raises:
            FolderError: the folder holds a run already, holds something else, or cannot be made.
        """
        folder = cls(_free_place(name) if path is None else Path(path))
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise folder._cannot_be_made(error) from error
        folder.check_empty()
        record = {"version": VERSION, "name": name, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with writing_in(folder.path):
            write_aside(folder.path / _MARKER, json.dumps(record, indent=2).encode() + b"\n")
            folder.checkpoints.mkdir()
        return folder

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """An existing run folder.

        Raises:
            FolderError: no folder, no run in it, or one of a newer form.
        """
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise FolderError(f"run folder {folder.path} does not exist: give the folder that a training has made")
        record = folder._record()
        if not isinstance(record.get("version"), int) or record["version"] > VERSION:
            raise FolderError(
                f"{folder.path} has the form {record.get('version')!r}, and this shardwise knows up to {VERSION}: "
                "open it with the shardwise that wrote it, or a newer one"
            )
        return folder

    def check_empty(self) -> None:
        """Refuse a place where something is already.

        Raises:
            FolderError: the folder holds a run already, holds something else, or cannot be looked into.
        """
        try:
            found = [item.name for item in self.path.iterdir()]
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._cannot_be_made(error) from error
        if _MARKER in found:
            raise FolderError(
                f"{self.path} already holds a run: one folder keeps one run; "
                "continue it with --resume (in Python: resume=True), or give another --out"
            )
        if found:
            raise FolderError(
                f"{self.path} is not empty and is no run folder (it holds {_some(found)}): "
                "a run starts in a new or empty folder; give another --out"
            )

    def _cannot_be_made(self, error: OSError) -> FolderError:
        return FolderError(f"cannot make the run folder {self.path}: {error.strerror}; give another place")

    @property
    def name(self) -> str:
        """Name of the job that the folder was made for."""
        return str(self._record().get("name", self.path.name))

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights_path(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def settings_path(self) -> Path:
        return self.path / "settings.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the folder for the length of a `with` block.

        The operating system holds the lock (`flock`) and takes it back when its holder ends, however it ends. Processes
        that the holder forks share it. It reaches as far as the file system's `flock` does: over all processes of a
        host, and over hosts on NFS (version 3 with lockd, or 4) and on Lustre mounted with `flock`.

        Raises:
            FolderError: another process owns it (named), or the file system has no locks.
        """
        path = self.path / _LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FolderError(f"cannot write in the run folder {self.path}: {error.strerror}") from error
        try:
            _take(descriptor, self.path)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):  # on a full disk the holder stays unnamed; the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _record(self) -> dict[str, Any]:
        path = self.path / _MARKER
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FolderError(
                f"{self.path} is no run folder (it has no {_MARKER}): give the folder that a training has made"
            ) from None
        except (OSError, ValueError) as error:
            raise FolderError(f"{path} cannot be read ({error}): the run folder is damaged") from error
        if not isinstance(record, dict):
            raise FolderError(f"{path} does not describe a run: the run folder is damaged")
        return record


def _free_place(name: str) -> Path:
    """Claim `runs/<name>-<date>-<n>`; making the folder is the claim, so that two starts never get the same."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"
    date = time.strftime("%Y%m%d")
    try:
        DEFAULT_PARENT.mkdir(parents=True, exist_ok=True)
        n = 1
        while True:
            place = DEFAULT_PARENT / f"{stem}-{date}-{n}"
            try:
                place.mkdir()
            except FileExistsError:
                n += 1
            else:
                return place
    except OSError as error:
        raise FolderError(
            f"cannot make a run folder in {DEFAULT_PARENT.absolute()}: {error.strerror}; give a place with --out"
        ) from error


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _take(descriptor: int, folder: Path) -> None:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise FolderError(
                    f"run folder {folder} cannot be locked ({error.strerror}): its file system has no flock, so two runs "
                    "could write it at once; put --out on another file system, or mount this one with locks"
                ) from error
            # Workers of a holder that was killed have the lock until they have ended as well, which takes a moment.
            if _holder_is_dead(descriptor) and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise FolderError(
                f"run folder {folder} is in use by {_holder(descriptor)}: one run writes one folder; "
                "wait for that run, stop it, or give another --out"
            ) from None
        return


def _holder_is_dead(descriptor: int) -> bool:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        if record["host"] != socket.gethostname():
            return False
        os.kill(int(record["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def _holder(descriptor: int) -> str:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {record['pid']} on {record['host']} since {record['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it took the lock and has not written its name yet


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Tells what the file system refuses in the block as a FolderError."""
    try:
        yield
    except OSError as error:
        raise FolderError(f"cannot write in the run folder {folder}: {error.strerror}; give another place") from error


def write_aside(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent: beside it, to disk, then renamed over it.

    Raises:
        OSError: the file system refused.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring a folder's list of names to disk, after which a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
