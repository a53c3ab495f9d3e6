"""Store: an SQLite file that keeps every result as soon as it is there, whatever happens to the scheduler."""

from __future__ import annotations

import hashlib
import pickle
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from shardwise.errors import FolderError, RunFailed, UserError
from shardwise.run.progress import tell
from shardwise.tasks import wire
from shardwise.tasks.identity import LAMBDA, Identity, identity_of
from shardwise.tasks.task import Ending
from shardwise.tasks.wire import Payload, SharedFile

VERSION = 1
"""Version of the file's form."""

LOCK_SECONDS = 1.0
"""How long to wait for the owner of a store to end, as one that was just killed does."""

_NUMBERED = re.compile(r"#\d+$")

_LARGEST = 900 * 1024**2
"""Bytes of one result; SQLite's limit is a gigabyte (sqlite.org/limits.html)."""


@final
@dataclass(frozen=True, slots=True)
class Record:
    """What is kept of one task; `payload` is None where it failed."""

    state: str
    payload: Payload | None
    message: str
    attempts: int
    seconds: float
    peak_bytes: int | None

    @classmethod
    def of(cls, ending: Ending) -> Record:
        message = ending.failure.message if ending.failure is not None else ""
        payload = ending.payload if ending.state == "done" else None
        return cls(ending.state, payload, message, ending.attempts, ending.seconds, ending.peak_bytes)


@final
class Store:
    """Results of one map or graph by key. One scheduler has it open at a time."""

    def __init__(self, path: Path, name: str, *, resume: bool) -> None:
        self.path = path
        self._seen: Counter[str] = Counter()
        self._dirty = False
        self._closed = False
        self._held = self._taken = 0
        self._functions: dict[int, tuple[Callable[..., Any], Identity]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
        except (sqlite3.OperationalError, OSError) as error:
            raise FolderError(f"the store {path} cannot be opened: {error}; give another file") from error
        try:
            self._take(name, resume=resume)
        except BaseException as error:
            self._base.close()
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise FolderError(f"{path} is in use by another process: wait for it, or give another store") from error
            if isinstance(error, sqlite3.OperationalError):
                raise FolderError(f"the store {path} cannot be written: {error}") from error
            if isinstance(error, sqlite3.DatabaseError):
                raise FolderError(f"{path} is no store of tasks ({error}): give another file") from error
            raise

    def _take(self, name: str, *, resume: bool) -> None:
        # One owner: the lock is the file's, and goes with the process that has it, however that ends.
        self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._base.execute("PRAGMA journal_mode=WAL")
        # Survives the end of any process. Only a power cut may take the last results, never what is before them.
        self._base.execute("PRAGMA synchronous=NORMAL")
        self._base.execute("BEGIN IMMEDIATE")
        self._prepare(name, resume=resume)
        self._base.execute("COMMIT")

    def _prepare(self, name: str, *, resume: bool) -> None:
        execute = self._base.execute
        execute("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT)")
        execute(
            "CREATE TABLE IF NOT EXISTS tasks (key TEXT PRIMARY KEY, state TEXT, data BLOB, sizes TEXT, message TEXT, "
            "attempts INTEGER, seconds REAL, peak_bytes INTEGER, ended REAL)"
        )
        about = dict(execute("SELECT name, value FROM about").fetchall())
        if not about:
            execute("INSERT INTO about VALUES ('version', ?), ('name', ?)", (str(VERSION), name))
            return
        if int(about["version"]) > VERSION:
            raise FolderError(f"{self.path} has the form {about['version']}, and this shardwise knows up to {VERSION}")
        if about["name"] != name:
            raise FolderError(f"{self.path} holds results of {about['name']}, not of {name}: give another store")
        self._held = execute("SELECT COUNT(*) FROM tasks WHERE state = 'done'").fetchone()[0]
        if self._held and not resume:
            raise FolderError(
                f"{self.path} holds {self._held} results already: give resume=True to run only what is missing, or another "
                "store"
            )

    def key(
        self,
        function: Callable[..., Any],
        name: str,
        value: Any,
        *,
        named: str | None = None,
        after: Sequence[str] = (),
    ) -> str:
        """Names a task: by what is computed, of what, and from what.

        Args:
            value: what the function is given, or its payload.
            named: the user's own name for the function's arguments, or for the whole task.
            after: keys of the tasks whose results it is given.
        """
        identity = self._identity(function, name)
        key = named if named is not None else digest(name, value)
        parts = [part for part in (identity.bound, *after) if part]
        return self._unique(digest(key, parts) if parts else key)

    def _identity(self, function: Callable[..., Any], name: str) -> Identity:
        known = self._functions.get(id(function))
        if known is None:
            # Holding the function keeps its id its own.
            known = self._functions[id(function)] = (function, identity_of(function))
            self._compare(name, known[1].code)
        return known[1]

    def _compare(self, name: str, code: str) -> None:
        """Tell of results that an older text of the function gave. Some want that: it was mended for what failed."""
        row = f"code of {name}"
        before = self._base.execute("SELECT value FROM about WHERE name = ?", (row,)).fetchone()
        if before is not None and before[0] == code:
            return
        same_python = before is not None and before[0].split(":")[0] == code.split(":")[0]
        if self._held and same_python and not name.endswith(LAMBDA):
            tell(f"{self.path}: the code of {name} has changed; results that are there are taken as they are")
        self._begin()
        self._write("INSERT OR REPLACE INTO about VALUES (?, ?)", (row, code))

    def _unique(self, key: str) -> str:
        """The key, told from its earlier uses in this run: the second of two equal items is another task."""
        self._seen[key] += 1
        count = self._seen[key]
        # A key that looks like the second use of another one always says its number.
        return key if count == 1 and not _NUMBERED.search(key) else f"{key}#{count}"

    def get(self, key: str) -> Record | None:
        """What is kept under a key; a record without payload tells how long a failed task took."""
        row = self._base.execute(
            "SELECT state, data, sizes, message, attempts, seconds, peak_bytes FROM tasks WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        self._taken += row[0] == "done"
        state, data, sizes, message, attempts, seconds, peak = row
        return Record(state, _from_blob(data, sizes) if state == "done" else None, message, attempts, seconds, peak)

    def put(self, key: str, record: Record) -> None:
        """Keep how a task ended; `commit` makes it last.

        Raises:
            RunFailed: the disk is full.
            UserError: the result is too large for the store.
        """
        if record.state == "cancelled":
            return
        data, sizes = _to_blob(record.payload) if record.payload is not None else (None, "")
        if data is not None and len(data) > _LARGEST:
            raise UserError(
                f"the result of {key} has {len(data)} bytes, and a store keeps up to {_LARGEST} of each: "
                "let the task write a file and return its name"
            )
        self._begin()
        self._write(
            "INSERT OR REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, record.state, data, sizes, record.message, record.attempts, record.seconds, record.peak_bytes,
             time.time()),
        )  # fmt: skip

    def _begin(self) -> None:
        if not self._dirty:
            self._write("BEGIN")
            self._dirty = True

    def _write(self, statement: str, values: tuple[Any, ...] = ()) -> None:
        try:
            self._base.execute(statement, values)
        except sqlite3.Error as error:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            self._dirty = False
            raise RunFailed(
                f"the store {self.path} cannot be written: {error}. The results that were told before are in it: free the "
                "disk, and run again with resume=True"
            ) from error

    def commit(self) -> None:
        """From here on, what was put survives this process."""
        if self._dirty:
            self._write("COMMIT")
            self._dirty = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self.commit()
            finally:
                self._base.close()
            if self._held and self._seen and not self._taken:
                tell(
                    f"{self.path} held {self._held} results and none was of these tasks: a task is known by its function, what "
                    "is bound to it, and its arguments or key"
                )


def open_store(path: Path | str, name: str, *, resume: bool) -> Store:
    """The store in this file, made when there is none.

    Raises:
        FolderError: it is in use, holds something else, or holds results and `resume` is not set.
    """
    return Store(Path(path), name, resume=resume)


def digest(name: str, value: Any) -> str:
    """A name for a value: equal for values with equal pickles."""
    hashed = hashlib.sha256(name.encode())
    hashed.update(pickle.dumps(value, 5) if not isinstance(value, Payload) else _to_blob(value)[0])
    return f"{name}:{hashed.hexdigest()[:32]}"


def _to_blob(payload: Payload) -> tuple[bytes, str]:
    """The pickle and its buffers in one piece, and where they end."""
    if payload.file is None:
        return payload.data, ""
    view = payload.file.map()
    starts, _ = wire.places(payload.sizes)
    parts = [view[start : start + size] for start, size in zip(starts, payload.sizes, strict=True)]
    sizes = [len(payload.data), *payload.sizes]
    return b"".join([payload.data, *parts]), ",".join(map(str, sizes))


def _from_blob(data: bytes, sizes: str) -> Payload:
    if not sizes:
        return Payload(data)
    first, *others = (int(size) for size in sizes.split(","))
    view = memoryview(data)
    buffers, start = [], first
    for size in others:
        buffers.append(view[start : start + size])
        start += size
    return Payload(data[:first], tuple(others), SharedFile.of(buffers))
