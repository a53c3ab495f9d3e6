"""The live page: served on this machine alone, to whoever has the address with its token.

The token is a part of the path, so that the page's own relative links carry it. Nothing is loaded from elsewhere: the
content security policy forbids it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import TYPE_CHECKING, Any, final

from shardwise.errors import UserError
from shardwise.monitor.prometheus import exposition
from shardwise.monitor.runs import Watcher, printable
from shardwise.monitor.state import differing_settings

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 10.0
TOKEN_LETTERS = 16

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}

_FILES = {
    "": ("index.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}


@final
class Hub:
    """The watcher behind the page: polled in one thread, read by all requests."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._lock = threading.Lock()
        self.version = 0

    def poll(self) -> None:
        """Read what is new."""
        with self._lock:
            if self._watcher.poll():
                self.version += 1

    def view(self, name: str = "") -> dict[str, Any]:
        """All runs in short, and one of them in full: the one of that name, or the one with the latest news."""
        with self._lock:
            runs = self._watcher.newest_first()
            chosen = next((run for run in runs if run.name == name), runs[0] if runs else None)
            short = [run.state.snapshot(curves=False) for run in runs]
            for record in short:
                for key in ("notes", "rank_rows", "settings", "experts"):
                    del record[key]
            return {
                "place": printable(self._watcher.place),
                "runs": short,
                "differing": differing_settings([run.state for run in runs]) if len(runs) > 1 else {},
                "run": None if chosen is None else {**chosen.state.snapshot(), "skipped_lines": chosen.skipped},
            }

    def metrics(self) -> str:
        """All runs in the text format of Prometheus."""
        with self._lock:
            return exposition([run.state for run in self._watcher.newest_first()])


def make_app(hub: Hub, token: str) -> Starlette:
    """The web application; every path begins with the token."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    folder = resources.files("shardwise.monitor") / "page"
    files = {name: ((folder / file).read_bytes(), kind) for name, (file, kind) in _FILES.items()}

    def refused() -> Response:
        return PlainTextResponse("not found: open the address that `shardwise watch` printed\n", 404, HEADERS)

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", "")
        if not _same(request, token) or name not in files:
            return refused()
        content, kind = files[name]
        return Response(content, media_type=kind, headers=HEADERS)

    async def state(request: Request) -> Response:
        if not _same(request, token):
            return refused()
        return Response(
            _json(hub.view(request.query_params.get("run", ""))), media_type="application/json", headers=HEADERS
        )

    async def metrics(request: Request) -> Response:
        if not _same(request, token):
            return refused()
        text = hub.metrics().encode("utf-8", "backslashreplace")
        return Response(text, media_type="text/plain; version=0.0.4", headers=HEADERS)

    async def stream(request: Request) -> Response:
        if not _same(request, token):
            return refused()
        events = _events(hub, request.query_params.get("run", ""))
        return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)

    async def nothing(_: Request, __: Exception) -> Response:
        return refused()

    return Starlette(
        routes=[
            Route("/{token}/", file),
            Route("/{token}/state.json", state),
            Route("/{token}/metrics", metrics),
            Route("/{token}/stream", stream),
            Route("/{token}/{name}", file),
        ],
        # A page elsewhere cannot reach the server by giving its own name this machine's address.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={404: nothing, 405: nothing},
    )


def serve(watcher: Watcher, port: int, say: Callable[[str], None], *, token: str = "") -> None:
    """Serve the page until Ctrl-C.

    Args:
        watcher: the runs.
        port: of 127.0.0.1; 0 takes a free one.
        say: shows a line to people.
        token: of the address; a random one if left out.

    Raises:
        UserError: the port is taken, the token too short, or the extra `watch` is not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            "the page needs starlette and uvicorn: pip install 'shardwise[watch]', or use --text"
        ) from error
    token = token or secrets.token_urlsafe(TOKEN_LETTERS)
    if len(token) < TOKEN_LETTERS or not token.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"--token: give at least {TOKEN_LETTERS} letters, digits, - or _, or leave it out")
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind(("127.0.0.1", port))
        door.listen(64)  # from the line below on, the address answers
    except OSError as error:
        door.close()
        raise UserError(
            f"--port {port} cannot be used ({error.strerror}): give another, or 0 for a free one"
        ) from error
    hub = Hub(watcher)
    hub.poll()
    ended = threading.Event()

    config = uvicorn.Config(
        make_app(hub, token), log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    wrong: list[Exception] = []

    def poll_forever() -> None:
        try:
            while not ended.wait(POLL_SECONDS):
                hub.poll()
        except Exception as error:  # noqa: BLE001  # of a sink: a page that stands still would look as if it were live
            wrong.append(error)
            server.should_exit = True

    thread = threading.Thread(target=poll_forever, name="shardwise watch", daemon=True)
    thread.start()
    place = printable(watcher.place)
    say(f"watching {place} at http://127.0.0.1:{door.getsockname()[1]}/{token}/  (Ctrl-C ends it)")
    try:
        server.run(sockets=[door])
    except KeyboardInterrupt:
        return
    finally:
        ended.set()
        thread.join()
        door.close()
    if wrong:
        raise wrong[0]


def _same(request: Request, token: str) -> bool:
    return secrets.compare_digest(request.path_params["token"].encode(), token.encode())


async def _events(hub: Hub, run: str) -> AsyncIterator[str]:
    """The state whenever it has changed, and a sign of life in between, which also refreshes what depends on the clock."""
    seen, quiet = -1, 0.0
    while True:
        if hub.version != seen or quiet >= KEEP_ALIVE_SECONDS:
            seen, quiet = hub.version, 0.0
            view = await asyncio.to_thread(hub.view, run)
            yield f"event: state\ndata: {_json(view)}\n\n"
        await asyncio.sleep(POLL_SECONDS)
        quiet += POLL_SECONDS


def _json(view: dict[str, Any]) -> str:
    return json.dumps(_finite(view), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinities: they become texts."""
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
