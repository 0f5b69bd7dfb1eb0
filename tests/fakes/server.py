"""What fakes of APIs have in common: a server on loopback, a ledger of what was asked, and faults on demand.

async with GoogleAPI() as api:
    api.next(Answer(503))
    ...
    assert len(api.requests) == 1
"""

import asyncio
import json
import socket
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


@dataclass
class Call:
    """One request as it arrived. `fields` is its JSON, or the texts of its form; a form's picture is in `image`."""

    method: str
    path: str
    headers: dict[str, str]
    fields: dict[str, Any] = field(default_factory=dict)
    image: bytes | None = None
    image_type: str | None = None


@dataclass(frozen=True)
class Answer:
    """What comes back. With `cut` the connection drops after that many bytes; with `after` it waits for an event."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    after: asyncio.Event | None = None

    @classmethod
    def json(cls, status: int, document: object, **headers: str) -> "Answer":
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(document).encode(), {"content-type": "application/json", **named})


class CutError(Exception):
    """Makes the server drop the connection."""


class FakeAPI:
    """A server. Subclasses say what they refuse, and what they answer to what is good."""

    def __init__(self) -> None:
        self.requests: list[Call] = []
        self.url = ""
        self._faults: deque[Answer | None] = deque()
        self.reset()

    def reset(self) -> None:
        """As new, at the same address."""
        self.requests.clear()
        self._faults.clear()

    def next(self, *answers: Answer) -> None:
        """The next good requests are answered like this, one each; those after them succeed."""
        self._faults.extend(answers)

    def hold(self) -> asyncio.Event:
        """The next good request is answered when the event is set, and otherwise never."""
        go = asyncio.Event()
        self._faults.append(Answer(after=go))
        return go

    def refusal(self, call: Call) -> Answer | None:
        """What a request that is not good is answered."""
        raise NotImplementedError

    def answer(self, call: Call) -> Answer:
        """What a good request is answered."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        listening = socket.create_server(("127.0.0.1", 0))
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
        answer = self.refusal(call)
        if answer is None:
            answer = self._faults.popleft() if self._faults else self.answer(call)
        if answer.after is not None:
            await answer.after.wait()
            answer = replace(self.answer(call), cut=answer.cut)
        if answer.cut is not None:
            answer = replace(answer if answer.body else self.answer(call), cut=answer.cut)
        await _send(answer, send)


async def _send(answer: Answer, send: Send) -> None:
    headers = {"content-length": str(len(answer.body)), **answer.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": answer.body[: answer.cut], "more_body": answer.cut is not None})
    if answer.cut is not None:
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
