"""Read the body of a response while it is received: a picture, a JSON document, or a stream of events.

Its first bytes say which it is, not its Content-Type. Memory stays small whatever comes: pictures and long texts go to disk.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from daemon.fetch.encodings import undone
from daemon.magic import ENOUGH, image_type, is_text
from daemon.providers.base64_stream import ImageTooLarge
from daemon.providers.event_stream import Document, EventStream
from daemon.providers.lenient import NotJson
from daemon.providers.spool import JsonStream, Spool

_MOST_BLANK = 4096
_MARK = b"\xef\xbb\xbf"
_JSON = re.compile(rb'[{["]|null|true|false|-?[0-9]')
_EVENTS = re.compile(rb"(?:data|event|id|retry)[:\r\n]|:")


class NotUnderstood(Exception):
    """A body is none of the kinds we read: a page, a message."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The whole body is a picture, in a file."""

    path: Path


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The whole body is neither text nor a picture that we take. It is in a file."""

    path: Path


Part = Document | Picture | Unreadable


async def read_body(chunks: AsyncIterator[bytes], spool: Spool) -> AsyncGenerator[Part]:
    """Yield what a body consists of: nothing for an empty one, many documents for a stream of events, else one part.

    A document that is complete is yielded also where the body breaks off behind it; the error comes after it.

    Args:
        chunks: As they come from the network, compressed or not.
        spool: Takes pictures and long texts.

    Raises:
        NotUnderstood: If it is something else, or breaks off as a text.
        TooMuch: If it is larger than any response to our requests.
        ImageTooLarge: If the picture is too large.
        OSError: For trouble with the disk.
        Exception: Those of `chunks`.
    """
    async with aclosing(undone(chunks)) as plain:
        head = b""
        kind = None
        async for chunk in plain:
            head += chunk
            if (kind := _kind(head, whole=False)) is not None:
                break
        kind = kind or _kind(head, whole=True)
        if kind is None:
            return
        body = _chained(head, plain)
        if kind == "json":
            yield await _read_json(body, spool)
        elif kind == "events":
            async for document in _read_events(body, spool):
                yield document
        elif kind == "picture":
            yield Picture(await _save(body, spool))
        elif kind == "bytes":
            yield Unreadable(await _save(body, spool))
        else:
            raise NotUnderstood


def _kind(head: bytes, *, whole: bool) -> str | None:
    """Return what a body is by its beginning; None while more is needed, and for an empty one."""
    if image_type(head) is not None and (whole or len(head) >= ENOUGH):
        return "picture"
    text = head.removeprefix(_MARK).lstrip()
    if not text:
        return "text" if len(head) > _MOST_BLANK else None
    if _JSON.match(text):
        return "json"
    if _EVENTS.match(text):
        return "events"
    if len(head) < ENOUGH and not whole:
        return None
    return "text" if is_text(head[:1024]) else "bytes"


async def _chained(head: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield head
    async for chunk in rest:
        yield chunk


async def _read_json(body: AsyncIterator[bytes], spool: Spool) -> Document:
    stream = JsonStream(spool)
    broken: Exception | None = None
    try:
        try:
            async for chunk in body:
                stream.feed(chunk)
        except Exception as error:  # noqa: BLE001 - it is raised below, unless the document is complete without more
            broken = error
        try:
            return Document(stream.finish())
        except NotJson:
            if broken is None:
                raise NotUnderstood from None
            raise broken from None
    finally:
        stream.close()


async def _save(body: AsyncIterator[bytes], spool: Spool) -> Path:
    path, size = spool.new_path(), 0
    with path.open("wb") as file:
        async for chunk in body:
            size += len(chunk)
            if size > spool.max_bytes:
                raise ImageTooLarge
            file.write(chunk)
    return path


async def _read_events(body: AsyncIterator[bytes], spool: Spool) -> AsyncGenerator[Document]:
    events = EventStream(spool)
    broken: Exception | None = None
    try:
        try:
            async for chunk in body:
                for document in events.feed(chunk):
                    yield document
        except Exception as error:  # noqa: BLE001 - it is raised below, after what is complete
            broken = error
        if (last := events.finish()) is not None:
            yield last
        if broken is not None:
            raise broken
    finally:
        events.close()
