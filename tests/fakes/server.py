"""Serve a fake API: a server on loopback, a ledger of its requests, and faults on demand.

async with GoogleAPI() as api:
    api.next(Response(503))
    ...
    assert len(api.requests) == 1
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any, Self

import uvicorn
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from tests.support.servers import listening_socket


@dataclass
class Call:
    """One request as it arrived. `fields` is its JSON, or the texts of its form; a form's picture is in `image`.

    `came_at` and `left_at` are when it came and when its response had left, by the API's clock.
    """

    method: str
    path: str
    headers: dict[str, str]
    fields: dict[str, Any] = field(default_factory=dict)
    image: bytes | None = None
    image_type: str | None = None
    came_at: float = field(default_factory=time.monotonic)
    left_at: float = 0.0


@dataclass(frozen=True)
class Response:
    """A response. With `cut` the connection drops after that many bytes; with `after` it waits for an event."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    after: asyncio.Event | None = None

    @classmethod
    def json(cls, status: int, document: object, **headers: str) -> "Response":
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(document).encode(), {"content-type": "application/json", **named})


class CutError(Exception):
    """Makes the server drop the connection."""


class FakeAPI:
    """A server. Subclasses have `refusal` for bad requests and `respond` for good ones. A picture `takes` so many seconds."""

    def __init__(self) -> None:
        self.requests: list[Call] = []
        self.url = ""
        self._faults: deque[Response | None] = deque()
        self.reset()

    def reset(self) -> None:
        """Forget all requests and faults; the address stays."""
        self.requests.clear()
        self._faults.clear()
        self.takes = 0.0

    def next(self, *responses: Response) -> None:
        """Respond to the next good requests like this, one each; those after them succeed."""
        self._faults.extend(responses)

    def hold(self) -> asyncio.Event:
        """Respond to the next good request when the event is set, and otherwise never."""
        go = asyncio.Event()
        self._faults.append(Response(after=go))
        return go

    def refusal(self, call: Call) -> Response | None:
        """Return the response to a bad request; None for a good one."""
        raise NotImplementedError

    def respond(self, call: Call) -> Response:
        """Return the response to a good request."""
        raise NotImplementedError

    def draws(self, call: Call) -> bool:
        """Return whether a request has its picture in the response."""
        return call.method == "POST"

    async def __aenter__(self) -> Self:
        listening = listening_socket()
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            self._serve, log_config=None, lifespan="off", ws="none", interface="asgi3", timeout_graceful_shutdown=1
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([listening]), name="fake API")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        await self._serving

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = await _read(Request(scope, receive))
        self.requests.append(call)
        response = self.refusal(call)
        if response is None:
            if self.takes and self.draws(call):
                await asyncio.sleep(self.takes)
            response = self._faults.popleft() if self._faults else self.respond(call)
        if response.after is not None:
            await response.after.wait()
            response = replace(self.respond(call), cut=response.cut)
        if response.cut is not None:
            response = replace(response if response.body else self.respond(call), cut=response.cut)
        await _send(response, send)
        call.left_at = time.monotonic()


async def _send(response: Response, send: Send) -> None:
    headers = {"content-length": str(len(response.body)), **response.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": response.status, "headers": raw})
    await send(
        {"type": "http.response.body", "body": response.body[: response.cut], "more_body": response.cut is not None}
    )
    if response.cut is not None:
        raise CutError


async def _read(request: Request) -> Call:
    call = Call(request.method, request.url.path, dict(request.headers))
    kind = call.headers.get("content-type", "")
    if kind.startswith("application/json") and await request.body():
        call.fields = await request.json()
    elif kind.startswith(("multipart/form-data", "application/x-www-form-urlencoded")):
        async with request.form() as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    call.fields[name] = value.filename
                    call.image, call.image_type = await value.read(), value.content_type
                else:
                    call.fields[name] = value
    return call


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the test run."""
        yield


def picture(size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    """A picture of one colour."""
    file = BytesIO()
    Image.new("RGB", size, "teal").save(file, kind)
    return file.getvalue()


def size_of(image: bytes) -> tuple[int, int]:
    """Its width and height."""
    with Image.open(BytesIO(image)) as opened:
        return opened.size
