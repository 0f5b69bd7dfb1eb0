"""The Gemini API by the official SDK: one call of `generateContent`, its pictures streamed to disk.

The SDK keeps an answer in memory several times over. So pictures are taken out of it while it comes in, before the SDK
gets to see it; what it reads has only their numbers.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from google import genai
from google.genai.errors import APIError
from google.genai.types import (
    Blob,
    Content,
    GenerateContentConfig,
    GenerateContentResponse,
    HttpOptions,
    HttpRetryOptions,
    Part,
)
from pydantic import SecretStr

from daemon.errors import Refused
from daemon.providers import Generated, Reporter, Request
from daemon.providers.base64_stream import Base64Stream, BrokenImage
from daemon.providers.google_answer import read, spoken
from daemon.providers.google_errors import GOOGLE, translate
from daemon.providers.google_models import MODELS
from daemon.providers.google_request import ContentCall, build
from daemon.providers.google_turn import LARGEST_FILE, TooLargeError, Turn, keep, recall
from daemon.providers.vendor import BROKEN

_BASE_URL = "https://generativelanguage.googleapis.com/"
_CONNECT_SECONDS = 10.0
_MAX_REST = 16_000_000
"""Bytes of an answer that are not image: thought signatures can be large. More is no answer of this API."""
_LARGEST_INPUT = 15_000_000
"""Bytes of a previous image: encoded it makes the 20 MB that a request may have."""
_LARGE_INPUT = 4_000_000
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MISREAD = (ValueError, TypeError, AttributeError)
"""What the SDK raises over an answer of another shape."""
_images: ContextVar[Base64Stream] = ContextVar("images")
"""Where the pictures of the present call go."""


class GoogleImages:
    """Makes and refines pictures with Google's image models.

    Args:
        api_key: Sent to `base_url` and nowhere else.
        base_url: Another server that speaks this API; None for Google itself.
        timeout: Longest silence of the server.
        max_bytes: Largest image that is accepted.
    """

    models = MODELS
    largest_context = LARGEST_FILE

    def __init__(self, api_key: SecretStr, *, base_url: str | None, timeout: timedelta, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # A large image that is sent lies in the SDK's memory several times, as long as the call takes: two at a time.
        self._large_inputs = asyncio.Semaphore(2)
        # A client of our own, for three reasons: the hooks; no redirects, which would take the key along; and never
        # aiohttp, which the SDK prefers where it is installed, and by which it sends a request again in secret.
        self._http = httpx2.AsyncClient(
            headers={"accept-encoding": "identity"},
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
            event_hooks={"request": [_connect_soon], "response": [_take_images_out]},
        )
        self._client = genai.Client(
            vertexai=False,
            api_key=api_key.get_secret_value().strip(),
            http_options=HttpOptions(
                base_url=base_url or _BASE_URL,
                api_version="v1",
                timeout=round(1000 * timeout.total_seconds()),
                retry_options=HttpRetryOptions(attempts=1),  # one picture could be paid for five times
                httpx_async_client=self._http,
            ),
        )

    async def aclose(self) -> None:
        """Lets go of connections."""
        await self._client.aio.aclose()
        self._client.close()
        await self._http.aclose()

    async def generate(self, request: Request, report: Reporter) -> Generated:
        """Makes the picture, or refines the previous one."""
        if not _NAME.fullmatch(request.model):  # it becomes part of the URL
            raise GOOGLE.no_model(request.model[:80], {})
        call = build(request, report.warning)
        if call.image_bytes > _LARGEST_INPUT:
            raise GOOGLE.too_large({"bytes": call.image_bytes})
        with Base64Stream(request.workdir, max_bytes=self._max_bytes, key="data") as images:
            response = await self._converse(call, request.previous_context, images, report)
            made = read(response, images.files, call)
        context = await self._kept(response, made.path, call, request.workdir / "turn.json", report)
        return replace(made, context=context)

    async def _converse(
        self, call: ContentCall, context: Path | None, images: Base64Stream, report: Reporter
    ) -> GenerateContentResponse:
        """Asks, with the turn before where it is known. A turn that Google does not take is left out: it has refused the
        whole request then, and nothing was made or paid."""
        async with self._room(call.image_bytes + _size(context)):
            before = await self._recalled(call, context, report)
            if before is not None:
                try:
                    return await self._submit(call, before, images, report)
                except Refused as error:
                    if "signature" not in error.message.lower():
                        raise
                    report.warning(
                        f"The image is refined without the conversation that made it: {error.message}",
                        field="previousImage",
                    )
            return await self._submit(call, None, images, report)

    async def _recalled(self, call: ContentCall, context: Path | None, report: Reporter) -> Turn | None:
        if context is None or call.image is None:
            return None
        before = await asyncio.to_thread(recall, context, model=call.model, picture=call.image)
        if before is not None and call.image_bytes + before.bytes > _LARGEST_INPUT:
            what = "with its signatures, the request would be too large."
            report.warning(f"The image is refined without the conversation that made it: {what}", field="previousImage")
            return None
        return before

    async def _submit(
        self, call: ContentCall, before: Turn | None, images: Base64Stream, report: Reporter
    ) -> GenerateContentResponse:
        contents = await asyncio.to_thread(_contents, call, before)
        report.submitted(call.described(before), estimate=call.estimate)
        report.progress(5, "Google is drawing")
        return await self._ask(call, contents, images)

    async def _kept(
        self, response: GenerateContentResponse, picture: Path, call: ContentCall, to: Path, report: Reporter
    ) -> Path | None:
        """Writes this turn down for the next one. The picture is paid for, so nothing depends on it."""
        turn = partial(keep, spoken(response), model=call.model, asked=call.text, picture=picture, to=to)
        try:
            return await asyncio.to_thread(turn)
        except TooLargeError:
            reason = "its signatures are too large."
        except OSError as error:
            reason = f"{error.strerror}."
        report.warning(f"The conversation that made the image is not kept: {reason}", field="context")
        return None

    @asynccontextmanager
    async def _room(self, size: int) -> AsyncGenerator[None]:
        if size <= _LARGE_INPUT:
            yield
            return
        async with self._large_inputs:
            yield

    async def _ask(
        self, call: ContentCall, contents: Sequence[Content], images: Base64Stream
    ) -> GenerateContentResponse:
        config = GenerateContentConfig.model_validate(call.config())
        config.automatic_continuation = False  # it would send, and pay for, more requests than we know of
        token = _images.set(images)
        try:
            return await self._client.aio.models.generate_content(
                model=call.model, contents=list(contents), config=config
            )
        except APIError as error:
            raise translate(error, call.model) from error
        except BROKEN as error:
            raise GOOGLE.broken(error) from error
        except BrokenImage as error:
            raise GOOGLE.unknown(f"Google's answer is damaged: {error}") from error
        except _MISREAD as error:
            raise GOOGLE.unknown("Google's answer cannot be read.") from error
        finally:
            _images.reset(token)


def _size(file: Path | None) -> int:
    return 0 if file is None else file.stat().st_size


def _contents(call: ContentCall, before: Turn | None) -> list[Content]:
    image = Blob(data=call.image.read_bytes(), mime_type=call.image_type) if call.image is not None else None
    asked = [Part(text=call.text)]
    if before is None:
        return [Content(parts=asked if image is None else [*asked, Part(inline_data=image)], role="user")]
    answered = [
        Part(text=said.text, thought_signature=said.signature)
        if said.text is not None
        else Part(inline_data=image, thought_signature=said.signature)
        for said in before.answered
    ]
    return [
        Content(parts=[Part(text=before.asked)], role="user"),
        Content(parts=answered, role="model"),
        Content(parts=asked, role="user"),
    ]


async def _connect_soon(request: httpx2.Request) -> None:
    """The SDK has one timeout for everything: waiting for a connection must not take as long as drawing."""
    timeout: dict[str, Any] = request.extensions["timeout"]
    request.extensions["timeout"] = {**timeout, "connect": _CONNECT_SECONDS, "pool": _CONNECT_SECONDS}


async def _take_images_out(response: httpx2.Response) -> None:
    """Reads a good answer, puts its pictures into files and the rest where the SDK looks for the whole."""
    if response.status_code != 200 or not isinstance(response.stream, httpx2.AsyncByteStream):
        return
    if response.headers.get("content-encoding", "identity") != "identity":
        raise GOOGLE.unknown("Google's answer is compressed, which was not asked for.")
    images = _images.get()
    rest = bytearray()
    async for chunk in response.stream:
        rest += images.feed(chunk)
        if len(rest) > _MAX_REST:
            raise GOOGLE.unknown("Google's answer is not one of the Gemini API.")
    rest += images.finish()
    await response.stream.aclose()
    if not rest.lstrip().startswith(b"{"):  # the SDK would take it for an answer without a picture
        raise GOOGLE.unknown("Google's answer is not one of the Gemini API.")
    response.stream = httpx2.ByteStream(bytes(rest))
