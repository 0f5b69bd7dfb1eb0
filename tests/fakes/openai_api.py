"""OpenAI's Images API on loopback: the recorded shapes, a ledger of what was asked, and faults on demand.

It refuses what the real one refuses: unknown fields, sizes and qualities a model does not have, `response_format` for
its own models, pictures of the wrong content type, retired models, a missing key.

    async with OpenAIAPI() as api:
        api.next(status(429, "rate_limit_exceeded", headers={"retry-after": "7"}))
        ...
        assert len(api.requests) == 1
"""

import asyncio
import base64
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Self

import uvicorn
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from tests.support.servers import listening_socket

KEY = "sk-test-key"
LIVE = ("gpt-image-2", "gpt-image-2.5-flare", "gpt-image-2.5-sunburst", "gpt-image-2.6-flare", "gpt-image-2.6-sunburst")
ENDING = ("gpt-image-1.5", "gpt-image-1-mini", "chatgpt-image-latest")
RETIRED = ("gpt-image-1", "dall-e-2", "dall-e-3")
FIELDS = {
    *("prompt", "model", "n", "size", "quality", "output_format", "output_compression", "background", "moderation"),
    *("complexity", "stream", "partial_images", "safety_identifier", "user", "response_format"),
}
EDIT_FIELDS = {*FIELDS, "image", "image[]", "mask", "markup", "input_fidelity"}
IMAGE_TYPES = {"image/png", "image/jpeg", "image/webp"}
OUTPUT_TOKENS = 196
PARTIAL_TOKENS = 100


@dataclass
class Call:
    """One request as it arrived. `fields` holds texts and JSON values; the picture of an edit is in `image`."""

    path: str
    headers: dict[str, str]
    fields: dict[str, Any]
    image: bytes | None = None
    image_type: str | None = None
    came_at: float = field(default_factory=time.monotonic)
    left_at: float = 0.0


@dataclass
class Exchange:
    """The request that a fault ends."""

    call: Call
    api: "OpenAIAPI"
    send: Send

    async def start(self, status: int, content_type: str, **headers: str) -> None:
        pairs = {"content-type": content_type, "x-request-id": f"req_{len(self.api.requests)}", **headers}
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in pairs.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def body(self, data: bytes, *, more: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def json(self, status: int, document: object, **headers: str) -> None:
        await self.start(status, "application/json", **headers)
        await self.body(json.dumps(document).encode())

    async def event(self, document: dict[str, Any]) -> None:
        name = document.get("type", "error")
        await self.body(f"event: {name}\ndata: {json.dumps(document)}\n\n".encode(), more=True)


Fault = Callable[[Exchange], Awaitable[None]]


class CutError(Exception):
    """Makes the server drop the connection."""


@dataclass
class OpenAIAPI:
    """The server. `compatible` is another vendor's: any model, `response_format` understood, no stream, no usage.

    With `only_urls` a picture lies at an address, and the first `bad_downloads` of such pictures fail. While there is an
    `outage`, every request ends like this. A picture `takes` so many seconds.
    """

    compatible: bool = False
    only_urls: bool = False
    usage: bool = True
    picture: bytes | None = None
    bad_downloads: int = 0
    takes: float = 0.0
    outage: Fault | None = None
    requests: list[Call] = field(default_factory=list)
    downloads: int = 0
    url: str = ""
    _faults: deque[Fault] = field(default_factory=deque)

    def next(self, *faults: Fault) -> None:
        """The next requests end like this, one each; those after them succeed."""
        self._faults.extend(faults)

    def reset(self) -> None:
        """As new, at the same address."""
        self.compatible = self.only_urls = False
        self.usage, self.picture, self.downloads, self.bad_downloads = True, None, 0, 0
        self.outage, self.takes = None, 0.0
        self.requests.clear()
        self._faults.clear()

    async def __aenter__(self) -> Self:
        listening = listening_socket()
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        config = uvicorn.Config(
            self._serve, log_config=None, lifespan="off", ws="none", interface="asgi3", timeout_graceful_shutdown=1
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([listening]), name="fake OpenAI API")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        await self._serving

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.method == "GET":
            exchange = Exchange(Call(request.url.path, dict(request.headers), {}), self, send)
            return await (self._models if request.url.path == "/v1/models" else self._download)(exchange)
        call = await _read(request)
        self.requests.append(call)
        exchange = Exchange(call, self, send)
        if refusal := None if self.compatible else _refusal(call):
            status_code, error = refusal
            return await exchange.json(status_code, {"error": error})
        if self.outage or self._faults:
            return await (self.outage or self._faults.popleft())(exchange)
        if call.fields.get("stream") and not self.compatible:
            await self._stream(exchange)
        else:
            await asyncio.sleep(self.takes)
            await exchange.json(200, self._document(call))
        call.left_at = time.monotonic()
        return None

    async def _download(self, exchange: Exchange) -> None:
        self.downloads += 1
        if self.downloads <= self.bad_downloads:
            return await exchange.json(503, {})
        await exchange.start(200, "image/png")
        return await exchange.body(self._picture({}))

    async def _models(self, exchange: Exchange) -> None:
        if self._faults:
            return await self._faults.popleft()(exchange)
        if exchange.call.headers.get("authorization") != f"Bearer {KEY}":
            return await status(401, "invalid_api_key")(exchange)
        return await exchange.json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in LIVE]})

    def _document(self, call: Call) -> dict[str, Any]:
        if self.only_urls:
            item: dict[str, Any] = {
                "url": f"{self.url}/files/picture.png?secret=1",
                "revised_prompt": "As it was drawn",
            }
        else:
            item = {"b64_json": self.encoded(call)}
        document: dict[str, Any] = {"created": 1, "data": [item]}
        return {**document, "usage": _usage(0)} if self.usage and not self.compatible else document

    async def _stream(self, exchange: Exchange) -> None:
        await exchange.start(200, "text/event-stream; charset=utf-8")
        partials = int(exchange.call.fields.get("partial_images") or 0)
        for index in range(partials):
            await exchange.event(self.partial(exchange.call, index))
        await asyncio.sleep(self.takes)
        await exchange.event(self.completed(exchange.call, partials))
        await exchange.body(b"")

    def partial(self, call: Call, index: int) -> dict[str, Any]:
        return {
            "type": f"{_family(call)}.partial_image",
            "b64_json": self.encoded(call),
            "partial_image_index": index,
            **_drawn(call),
        }

    def completed(self, call: Call, partials: int) -> dict[str, Any]:
        usage = {"usage": _usage(partials)} if self.usage else {}
        return {"type": f"{_family(call)}.completed", "b64_json": self.encoded(call), **_drawn(call), **usage}

    def encoded(self, call: Call) -> str:
        return base64.b64encode(self._picture(call.fields)).decode()

    def _picture(self, fields: dict[str, Any]) -> bytes:
        if self.picture is not None:
            return self.picture
        width, height = (int(edge) for edge in str(fields.get("size", "64x64")).split("x"))
        file = BytesIO()
        Image.new("RGB", (width, height), "teal").save(file, "PNG")
        return file.getvalue()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the test run."""
        yield


# What can go wrong, one function each.


def status(number: int, error: str | None = None, *, headers: dict[str, str] | None = None, **more: Any) -> Fault:
    """An error with a JSON body, as the API writes it."""

    async def fault(exchange: Exchange) -> None:
        document = {"error": {"message": f"It is {error}.", "type": "error", "param": None, "code": error, **more}}
        await exchange.json(number, document, **(headers or {}))

    return fault


def moderation(stage: str, *categories: str) -> dict[str, Any]:
    """The error object of a refusal."""
    return {
        "message": f"Your request was rejected by the safety system. safety_violations=[{', '.join(categories)}].",
        "type": "image_generation_user_error",
        "param": None,
        "code": "moderation_blocked",
        "moderation_details": {"moderation_stage": stage, "categories": list(categories)},
    }


def error_event(error: dict[str, Any], *, after: int = 1) -> Fault:
    """A stream that ends in an error after some previews."""

    async def fault(exchange: Exchange) -> None:
        await exchange.start(200, "text/event-stream")
        for index in range(after):
            await exchange.event(exchange.api.partial(exchange.call, index))
        await exchange.event({"error": error})
        await exchange.body(b"")

    return fault


def cut(*, after: int) -> Fault:
    """A stream whose connection drops after some previews and half of the next one."""

    async def fault(exchange: Exchange) -> None:
        await exchange.start(200, "text/event-stream")
        for index in range(after):
            await exchange.event(exchange.api.partial(exchange.call, index))
        await exchange.body(json.dumps(exchange.api.partial(exchange.call, after)).encode()[:200], more=True)
        raise CutError

    return fault


def held(go: asyncio.Event) -> Fault:
    """A good stream that waits for `go` between its previews and the picture."""

    async def fault(exchange: Exchange) -> None:
        await exchange.start(200, "text/event-stream")
        partials = int(exchange.call.fields["partial_images"])
        for index in range(partials):
            await exchange.event(exchange.api.partial(exchange.call, index))
        await go.wait()
        await exchange.event(exchange.api.completed(exchange.call, partials))
        await exchange.body(b"")

    return fault


def previews(count: int) -> Fault:
    """A good stream with that many previews, however many were asked for."""

    async def fault(exchange: Exchange) -> None:
        await exchange.start(200, "text/event-stream")
        for index in range(count):
            await exchange.event(exchange.api.partial(exchange.call, index))
        await exchange.event(exchange.api.completed(exchange.call, count))
        await exchange.body(b"")

    return fault


def silent_end() -> Fault:
    """A stream that ends in good order, but without a picture."""

    async def fault(exchange: Exchange) -> None:
        await exchange.start(200, "text/event-stream")
        await exchange.event(exchange.api.partial(exchange.call, 0))
        await exchange.body(b"data: [DONE]\n\n")

    return fault


def hang() -> Fault:
    """Never answers."""

    async def fault(exchange: Exchange) -> None:
        await asyncio.Event().wait()

    return fault


def redirect(number: int, to: str) -> Fault:
    """A redirect to an address."""

    async def fault(exchange: Exchange) -> None:
        await exchange.start(number, "text/html", location=to)
        await exchange.body(b"")

    return fault


def document(body: bytes, *, content_type: str = "application/json") -> Fault:
    """Any body with status 200."""

    async def fault(exchange: Exchange) -> None:
        await exchange.start(200, content_type)
        await exchange.body(body)

    return fault


async def _read(request: Request) -> Call:
    headers = dict(request.headers)
    if not headers.get("content-type", "").startswith("multipart/form-data"):
        return Call(request.url.path, headers, await request.json())
    call = Call(request.url.path, headers, {})
    async with request.form() as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                call.fields[name] = value.filename
                call.image, call.image_type = await value.read(), value.content_type
            else:
                call.fields[name] = {"true": True, "false": False}.get(value, value)
    return call


def _family(call: Call) -> str:
    return "image_edit" if call.path.endswith("edits") else "image_generation"


def _drawn(call: Call) -> dict[str, Any]:
    return {
        "created_at": 1,
        "size": call.fields.get("size"),
        "quality": call.fields.get("quality"),
        "background": "opaque",
        "output_format": "png",
    }


def _usage(partials: int) -> dict[str, Any]:
    output = OUTPUT_TOKENS + PARTIAL_TOKENS * partials
    details = {"image_tokens": 0, "text_tokens": 13}
    return {"input_tokens": 13, "input_tokens_details": details, "output_tokens": output, "total_tokens": 13 + output}


def _refusal(call: Call) -> tuple[int, dict[str, Any]] | None:
    if call.headers.get("authorization") != f"Bearer {KEY}":
        return 401, error("Incorrect API key provided: sk-…key.", "invalid_api_key")
    model = call.fields.get("model")
    if model not in (*LIVE, *ENDING):
        notice = " It was shut down, see the deprecations page." if model in RETIRED else ""
        return 404, error(f"The model '{model}' does not exist.{notice}", "model_not_found")
    wrong = _wrong_field(call, str(model))
    return (400, error(f"Invalid value: '{wrong}'.", "invalid_value", wrong)) if wrong else None


def _wrong_field(call: Call, model: str) -> str | None:
    fields, edit = call.fields, call.path.endswith("edits")
    checks = {
        "path": call.path in ("/v1/images/generations", "/v1/images/edits"),
        "prompt": isinstance(fields.get("prompt"), str) and 1 <= len(fields["prompt"]) <= 32_000,
        "response_format": "response_format" not in fields,
        "size": has_size(model, str(fields.get("size", "auto"))),
        "quality": fields.get("quality", "auto") in qualities(model),
        "partial_images": "partial_images" not in fields
        or (fields.get("stream") is True and 0 <= int(fields["partial_images"]) <= 3),
        "image": not edit or (call.image is not None and call.image_type in IMAGE_TYPES),
    }
    unknown = sorted(set(fields) - (EDIT_FIELDS if edit else FIELDS))
    return next((name for name, good in checks.items() if not good), unknown[0] if unknown else None)


def qualities(model: str) -> set[str]:
    """Those that the model knows."""
    newest = model.startswith(("gpt-image-2.5", "gpt-image-2.6"))
    return {"low", "medium", "high", "auto"} | ({"xhigh", "max"} if newest else set())


def has_size(model: str, size: str) -> bool:
    """Whether the model draws that size."""
    if size in ("auto", "1024x1024", "1536x1024", "1024x1536"):
        return True
    if model in ENDING:
        return False
    width, height = (int(edge) for edge in size.split("x"))
    return (
        width % 16 == height % 16 == 0
        and max(width, height) <= min(3840, 3 * min(width, height))
        and 655_360 <= width * height <= 8_294_400
    )


def error(message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The error object of a request that is not good."""
    return {"message": message, "type": "invalid_request_error", "param": param, "code": code}
