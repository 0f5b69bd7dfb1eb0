"""Storage that fails on command: an error, a hang, a response that breaks off."""

import asyncio
from collections.abc import Callable

from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from daemon.storage.client import PROBE


class StorageGate:
    """An ASGI layer before Storage. Open, it lets every request through."""

    def __init__(self) -> None:
        self.closed = False
        """Return `error` for every request."""
        self.closed_for: str | None = None
        """Return `error` for paths that have this in them."""
        self.allows: Callable[[str, str], bool] = lambda method, path: True
        """Return `error` where this is false for a method and a path."""
        self.error: Callable[[], Response] = lambda: PlainTextResponse("upstream is away", 503)
        self.cuts = 0
        """How many uploads still break off in the middle of the response."""
        self.held: dict[str, asyncio.Event] = {}
        """Requests of these methods wait for their event; GETs where they are for a public picture."""
        self.kept_waiting: list[asyncio.Event] = []
        """The next uploads of pictures each wait for one of these; the others do not."""
        self.requests: list[tuple[str, str]] = []

    def before(self, app: ASGIApp) -> ASGIApp:
        """Wrap the app."""

        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            method, path = scope["method"], scope["path"]
            self.requests.append((method, path))
            if (event := self.held.get(method)) and (method != "GET" or "/object/public/" in path):
                await event.wait()
            if self.kept_waiting and method == "POST" and path.endswith(".png") and not path.endswith(PROBE):
                await self.kept_waiting.pop(0).wait()
            shut = self.closed or (self.closed_for is not None and self.closed_for in path)
            if shut or not self.allows(method, path):
                await self.error()(scope, receive, send)
            elif self.cuts and method in {"POST", "PUT"}:
                self.cuts -= 1
                await receive()
                headers = [(b"content-length", b"1000")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": b"{", "more_body": False})
            else:
                await app(scope, receive, send)

        return gated

    def uploads(self, run: str) -> int:
        """How often the run's image was uploaded, without thumbnail and preview."""
        return sum(method in {"POST", "PUT"} and f"/{run}.png" in path for method, path in self.requests)

    def take_no_uploads(self) -> None:
        """Return `error` for uploads alone, as a Storage whose object store is away."""
        self.allows = lambda method, path: method not in {"POST", "PUT"} or "/object/" not in path

    def take_uploads(self) -> None:
        """End what `take_no_uploads` began."""
        self.allows = lambda _, __: True

    @property
    def probes(self) -> int:
        """How often it was looked whether uploads work."""
        return sum(method == "POST" and path.endswith(PROBE) for method, path in self.requests)

    @property
    def looked_at(self) -> bool:
        """Whether a look has found uploads to work."""
        return ("DELETE", "/storage/v1/object/images") in self.requests
