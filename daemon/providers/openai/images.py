"""Call the Images API by the official SDK: one call, streamed to disk, with previews where the model has them."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import httpx2
from openai import AsyncOpenAI, BadRequestError
from pydantic import Field

from daemon.fetch.client import Fetcher
from daemon.providers import Generated, Reporter, Request
from daemon.providers.base64_stream import ImageTooLarge
from daemon.providers.body import NotUnderstood, Part, Picture, Unreadable, read_body
from daemon.providers.event_stream import Document
from daemon.providers.lenient import Encoded, Lenient, Name, Objects, Text, counted, texts_in
from daemon.providers.openai.downloads import download
from daemon.providers.openai.errors import CALL_ERRORS, OPENAI, reported, translate
from daemon.providers.openai.models import settle
from daemon.providers.openai.request import PREVIEWS, ImagesCall, build
from daemon.providers.pictures import NotAPicture, is_url, save_picture
from daemon.providers.salvage import is_failed, salvage
from daemon.providers.sending import Sending
from daemon.providers.spool import Spool, TooMuch
from daemon.providers.words import readable

_STREAM_FIELDS = ("stream", "partial_images")
_PARTIAL = "partial_image"
_COMPLETED = ".completed"
_FIELDS = {"data", "b64_json", "url", "usage", "created", "created_at", "type", "error", "detail"}


class _Item(Lenient):
    """A picture of a response, or of an event. Some servers have the picture itself in `url`, or its address in `b64_json`."""

    b64_json: Encoded = None
    url: Encoded = None
    revised_prompt: Text = None

    @property
    def spellings(self) -> tuple[str, ...]:
        """The texts that may be the picture, or its address; an empty one is none."""
        return tuple(text for text in (self.b64_json, self.url) if text)


class _Body(_Item):
    """A response, or an event of a stream."""

    type: Text = None
    quality: Name = None
    data: Objects[_Item] = Field(default_factory=list)

    @property
    def items(self) -> tuple[_Item, ...]:
        """All pictures in it."""
        return (*self.data, self)


@dataclass(frozen=True, slots=True)
class _Result:
    """The fields of a response. `image` is a file; None where a server returns a `url`, or nothing."""

    image: Path | None = None
    url: str | None = None
    revised_prompt: str | None = None
    usage: object = None
    undecodable: Path | None = None
    """A file with what is no picture, in the place of one."""
    reason: str = ""
    quality: str | None = None

    @property
    def has_picture(self) -> bool:
        """Whether there is a picture, its address, or what cannot be decoded: all of them are paid for."""
        return self.image is not None or self.url is not None or self.undecodable is not None


class OpenAIImages:
    """Generate and edit images with OpenAI, or with a server that has its Images API.

    Args:
        client: Connects to that server.
        fetcher: Fetches images that the server returns as a URL.
        download_deadline: How long such an image is asked for again.
        max_bytes: Largest image that is accepted.
    """

    def __init__(self, client: AsyncOpenAI, fetcher: Fetcher, *, download_deadline: timedelta, max_bytes: int) -> None:
        self._client = client
        self._fetcher = fetcher
        self._download_deadline = download_deadline
        self._max_bytes = max_bytes

    async def generate(self, request: Request, report: Reporter) -> Generated:
        """Generate an image, or edit the previous one. Raises `RunError`."""
        call = build(request, report.warning)
        while True:
            sending = Sending(
                partial(report.submitted, call.described(), estimate=call.estimate),
                has_image=call.drawing.image is not None,
            )
            with OPENAI.guard(sending), sending.in_sdk():
                try:
                    return await self._call(call, request, report)
                except CALL_ERRORS as error:
                    if not (isinstance(error, BadRequestError) and call.streams and error.param in _STREAM_FIELDS):
                        raise translate(error, request.model, sent=sending.sent) from error
                    # Nothing was generated and nothing paid: some accounts and servers may draw, but not stream.
                    report.warning(
                        f"No previews: {readable(error.message, 300)}", field="stream", feature="unsupported"
                    )
            call = call.without_stream()

    async def _call(self, call: ImagesCall, request: Request, report: Reporter) -> Generated:
        spool = Spool(request.workdir, max_bytes=self._max_bytes)
        async with self._send(call) as response:
            report.progress(5, "OpenAI is drawing")
            facts = {"request_id": response.headers.get("x-request-id")}
            try:
                result = await _read(response, spool, request.model, report)
            except ImageTooLarge as error:
                raise OPENAI.too_large_picture(self._max_bytes, facts) from error
            except TooMuch as error:
                raise OPENAI.unknown("OpenAI's answer is larger than one of OpenAI's can be.", **facts) from error
            except NotUnderstood as error:
                raise OPENAI.unknown("OpenAI's answer cannot be read.", **facts) from error
        made = await self._finish(result, request, facts)
        return replace(made, quality=result.quality or call.drawing.quality)

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

    async def _finish(self, result: _Result, request: Request, facts: Mapping[str, Any]) -> Generated:
        usage = counted(result.usage)
        cost = settle(request.model, result.usage)
        data = {name: value for name, value in {**facts, "usage": usage}.items() if value is not None}
        if result.image is not None:
            return Generated(result.image, cost, result.revised_prompt, data=data)
        if result.undecodable is not None:
            raise OPENAI.undecodable(result.undecodable, data, cost=cost)
        if result.url is None:
            raise OPENAI.empty(data, reason=result.reason, cost=cost, charged=usage is not None)
        path = request.workdir / "image-0"
        await download(self._fetcher, result.url, path, self._max_bytes, self._download_deadline, cost=cost, data=data)
        return Generated(path, cost, result.revised_prompt, result.url, data)


async def _read(  # noqa: C901 - the kinds of parts
    response: httpx2.Response, spool: Spool, model: str, report: Reporter
) -> _Result:
    """Read a response: JSON, a stream of events, or the picture itself.

    A stream need not end as it should: what came as a picture counts, whatever the type of its event.

    Raises:
        RunError: If it is an error, or breaks off.
    """
    last = _Result()
    previews = 0
    try:
        async with aclosing(read_body(response.aiter_raw(), spool)) as parts:
            async for part in _each(parts):
                match part:
                    case Picture(path):
                        return _Result(path)
                    case Unreadable(path):
                        return _Result(undecodable=path)
                    case Document(event=str()) if part.fields is None:
                        found = await salvage(part.value, spool)
                        last = last if found is None else _Result(found.image, found.url, undecodable=found.undecodable)
                    case _ if _PARTIAL in (kind := _Body.read(part.value).type or part.event or ""):
                        previews += await _preview(part, spool, previews, report)
                        spool.drop(text for _, text in texts_in(part.value))
                    case Document(event=None):
                        return await _result(part, spool, model)
                    case _:
                        found = await _result(part, spool, model)
                        last = found if found.has_picture else replace(last, usage=found.usage or last.usage)
                        if kind.endswith(_COMPLETED):
                            return last
    except (*CALL_ERRORS, NotUnderstood, TooMuch):
        if not last.has_picture:
            raise
    if not last.has_picture:
        raise OPENAI.unknown("OpenAI's answer broke off before the picture was complete.")
    return last


async def _each(parts: AsyncIterator[Part]) -> AsyncIterator[Part]:
    """Yield the parts of a body. A list of responses stands for a stream of them."""
    async for part in parts:
        for each in part.unwrapped() if isinstance(part, Document) else [part]:
            yield each


async def _result(document: Document, spool: Spool, model: str) -> _Result:
    """Find the picture of a document: the first that can be read, else the first address; else one in a field that is not known."""
    fields, body = document.fields or {}, _Body.read(document.value)
    if is_failed(document.value):
        body = body.model_copy(update={"url": None})  # that of a page about the error
    result = await _known(body, fields.get("usage"), spool)
    if not result.has_picture and (found := await salvage(document.value, spool)) is not None:
        return replace(result, image=found.image, url=found.url, undecodable=found.undecodable)
    if result.has_picture:
        return result
    if not is_response(document.fields):
        raise OPENAI.unknown("OpenAI's answer has another shape than it should.")
    if error := fields.get("error") or fields.get("detail"):
        failure = reported(error, model)
        failure.charged = failure.charged or counted(result.usage) is not None
        failure.cost = settle(model, result.usage)
        raise failure
    return result


async def _known(body: _Body, usage: object, spool: Spool) -> _Result:
    """Find the picture in the fields of this API."""
    result = _Result(usage=usage, quality=body.quality)
    for item in body.items:
        result = replace(result, revised_prompt=result.revised_prompt or item.revised_prompt)
        for text in item.spellings:
            if is_url(text) and text not in spool:
                result = replace(result, url=result.url or text.strip())
                continue
            try:
                image = await save_picture(text, spool)
            except NotAPicture as error:
                if error.path.stat().st_size:
                    result = replace(result, undecodable=result.undecodable or error.path)
            else:
                return replace(result, image=image, url=None)
    return replace(result, undecodable=None if result.url else result.undecodable)


def is_response(fields: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a document is a response of this API: an empty one, or one with a field of it that has its type."""
    if fields is None or not isinstance(fields.get("data", []), list | dict):
        return False
    return not fields or not _FIELDS.isdisjoint(fields)


async def _preview(document: Document, spool: Spool, previews: int, report: Reporter) -> int:
    """Publish the picture of an event that is not the last, and return how many that were: nothing depends on it."""
    for text in _Body.read(document.value).spellings:
        try:
            image = await save_picture(text, spool)
        except (NotAPicture, ImageTooLarge):
            continue
        report.progress(100 * (previews + 1) / (PREVIEWS + 1), f"Preview {previews + 1}")
        report.preview(image)
        return 1
    return 0
