"""Call the Gemini API by the official SDK: one `generateContent`, its images streamed to disk.

The SDK keeps a response in memory several times over, and understands one spelling of it. So it only sends: the response is
read while it is received, before the SDK sees it.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx2
from google import genai
from google.genai.errors import APIError
from google.genai.types import (
    Blob,
    Content,
    GenerateContentConfig,
    HttpOptions,
    HttpRetryOptions,
)
from google.genai.types import Part as SentPart
from pydantic import SecretStr

from daemon.errors import Refused, Retryable
from daemon.http_clients import client2, unused_client2
from daemon.providers import Generated, Reporter, Request
from daemon.providers.body import NotUnderstood, Part, Picture, Unreadable, read_body
from daemon.providers.error_body import read_error
from daemon.providers.errors import TRANSPORT_ERRORS
from daemon.providers.event_stream import Document
from daemon.providers.google.conversation import MAX_FILE_BYTES, Conversation, TooLargeError, load, save
from daemon.providers.google.errors import GOOGLE, translate
from daemon.providers.google.models import MODELS
from daemon.providers.google.request import ContentCall, build
from daemon.providers.google.response import ContentResponse, conversation_parts, is_response, merge, read
from daemon.providers.sending import Sending, follow, replace_body
from daemon.providers.spool import Spool, TooMuch

_BASE_HOST = "googleapis.com"
_BASE_URL = f"https://generativelanguage.{_BASE_HOST}/"
_CONNECT_SECONDS = 10.0
_MAX_INPUT = 15_000_000
"""Bytes of a previous image: encoded it makes the 20 MB that a request may have."""
_LARGE_INPUT = 4_000_000
_MOST_PARTS = 1000
"""Responses of a stream, of which there are a few."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_exchange: ContextVar["_Exchange"] = ContextVar("exchange")
"""Of the present call."""


class GoogleImages:
    """Generate and refine images with Google's image models.

    Args:
        api_key: Sent to `base_url` and nowhere else.
        base_url: Another server with the same API; None for Google itself.
        timeout: Longest silence of the server.
        max_bytes: Largest image that is accepted.
    """

    models = MODELS
    max_conversation_bytes = MAX_FILE_BYTES

    def __init__(self, api_key: SecretStr, *, base_url: str | None, timeout: timedelta, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._key = api_key.get_secret_value().strip()
        self._base_url = base_url or _BASE_URL
        self._foreign = base_url is not None and _BASE_HOST not in base_url
        # A large image that is sent lies in the SDK's memory several times, as long as the call takes: two at a time.
        self._large_inputs = anyio.CapacityLimiter(2)
        # A client of our own, for three reasons: the hooks; no redirects, which would take the key along; and never
        # aiohttp, which the SDK prefers where it is installed, and by which it sends a request again in secret.
        self._http = client2(
            headers={"accept-encoding": "identity"},
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
            event_hooks={"request": [_limit_connect_time, follow], "response": [_receive]},
        )
        self._unused = unused_client2()
        self._client = genai.Client(
            vertexai=False,
            api_key=self._key,
            http_options=HttpOptions(
                base_url=self._base_url,
                api_version="v1",
                timeout=round(1000 * timeout.total_seconds()),
                retry_options=HttpRetryOptions(attempts=1),  # one picture could be paid for five times
                httpx_client=self._unused,
                httpx_async_client=self._http,
            ),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aio.aclose()
        self._client.close()
        self._unused.close()
        await self._http.aclose()

    async def check_key(self) -> None:
        """List one model, which is free. The SDK's client is made for pictures, so this is sent beside it."""
        url = f"{self._base_url.rstrip('/')}/v1/models?pageSize=1"
        try:
            async with client2(timeout=_CONNECT_SECONDS) as http:
                response = await http.get(url, headers={"x-goog-api-key": self._key})
        except TRANSPORT_ERRORS as error:
            raise GOOGLE.transport_error(error) from error
        if response.status_code != 200:
            raise translate(response.status_code, response.headers, response.content, "", foreign=self._foreign)

    async def generate(self, request: Request, report: Reporter) -> Generated:
        """Generate an image, or refine the previous one. Raises `RunError`."""
        if not _NAME.fullmatch(request.model):  # it becomes part of the URL
            raise GOOGLE.no_model(request.model[:80], {})
        call = build(request, report.warning)
        if call.image_bytes > _MAX_INPUT:
            raise GOOGLE.too_large({"bytes": call.image_bytes})
        spool = Spool(request.workdir, max_bytes=self._max_bytes)
        response, generated = await self._converse(call, request.previous_conversation, spool, report)
        conversation = await self._save_conversation(response, spool, generated.path, call, report)
        return replace(generated, conversation=conversation)

    @asynccontextmanager
    async def permit(self, request: Request) -> AsyncGenerator[None]:
        """Let large inputs go two at a time."""
        if _size(request.previous_image) + _size(request.previous_conversation) <= _LARGE_INPUT:
            yield
            return
        async with self._large_inputs:
            yield

    async def _converse(
        self, call: ContentCall, file: Path | None, spool: Spool, report: Reporter
    ) -> tuple[ContentResponse, Generated]:
        """Call the API with the previous conversation, if there is one. Where Google refuses its signatures, call without:
        the whole request was refused then, and nothing was generated or paid."""
        previous = await self._load_conversation(call, file, report)
        if previous is not None:
            try:
                return await self._submit(call, previous, spool, report)
            except Refused as error:
                if "signature" not in error.message.lower():
                    raise
                report.warning(
                    f"The image is refined without the conversation that made it: {error.message}",
                    field="previousImage",
                )
        return await self._submit(call, None, spool, report)

    async def _load_conversation(self, call: ContentCall, file: Path | None, report: Reporter) -> Conversation | None:
        if file is None or call.image is None:
            return None
        previous = await asyncio.to_thread(load, file, model=call.model, image=call.image)
        if previous is not None and call.image_bytes + previous.signature_bytes > _MAX_INPUT:
            what = "with its signatures, the request would be too large."
            report.warning(f"The image is refined without the conversation that made it: {what}", field="previousImage")
            return None
        return previous

    async def _save_conversation(
        self, response: ContentResponse, spool: Spool, image: Path, call: ContentCall, report: Reporter
    ) -> Path | None:
        """Save the conversation for a later refinement. Never raises: the image is paid for."""

        def saved() -> Path | None:
            parts = conversation_parts(response, spool)
            return save(parts, model=call.model, prompt=call.text, image=image, to=image.with_name("conversation.json"))

        try:
            return await asyncio.to_thread(saved)
        except TooLargeError:
            reason = "its signatures are too large."
        except OSError as error:
            reason = f"{error.strerror}."
        report.warning(f"The conversation that made the image is not kept: {reason}", field="context")
        return None

    async def _submit(
        self, call: ContentCall, previous: Conversation | None, spool: Spool, report: Reporter
    ) -> tuple[ContentResponse, Generated]:
        contents = await asyncio.to_thread(_contents, call, previous)

        def leaving() -> None:
            report.submitted(call.described(previous), estimate=call.estimate)
            report.progress(5, "Google is drawing")

        exchange = _Exchange(Sending(leaving, has_image=call.image is not None), spool, self._foreign)
        with GOOGLE.guard(exchange.sending):
            await self._send(call, contents, exchange)
            return await exchange.outcome(call)

    async def _send(self, call: ContentCall, contents: Sequence[Content], exchange: "_Exchange") -> None:
        config = GenerateContentConfig.model_validate(call.config())
        config.automatic_continuation = False  # it would send, and pay for, more requests than we know of
        token = _exchange.set(exchange)
        try:
            with exchange.sending.in_sdk():
                await self._client.aio.models.generate_content(model=call.model, contents=list(contents), config=config)
        except APIError as error:
            if exchange.status is None:
                raise GOOGLE.unknown("Google's answer cannot be read.") from error
        except TRANSPORT_ERRORS as error:
            raise GOOGLE.transport_error(error, sent=exchange.sending.sent) from error
        except (NotUnderstood, TooMuch) as error:
            raise GOOGLE.unknown("Google's answer is not one of the Gemini API.") from error
        finally:
            _exchange.reset(token)


@dataclass(slots=True)
class _Exchange:
    """One request and its response, which is read before the SDK sees it."""

    sending: Sending
    spool: Spool
    foreign: bool = False
    """The server is not Google's."""
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    parts: list[Part] = field(default_factory=list["Part"])
    broken: Exception | None = None
    """The body broke off behind `parts`."""
    error: bytes | None = None

    async def outcome(self, call: ContentCall) -> tuple[ContentResponse, Generated]:
        """Return the response and the image in it.

        Raises:
            RunError: If there is none, or the response is none of this API.
        """
        if self.error is not None:
            raise translate(self.status or 0, self.headers, self.error, call.model, foreign=self.foreign)
        for part in self.parts:
            match part:
                case Picture(path):  # Google sends none like this, but there it is
                    return ContentResponse(), Generated(path, call.estimate, seed=call.seed)
                case Unreadable(path):
                    raise GOOGLE.undecodable(path, {})
                case _:
                    continue
        documents = [each.value for part in self.parts if isinstance(part, Document) for each in part.unwrapped()]
        merged = merge(documents)
        response = ContentResponse.read(merged)
        try:
            generated = await read(response, documents, self.spool, call)
        except Retryable as error:  # there is no picture
            if is_response(merged) and self.broken is None:
                raise
            raise GOOGLE.unknown("Google's answer is not one of the Gemini API.") from error
        return response, generated


def _size(file: Path | None) -> int:
    return 0 if file is None else file.stat().st_size


def _contents(call: ContentCall, previous: Conversation | None) -> list[Content]:
    image = Blob(data=call.image.read_bytes(), mime_type=call.image_type) if call.image is not None else None
    prompt = [SentPart(text=call.text)]
    if previous is None:
        return [Content(parts=prompt if image is None else [*prompt, SentPart(inline_data=image)], role="user")]
    response = [
        SentPart(text=part.text, thought_signature=part.signature)
        if part.text is not None
        else SentPart(inline_data=image, thought_signature=part.signature)
        for part in previous.response
    ]
    return [
        Content(parts=[SentPart(text=previous.prompt)], role="user"),
        Content(parts=response, role="model"),
        Content(parts=prompt, role="user"),
    ]


async def _limit_connect_time(request: httpx2.Request) -> None:
    """Limit the time to connect: the SDK has one timeout for everything, and drawing takes longer."""
    timeout: dict[str, Any] = request.extensions["timeout"]
    request.extensions["timeout"] = {**timeout, "connect": _CONNECT_SECONDS, "pool": _CONNECT_SECONDS}


async def _receive(response: httpx2.Response) -> None:
    """Read a response, its images into files; leave nothing to the SDK, which would keep it in memory several times."""
    exchange = _exchange.get()
    exchange.sending.came(response.status_code)
    exchange.status, exchange.headers = response.status_code, response.headers
    if not isinstance(response.stream, httpx2.AsyncByteStream):
        return
    if response.is_success:
        try:
            async with aclosing(read_body(aiter(response.stream), exchange.spool)) as parts:
                async for part in parts:
                    exchange.parts.append(part)
                    if len(exchange.parts) > _MOST_PARTS:
                        exchange.broken = TooMuch()
                        break
        except (*TRANSPORT_ERRORS, NotUnderstood, TooMuch) as error:
            if not exchange.parts:
                raise
            exchange.broken = error
    else:
        exchange.error = await read_error(aiter(response.stream))
    await response.stream.aclose()
    replace_body(response, b"{}")
