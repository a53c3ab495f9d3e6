"""Files of a source, on this machine or behind any address that fsspec reads (http, s3, webhdfs, hdfs, memory, ...).

Everything is read by byte ranges, so that one large file can be shared out like many small ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from shardwise.errors import DataError

_OPTION = re.compile(r"^[a-z0-9+]+://", re.IGNORECASE)
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive bytes of a file.

    Attributes:
        url: a path, or an address that fsspec knows.
        start: of the first byte.
        bytes: how many.
        label: number of the class, where the place of the file says it; -1 otherwise.
        name: what a message calls it.
    """

    url: str
    start: int
    bytes: int
    label: int = -1
    name: str = ""


def is_remote(url: str) -> bool:
    """Whether it is an address and no path of this machine."""
    return bool(_OPTION.match(url)) and not url.lower().startswith("file://")


def find_files(url: str) -> list[tuple[str, int]]:
    """`(address, bytes)` of every file at or below an address, sorted by address; a single file is itself.

    Raises:
        DataError: nothing is there, it cannot be read, or the file system needs a package that is not installed.
    """
    file_system, path = _file_system(url)
    try:
        found = file_system.find(path, detail=True)
        if not found:
            info = file_system.info(path)
            found = {info["name"]: info} if info["type"] == "file" else {}
        # a web server's listing has no sizes: each file is asked for
        sizes = {name: info.get("size") or file_system.info(name).get("size") for name, info in found.items()}
    except FileNotFoundError as error:
        silent = ", or its server does not answer" if is_remote(url) else ""
        raise DataError(
            f"{url} does not exist{silent}: give a file or a folder, or an address such as s3://bucket/folder"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{url} cannot be listed: {error}") from error
    listed = [(_address(url, path, name), size) for name, size in sorted(sizes.items())]
    unknown = [name for name, size in listed if size is None]
    if unknown:
        raise DataError(
            f"{unknown[0]}: its server does not tell its size, so it cannot be shared out; copy it here first"
        )
    return [(name, int(size)) for name, size in listed if size is not None]


def find_data(url: str) -> list[tuple[str, int]]:
    """As `find_files`, without what Hadoop and Spark keep beside the data or have not finished.

    By their rule that is every name that begins with `_` or `.` (`_SUCCESS`, `_temporary/`, `.part-00000.crc`). A file that is
    given by its own name counts whatever that is.
    """
    root = canonical(url)
    return [
        (name, size)
        for name, size in find_files(url)
        if not any(part[0] in "_." for part in name.removeprefix(root).split("/") if part)
    ]


def canonical(url: str) -> str:
    """The address as `find_files` begins those of the files below it."""
    return url.rstrip("/") if is_remote(url) else _file_system(url)[1]


def read_range(url: str, start: int, size: int) -> bytes:
    """`size` bytes from `start`, fewer at the end of the file.

    Raises:
        DataError: the file cannot be read.
    """
    file_system, path = _file_system(url)
    try:
        if not is_remote(url):
            with open(path, "rb") as file:  # noqa: PTH123  # fsspec gives a text
                file.seek(start)
                return file.read(size)
        content: bytes = file_system.cat_file(path, start=start, end=start + size) if size else b""
        return content
    except (OSError, ValueError) as error:
        raise DataError(f"{url} cannot be read at byte {start}: {error}") from error


def open_file(url: str) -> IO[bytes]:
    """The whole file, for readers that seek in it themselves.

    Raises:
        DataError: the file cannot be opened.
    """
    file_system, path = _file_system(url)
    try:
        opened: IO[bytes] = file_system.open(path, "rb")
        return opened
    except (OSError, ValueError) as error:
        raise DataError(f"{url} cannot be opened: {error}") from error


def _file_system(url: str) -> tuple[Any, str]:
    try:
        file_system, path = url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        if url.startswith("hdfs://"):
            why = str(error).splitlines()[0]
            raise DataError(
                f"{url} cannot be opened through Hadoop's own client ({why}). Give the name node's web address, "
                'webhdfs://HOST:9870/path (pip install "shardwise[hdfs]")'
            ) from error
        if isinstance(error, ImportError):
            raise DataError(f"{url} cannot be opened: {error} (with pip, into this environment)") from error
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise DataError(f"{url} cannot be opened: {error}. File systems that are known: {known}") from error
    return file_system, str(path)


def _address(url: str, path: str, name: str) -> str:
    """What opens `name` again, which the file system listed at or below `path`: it may leave out host and protocol."""
    if not is_remote(url):
        return name
    below = name.removeprefix(path.rstrip("/"))
    return (
        url.rstrip("/") + below if below != name or name == path.rstrip("/") else f"{url.split('://', 1)[0]}://{name}"
    )
