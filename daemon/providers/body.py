"""Read the body of a response while it is received: a picture, JSON documents, or a stream of events.

Its first bytes say which it is, not its Content-Type. Memory stays small whatever comes: pictures and long texts go to disk.
What a server, or something in between, has put around it is passed over (a comment, a guard against JSONP, quotation marks, a
multipart form): the picture in it is paid for.
"""

import asyncio
import mmap
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from daemon.fetch.encodings import Broken, in_utf8, undone
from daemon.magic import ENOUGH, image_type, is_text
from daemon.providers.base64_stream import ImageTooLarge
from daemon.providers.event_stream import Document, EventStream
from daemon.providers.lenient import NotJson
from daemon.providers.pictures import NotAPicture, beginnings, find_picture, save_picture
from daemon.providers.salvage import likely_texts
from daemon.providers.spool import LONGEST, JsonStream, Spool, TooMuch, write_inside

_MARK = b"\xef\xbb\xbf"
_JSON = re.compile(rb'[{["]|null|true|false|-?[0-9]')
_URI = b"data:image/"
_EVENTS = re.compile(rb"(?:data|event|id|retry)[:\r\n]|:")
_ENCODED = re.compile(rb"iVBORw0KGgo|/9j/|_9j_|R0lGOD|UklGR|AAAA[A-Za-z0-9+/_-]{2}Z0eXBhdm")
"""How the base64 of a picture begins."""
_OBJECT = re.compile(rb"[{[]")
_DOCUMENT = re.compile(rb'[{]\s*"|\[\s*[{"]')
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<")
_DRAWING = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<[?!][^>]*>\s*)*<svg\b", re.IGNORECASE)
"""SVG, which is a picture that we do not take. A page may have one in it, and does not begin with it."""
_MULTIPART = b"--"
_HEADERS_END = re.compile(rb"\r?\n\r?\n")
_MOST_PARTS = 50
_BLOCK = 1 << 20
_MOST_BLANKS = 1 << 20
"""Bytes of blanks, as signs of life, after which there is no response."""
_MOST_EVENTS = 10_000
"""Events of a stream: pictures, and signs of life for hours."""


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
    """Yield what a body consists of: nothing for an empty one, the documents of a stream, else one part.

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
    count = 0
    async with aclosing(undone(chunks)) as plain, aclosing(_parts(in_utf8(plain), spool, within=False)) as parts:
        try:
            async for part in parts:
                count += 1
                if count > _MOST_EVENTS:
                    raise TooMuch
                yield part
                await asyncio.sleep(0)  # there may be many in what has come
        except Broken as error:
            raise NotUnderstood from error


async def _begin(chunks: AsyncIterator[bytes]) -> tuple[str | None, AsyncIterator[bytes]]:
    """Return what a body is, and the whole of it. Raises `NotUnderstood` for one of endless blanks."""
    head, blanks = b"", 0
    async for chunk in chunks:
        head += chunk
        if not head.removeprefix(_MARK).strip():  # signs of life, until there is more to say
            blanks += len(head)
            head = b""
            if blanks > _MOST_BLANKS:
                raise NotUnderstood
        elif (kind := _kind(head, whole=False)) is not None:
            return kind, _chained(head, chunks)
    return _kind(head, whole=True), _chained(head, chunks)


async def _parts(chunks: AsyncIterator[bytes], spool: Spool, *, within: bool) -> AsyncGenerator[Part]:
    """Yield the parts of a body, or of what was found `within` one."""
    kind, body = await _begin(chunks)
    match kind:
        case None:
            return
        case "picture":
            yield Picture(await _save(body, spool))
        case "bytes":
            yield Unreadable(await _save(body, spool))
        case "encoded":
            yield await _read_encoded(body, spool)
        case "json":
            async for part in _read_json(body, spool, within=within):
                yield part
        case "events":
            async for part in _read_events(body, spool):
                yield part
        case _:
            async for part in _read_text(body, spool):
                yield part


def _kind(head: bytes, *, whole: bool) -> str | None:  # noqa: PLR0911 - a table
    """Return what a body is by its beginning; None while more is needed, and for an empty one."""
    enough = whole or len(head) >= ENOUGH
    if image_type(head) is not None and enough:
        return "picture"
    text = head.removeprefix(_MARK).lstrip()
    if text.startswith(_URI) or (enough and _ENCODED.match(text)):
        return "encoded"
    if not text or (_URI.startswith(text) and not whole):
        return None
    if _JSON.match(text):
        return "json"
    if _EVENTS.match(text):
        return "events"
    if not enough:
        return None
    return "text" if is_text(head[:1024]) or text.startswith(_MULTIPART) else "bytes"


async def _chained(head: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield head
    async for chunk in rest:
        yield chunk


async def _read_json(body: AsyncIterator[bytes], spool: Spool, *, within: bool) -> AsyncGenerator[Part]:
    stream = JsonStream(spool)
    broken: Exception | None = None
    try:
        try:
            async for chunk in body:
                stream.feed(chunk)
        except Exception as error:  # noqa: BLE001 - it is raised below, unless the document is complete without more
            broken = error
        try:
            documents, cut = stream.finish()
        except NotJson:
            if (picture := await _ended_picture(stream, spool)) is None:
                raise (broken or NotUnderstood) from None
            yield picture
            return
    finally:
        stream.close()
    if len(documents) > 1 or cut:
        for document in documents:
            yield Document(document, "")
        if broken is not None or cut:
            raise broken or NotUnderstood
    elif isinstance(documents[0], str) and not within:
        async for part in _read_string(documents[0], spool):
            yield part
    else:
        yield Document(documents[0])


async def _ended_picture(stream: JsonStream, spool: Spool) -> Picture | None:
    """Return the last long picture of a document that breaks off behind it."""
    try:
        document = await asyncio.to_thread(stream.finish_cut)
    except NotJson:
        return None
    for _, text in reversed([*likely_texts(document)]):
        if text not in spool:
            continue
        try:
            return Picture(await save_picture(text, spool))
        except NotAPicture:
            continue
    return None


async def _read_string(value: str, spool: Spool) -> AsyncGenerator[Part]:
    """Yield what is within a JSON string that is the whole body; the string itself if that is nothing."""
    source, target = spool.path(value), spool.new_path()
    if source is None:
        target.write_text(value, "utf-8", "replace")
    else:
        await asyncio.to_thread(write_inside, source, target)
    parts = [part async for part in _within(target, 0, spool)]
    for part in parts or [Document(value)]:
        yield part


async def _read_encoded(body: AsyncIterator[bytes], spool: Spool) -> Part:
    """Read a body that is the base64 of a picture."""
    text = await _save_text(body, spool)
    found = await asyncio.to_thread(find_picture, text, spool)
    return Unreadable(text) if found is None else Picture(found)


async def _read_text(body: AsyncIterator[bytes], spool: Spool) -> AsyncGenerator[Part]:
    """Yield what is in a text around it. A long text in which there is nothing, and which is no page, is kept."""
    path = await _save_text(body, spool)
    if (picture := await asyncio.to_thread(_attached, path, spool)) is not None:
        yield picture
        return
    seen = await asyncio.to_thread(_look_through, path)
    if seen.is_page:
        raise NotUnderstood  # its pictures are its own
    if seen.begins is not None:
        parts = [part async for part in _within(path, seen.begins, spool)]
        if any(isinstance(part, Picture) or (isinstance(part, Document) and part.value) for part in parts):
            for part in parts:
                yield part
            return
    if seen.is_document:
        raise NotUnderstood
    if (found := await asyncio.to_thread(find_picture, path, spool)) is not None:
        yield Picture(found)
    elif path.is_file() and (path.stat().st_size > LONGEST or seen.is_drawing):
        yield Unreadable(path)
    else:
        raise NotUnderstood


async def _within(path: Path, begins: int, spool: Spool) -> AsyncGenerator[Part]:
    """Yield the parts of a text in a file from a place on; nothing if it cannot be read."""
    try:
        async for part in _parts(_blocks(path, begins), spool, within=True):
            yield part
    except NotUnderstood:
        return


@dataclass(frozen=True, slots=True)
class _Seen:
    """The looks of a text."""

    is_page: bool
    is_drawing: bool
    is_document: bool
    """A document that cannot be read begins in front of any picture."""
    begins: int | None
    """Where JSON may begin."""


def _look_through(path: Path) -> _Seen:
    with path.open("rb") as file:
        head = file.read(_BLOCK)
    begins = _OBJECT.search(head)
    is_drawing = _DRAWING.match(head) is not None
    return _Seen(
        is_page=_PAGE.match(head) is not None and not is_drawing,
        is_drawing=is_drawing,
        is_document=_DOCUMENT.search(head, 0, next(beginnings(head), len(head))) is not None,
        begins=None if begins is None else begins.start(),
    )


def _attached(path: Path, spool: Spool) -> Picture | None:
    """Write the first picture of a multipart form into a file of its own (RFC 2046)."""
    if not path.is_file() or not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if text[:2] != _MULTIPART:
            return None
        first = text[: max(text.find(b"\n"), 2)]
        boundary = (b"\r\n" if first.endswith(b"\r") else b"\n") + first.strip()
        for headers in islice(_HEADERS_END.finditer(text), _MOST_PARTS):
            begins = headers.end()
            if image_type(text[begins : begins + ENOUGH]) is None:
                continue
            ends = text.find(boundary, begins)
            ends = len(text) if ends < 0 else ends
            if ends - begins > spool.max_bytes:
                raise ImageTooLarge
            target = spool.new_path()
            with target.open("wb") as to:
                for start in range(begins, ends, _BLOCK):
                    to.write(text[start : min(start + _BLOCK, ends)])
            return Picture(target)
    return None


async def _blocks(path: Path, begins: int = 0) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(begins)
        while block := await asyncio.to_thread(file.read, _BLOCK):
            yield block


async def _save_text(body: AsyncIterator[bytes], spool: Spool) -> Path:
    path = spool.new_path()
    with path.open("wb") as file:
        async for chunk in body:
            spool.take(len(chunk))
            file.write(chunk)
    return path


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
