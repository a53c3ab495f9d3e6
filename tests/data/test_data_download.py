"""Downloads against a server on this machine: broken connections, resuming, wrong bytes, two processes at once."""

import hashlib
import io
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shardwise.data.download import Remote, extract, fetch
from shardwise.errors import DataError

CONTENT = bytes(range(256)) * 4000
CHECKSUM = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `breaks` connections are cut half-way, `/plain` ignores ranges, `/wrong` has other bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks = 0
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        if self.path == "/missing":
            self.send_error(404)
            return
        content = CONTENT[::-1] if self.path == "/wrong" else CONTENT
        start = 0
        if wanted and self.path != "/plain":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if self.server.breaks > 0:
            self.server.breaks -= 1
            rest = rest[: len(rest) // 2]
            self.close_connection = True
        self.wfile.write(rest)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def remote(server: Server, *paths: str, checksum: str = CHECKSUM) -> Remote:
    return Remote("file.bin", checksum, tuple(server.url + path for path in paths))


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert fetch(remote(server, "/ok"), folder).read_bytes() == CONTENT
    assert server.asked == [("/ok", None)]
    assert left(folder) == {"file.bin", "file.bin.lock"}


def test_a_broken_connection_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    assert fetch(remote(server, "/ok"), tmp_path).read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [wanted for _, wanted in server.asked] == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_a_later_call_resumes(server: Server, tmp_path: Path) -> None:
    server.breaks = 3
    with pytest.raises(DataError, match=r"(?s)broke after 512000 of 1024000.*by hand"):
        fetch(remote(server, "/ok"), tmp_path)
    assert left(tmp_path) == {"file.bin.part", "file.bin.lock"}
    have = (tmp_path / "file.bin.part").stat().st_size
    assert have == len(CONTENT) * 7 // 8
    server.asked.clear()
    assert fetch(remote(server, "/ok"), tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/ok", f"bytes={have}-")]


@pytest.mark.parametrize("have", [CONTENT[:1000], CONTENT, b"other" * 10, CONTENT + b"more"])
@pytest.mark.parametrize("path", ["/ok", "/plain"])
def test_any_remains_end_in_the_right_file(server: Server, tmp_path: Path, have: bytes, path: str) -> None:
    (tmp_path / "file.bin.part").write_bytes(have)
    assert fetch(remote(server, path), tmp_path).read_bytes() == CONTENT


def test_the_next_address_is_tried(server: Server, tmp_path: Path) -> None:
    assert fetch(remote(server, "/missing", "/wrong", "/ok"), tmp_path).read_bytes() == CONTENT


def test_wrong_bytes_never_get_the_name(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sha256 checksum is") as caught:
        fetch(remote(server, "/wrong", "/missing"), tmp_path)
    assert "404" in str(caught.value)
    assert left(tmp_path) == {"file.bin.lock"}
    with pytest.raises(DataError, match="md5 checksum is"):
        fetch(remote(server, "/ok", checksum="md5:00"), tmp_path)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file\.bin could not be downloaded"):
        fetch(Remote("file.bin", CHECKSUM, ("http://127.0.0.1:9/x",)), tmp_path)


def _fetch_in_process(url: str, folder: str, ready: Any) -> None:
    ready.wait(30)
    assert fetch(Remote("file.bin", CHECKSUM, (url,)), Path(folder)).read_bytes() == CONTENT


def test_two_processes_fetch_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # a spawned child could not import this file
    ready = context.Barrier(3)
    children = [
        context.Process(target=_fetch_in_process, args=(server.url + "/ok", str(tmp_path), ready)) for _ in range(2)
    ]
    for child in children:
        child.start()
    ready.wait(30)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert server.asked == [("/ok", None)]


def archive(path: Path, members: dict[str, bytes | None]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                entry.size = len(content)
            tar.addfile(entry, None if content is None else io.BytesIO(content))
    return path


def test_only_the_named_members_are_extracted(tmp_path: Path) -> None:
    packed = archive(tmp_path / "a.tar.gz", {"set/one": b"1", "../evil": b"x", "set/two": b"22", "/abs": b"x"})
    extract(packed, ["set/one", "set/two"], tmp_path / "set")
    assert left(tmp_path / "set") == {"one", "two"}
    assert left(tmp_path) == {"a.tar.gz", "set", "set.lock"}
    assert not (tmp_path.parent / "evil").exists()


def test_damaged_archives_leave_nothing(tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.tar.gz", {"set/one": os.urandom(50_000), "set/link": None})
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[:20_000])
    for packed, name in ((cut, "set/one"), (whole, "set/two"), (whole, "set/link")):
        with pytest.raises(DataError, match=packed.name):
            extract(packed, [name], tmp_path / "set")
        assert not (tmp_path / "set").exists()
