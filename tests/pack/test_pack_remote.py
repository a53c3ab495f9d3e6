"""Sources behind a network: a web server, and HDFS through its REST interface (WebHDFS), both on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from shardwise.errors import DataError
from shardwise.pack.pack import pack
from shardwise.pack.parts import PackOptions
from shardwise.spec.packed import INDEX_NAME

TABLE = "x,letter,y\n" + "".join(f"{n},{'ab'[n % 2]},{n % 3}\n" for n in range(100))


class _Handler(BaseHTTPRequestHandler):
    """`/plain/...` serves files with byte ranges; `/webhdfs/v1/...` is the part of the WebHDFS interface that reads.

    Source: the WebHDFS REST API of Apache Hadoop, operations LISTSTATUS, GETFILESTATUS and OPEN; like a name node, OPEN
    sends the client to another address for the bytes.
    """

    root: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._plain(body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/webhdfs/v1"):
            self._hdfs()
        else:
            self._plain(body=True)

    def _plain(self, body: bool) -> None:
        path = self.root / urlsplit(self.path).path.removeprefix("/plain/")
        if not path.is_file():
            self._send(404, b"", "text/plain")
            return
        content, first = path.read_bytes(), 0
        wanted = self.headers.get("Range")
        if wanted:
            start, stop = wanted.removeprefix("bytes=").split("-")
            first, last = int(start), min(int(stop or len(content)), len(content) - 1)
            if first >= len(content):
                self._send(416, b"", "text/plain")
                return
            part = content[first : last + 1]
            extra = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            self._send(206, part, "application/octet-stream", extra, body)
            return
        self._send(200, content, "application/octet-stream", {"Accept-Ranges": "bytes"}, body)

    def _hdfs(self) -> None:
        asked = urlsplit(self.path)
        options = {key.lower(): values[0] for key, values in parse_qs(asked.query).items()}
        path = self.root / asked.path.removeprefix("/webhdfs/v1").lstrip("/")
        if not path.exists():
            self._json(404, {"RemoteException": {"exception": "FileNotFoundException", "message": "no such file"}})
        elif options["op"] == "LISTSTATUS":
            entries = sorted(path.iterdir()) if path.is_dir() else [path]
            self._json(200, {"FileStatuses": {"FileStatus": [self._status(entry, path) for entry in entries]}})
        elif options["op"] == "GETFILESTATUS":
            self._json(200, {"FileStatus": self._status(path, path)})
        elif "datanode" not in options:
            self._send(307, b"", "text/plain", {"Location": f"http://{self.headers['Host']}{self.path}&datanode=1"})
        else:
            start = int(options.get("offset", 0))
            content = path.read_bytes()[start:]
            self._send(200, content[: int(options.get("length", len(content)))], "application/octet-stream")

    def _status(self, path: Path, of: Path) -> dict[str, Any]:
        kind = "DIRECTORY" if path.is_dir() else "FILE"
        return {"pathSuffix": "" if path == of else path.name, "type": kind, "length": path.stat().st_size}

    def _json(self, code: int, document: dict[str, Any]) -> None:
        self._send(code, json.dumps(document).encode(), "application/json")

    def _send(
        self, code: int, content: bytes, kind: str, extra: dict[str, str] | None = None, body: bool = True
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """HOST:PORT of a server of `tmp_path`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = type("Handler", (_Handler,), {"root": tmp_path})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("protocol", ["http", "webhdfs"])
def test_a_remote_table_equals_a_local_one(server: str, tmp_path: Path, protocol: str) -> None:
    pytest.importorskip({"http": "aiohttp", "webhdfs": "requests"}[protocol])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "t.csv").write_text(TABLE)
    # a web server lists nothing, so a file is named; HDFS lists folders
    url = {"http": f"http://{server}/plain/tables/t.csv", "webhdfs": f"webhdfs://{server}/tables"}[protocol]
    options = PackOptions(target="y", categorical=("y",), shard_bytes=200)
    index = pack(url, tmp_path / "remote", options)
    assert len(index.splits["train"].shards) > 2 and index.splits["train"].rows == 100
    pack(str(tmp_path / "tables" / "t.csv"), tmp_path / "local", options)
    assert (tmp_path / "remote" / INDEX_NAME).read_bytes() == (tmp_path / "local" / INDEX_NAME).read_bytes()
    with pytest.raises(DataError):
        pack(url.replace("tables", "nowhere"), tmp_path / "none", options)


def test_servers_that_do_not_answer(tmp_path: Path) -> None:
    options = PackOptions(target="y")
    with pytest.raises(DataError, match=r"webhdfs://127\.0\.0\.1:1/x cannot be listed: .*refused"):
        pack("webhdfs://127.0.0.1:1/x", tmp_path / "a", options)
    with pytest.raises(DataError, match="does not exist, or its server does not answer"):
        pack("http://127.0.0.1:1/x.csv", tmp_path / "b", options)
    with pytest.raises(DataError, match=r"does not exist: give a file"):
        pack(str(tmp_path / "nowhere"), tmp_path / "c", options)
    with pytest.raises(DataError, match=r"Give the name node's web address, webhdfs://HOST:9870/path"):
        pack("hdfs://127.0.0.1:1/x", tmp_path / "d", options)
