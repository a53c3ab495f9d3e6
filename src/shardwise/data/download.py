"""Fetch published files: from several addresses, with checksums, resumable, one process at a time."""

import fcntl
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shardwise.errors import DataError

TIMEOUT_SECONDS = 30.0
TRIES = 3  # connections to one address before the next one is tried; each goes on where the last one broke off
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A published file: its name, its checksum as `sha256:HEX` or `md5:HEX`, and the addresses that serve these bytes."""

    name: str
    checksum: str
    urls: tuple[str, ...]


def fetch(remote: Remote, folder: Path) -> Path:
    """The file in `folder`, downloaded unless it is there. Safe when several processes ask at once: one downloads.

    An interrupted download leaves `NAME.part`, which the next call continues. The file appears under its name only when
    it is complete and its checksum is right. The lock is `flock`, which a network folder may not pass on between machines.

    Raises:
        DataError: no address gave the right bytes; the message says what each one did.
    """
    target = folder / remote.name
    make_folder(folder)
    with locked(target.with_name(remote.name + ".lock")):
        if target.exists():
            return target
        part = target.with_name(remote.name + ".part")
        failures: list[str] = []
        for url in remote.urls:
            for _ in range(TRIES):
                problem = _continue(url, part) or _checked(part, remote.checksum)
                if problem is None:
                    part.replace(target)
                    return target
                failures.append(f"  {url}: {problem}")
    raise DataError(
        f"{target} could not be downloaded:\n" + "\n".join(failures) + "\n"
        "Check the network and run again (what arrived is kept), or fetch the file by hand and put it there."
    )


def make_folder(folder: Path) -> None:
    """The folder, made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}; give a folder that can be written") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; wait for whoever has it. The system frees it when its owner dies."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; give a folder that can be written") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _continue(url: str, part: Path) -> str | None:
    """Append what is missing to `part`; None when the server has no more to give, else what went wrong."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "shardwise"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            resumed = answer.status == 206 and _starts_at(answer.headers.get("Content-Range"), have)
            if have and answer.status == 206 and not resumed:
                part.unlink()
                return "the server answered with another range than asked for"
            expected = answer.headers.get("Content-Length")
            with part.open("ab" if resumed else "wb") as file:
                got = _copy(answer, file)
            if expected is not None and got != int(expected):
                return f"the connection broke after {got} of {expected} bytes"
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after what we have: complete, or the remains of another file
            return None
        return f"the server answered {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _starts_at(content_range: str | None, start: int) -> bool:
    match = re.match(r"bytes (\d+)-", content_range or "")
    return match is not None and int(match.group(1)) == start


def _copy(answer: http.client.HTTPResponse, file: BinaryIO) -> int:
    got = 0
    while block := answer.read(_BLOCK_BYTES):
        file.write(block)
        got += len(block)
    return got


def _checked(part: Path, checksum: str) -> str | None:
    algorithm, _, wanted = checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with part.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() == wanted:
        return None
    part.unlink()  # wrong bytes are no base to continue from
    return f"the {algorithm} checksum is {digest.hexdigest()}, it should be {wanted}"


def extract(archive: Path, members: Sequence[str], folder: Path) -> None:
    """The named members (`FOLDER/FILE`) of a .tar.gz as `folder/FILE`; `folder` appears complete or not at all.

    Only these names are read, as plain files: nothing else in the archive can touch the disk.

    Raises:
        DataError: the archive is damaged or a member is missing.
    """
    with locked(folder.with_name(folder.name + ".lock")):
        if folder.exists():
            return
        aside = folder.with_name(folder.name + ".unpacking")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for name in members:
                    source = tar.extractfile(name)
                    if source is None:
                        raise DataError(f"{archive} holds {name} as something else than a file; fetch it again")
                    with source, (aside / Path(name).name).open("wb") as file:
                        shutil.copyfileobj(source, file, _BLOCK_BYTES)
        except KeyError as error:
            raise DataError(f"{archive} does not hold {error}; delete it and fetch it again") from error
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise DataError(f"{archive} is damaged ({error}); delete it and fetch it again") from error
        aside.replace(folder)
