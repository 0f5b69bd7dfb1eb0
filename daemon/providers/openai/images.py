"""The Images API by the official SDK: one call, streamed to disk, with previews where the model gives them."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx2
from openai import AsyncOpenAI, BadRequestError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_incrementing

from daemon.errors import Refused, Retryable
from daemon.fetch import Fetcher
from daemon.providers import Generated, Reporter, Request
from daemon.providers.base64_stream import Base64Stream, BrokenImage, EventStream
from daemon.providers.openai_answer import expect_object, parse, read_document
from daemon.providers.openai_errors import BROKEN, OPENAI, reported, translate
from daemon.providers.openai_models import settle
from daemon.providers.openai_request import PREVIEWS, ImagesCall, build

_DOWNLOAD_TIMEOUT = timedelta(seconds=60)
_STREAM_FIELDS = ("stream", "partial_images")


@dataclass(slots=True)
class _Answer:
    """What was in the body. `image` is a file; servers that give a `url` leave it None."""

    image: Path | None = None
    url: str | None = None
    revised_prompt: str | None = None
    usage: Mapping[str, Any] | None = None
    request_id: str | None = None


class OpenAIImages:
    """Makes and edits pictures with OpenAI, or with a server that speaks its Images API.

    Args:
        client: Speaks to that server.
        fetcher: Fetches pictures that it only points to.
        max_bytes: Largest image that is accepted.
    """

    def __init__(self, client: AsyncOpenAI, fetcher: Fetcher, *, max_bytes: int) -> None:
        self._client = client
        self._fetcher = fetcher
        self._max_bytes = max_bytes

    async def generate(self, request: Request, report: Reporter) -> Generated:
        """Makes the picture, or edits the previous one."""
        call = build(request, report.warning)
        report.submitted(call.described(), estimate=call.estimate)
        try:
            answer = await self._ask(call, request, report)
        except BadRequestError as error:
            if not (call.streams and error.param in _STREAM_FIELDS):
                raise translate(error, request.model) from error
            # Nothing was made and nothing paid: some accounts and servers may draw, but not stream.
            report.warning(f"No previews: {error.message}"[:300], field="stream", feature="unsupported")
            try:
                answer = await self._ask(call.without_stream(), request, report)
            except BROKEN as again:
                raise translate(again, request.model) from again
        except BROKEN as error:
            raise translate(error, request.model) from error
        return await self._finish(answer, request)

    async def _ask(self, call: ImagesCall, request: Request, report: Reporter) -> _Answer:
        with Base64Stream(request.workdir, max_bytes=self._max_bytes) as images:
            async with self._send(call) as response:
                report.progress(5, "OpenAI is drawing")
                try:
                    if response.headers.get("content-type", "").startswith("text/event-stream"):
                        answer = await _read_events(response.aiter_bytes(), images, request.model, report)
                    else:
                        answer = await _read_json(response.aiter_bytes(), images, request.model)
                except BrokenImage as error:
                    raise OPENAI.unknown(f"OpenAI's answer is damaged: {error}") from error
                answer.request_id = response.headers.get("x-request-id")
                return answer

    @asynccontextmanager
    async def _send(self, call: ImagesCall) -> AsyncGenerator[httpx2.Response, None]:
        images: Any = self._client.images.with_streaming_response  # typed overloads do not take **fields
        drawing = call.drawing
        if drawing.image is None:
            async with images.generate(**call.fields) as response:
                yield response.http_response
            return
        with drawing.image.open("rb") as file:
            image = (f"image.{drawing.image_type.removeprefix('image/')}", file, drawing.image_type)
            async with images.edit(image=image, **call.fields) as response:
                yield response.http_response

    async def _finish(self, answer: _Answer, request: Request) -> Generated:
        cost = settle(request.model, answer.usage)
        data = {"request_id": answer.request_id, "usage": answer.usage}
        data = {key: value for key, value in data.items() if value is not None}
        path = answer.image
        if path is None and answer.url is not None:
            path = request.workdir / "image-0"
            await self._download(answer.url, path, cost, data)
        if path is None or path.stat().st_size == 0:
            raise OPENAI.empty(data, cost=cost)
        return Generated(path, cost, answer.revised_prompt, answer.url, data)

    async def _download(self, url: str, path: Path, cost: float | None, data: dict[str, Any]) -> None:
        """Fetches a picture that a compatible server only points to. Never a reason to have it made again."""
        persistently = AsyncRetrying(
            stop=stop_after_attempt(3),
            wait=wait_incrementing(start=1, increment=1),
            retry=retry_if_exception_type(Retryable),
            reraise=True,
        )
        try:
            await persistently(
                self._fetcher.fetch, url, path, max_bytes=self._max_bytes, timeout=_DOWNLOAD_TIMEOUT, what="it"
            )
        except (Refused, Retryable) as error:
            raise Refused(
                f"The picture was made, but not handed over. {error.message}",
                code="download",
                hint="Requeueing makes a new one.",
                data={**data, "url": url.partition("?")[0][:2000]},
                cost=cost,
            ) from error


async def _read_json(chunks: AsyncIterator[bytes], images: Base64Stream, model: str) -> _Answer:
    document = await read_document(chunks, images)
    _raise_reported(document, model)
    items = cast("list[object]", document.get("data") or [{}])
    return _answer(expect_object(items[0]), document.get("usage"), images)


async def _read_events(chunks: AsyncIterator[bytes], images: Base64Stream, model: str, report: Reporter) -> _Answer:
    events = EventStream()
    previews = 0
    async for chunk in chunks:
        for text in events.feed(images.feed(chunk)):
            if text.startswith(b"[DONE]"):
                continue
            event = parse(text)
            _raise_reported(event, model)
            answer = _answer(event, event.get("usage"), images)
            if str(event.get("type")).endswith(".completed"):
                return answer
            if answer.image is not None:
                previews += 1
                report.progress(100 * previews / (PREVIEWS + 1), f"Preview {previews}")
                report.preview(answer.image)
    raise OPENAI.unknown("OpenAI's answer broke off before the picture was complete.")


def _answer(item: Mapping[str, Any], usage: Any, images: Base64Stream) -> _Answer:
    number, url, revised = item.get("b64_json"), item.get("url"), item.get("revised_prompt")
    return _Answer(
        image=images.files[int(number)] if number is not None else None,
        url=url if isinstance(url, str) else None,
        revised_prompt=revised if isinstance(revised, str) else None,
        usage=expect_object(usage) if usage is not None else None,
    )


def _raise_reported(document: Mapping[str, Any], model: str) -> None:
    if error := document.get("error"):
        raise reported(error, model)
