"""Undo the compression of a body, and its character set, asked for or not: its first bytes say which, its headers do not."""

import asyncio
import codecs
import re
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator

from daemon.magic import image_type, is_text

_GZIP = b"\x1f\x8b"
_EITHER = zlib.MAX_WBITS | 32
"""Either container, by its header."""
_NEITHER = -zlib.MAX_WBITS
"""Deflate without a container (RFC 1951), as some servers send it."""
_HEAD = 1024
"""Bytes after which a body without a container has shown whether it is compressed."""
_TELLING = 8
"""Bytes that are a text by chance no more."""
_READABLE = re.compile(rb'\s*[{["]|(?:data|event|id|retry|):|\s*<')
_WIDE = (
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),  # before UTF-16, whose mark begins alike
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
    *((mark + b"\0\0\0", "utf-32-le") for mark in (b"{", b"[", b'"')),
    *((b"\0\0\0" + mark, "utf-32-be") for mark in (b"{", b"[", b'"')),
    *((mark + b"\0", "utf-16-le") for mark in (b"{", b"[", b'"')),
    *((b"\0" + mark, "utf-16-be") for mark in (b"{", b"[", b'"')),
)
"""How JSON begins in other encodings of Unicode than UTF-8."""
_MOST_LAYERS = 2
_PIECE = 1 << 16
"""Bytes that are made at once of compressed ones, of which a few may stand for a thousand times as many."""
_MOST_AT_FIRST = 1 << 24
_MOST_OF_A_BYTE = 2000
"""Bytes that a body may become, and each received one of it. Deflate makes 1,032 of one, and its layers are multiplied."""


class Broken(Exception):
    """A compressed body cannot be read to its end."""


async def undone(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield the bytes of a body without its compression (gzip, deflate), in pieces of bounded size.

    Args:
        chunks: As they came from the network.

    Raises:
        Broken: If it breaks off, is damaged, or becomes far larger than a response can.
    """
    bounds = _Bounds()
    chunks = bounds.received(chunks)
    for _ in range(_MOST_LAYERS):
        chunks = _undone_once(chunks, bounds)
    async for chunk in chunks:
        yield chunk


class _Bounds:
    """Bounds what a body becomes, in all layers together, by what came of it."""

    def __init__(self) -> None:
        self._left = _MOST_AT_FIRST

    async def received(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        async for chunk in chunks:
            self._left += len(chunk) * _MOST_OF_A_BYTE
            yield chunk

    async def inflated(self, pieces: Generator[bytes]) -> AsyncGenerator[bytes]:
        """Yield the pieces that a chunk stands for; others run in between, for there may be many."""
        for piece in pieces:
            self._left -= len(piece)
            if self._left < 0:
                raise Broken
            yield piece
            await asyncio.sleep(0)


async def _undone_once(chunks: AsyncIterator[bytes], bounds: _Bounds) -> AsyncGenerator[bytes]:
    head = b""
    async for chunk in chunks:
        head += chunk
        if len(head) >= 2 and (_is_compressed(head) or _is_plain(head) or len(head) >= _HEAD):
            break
    container = _EITHER if _is_compressed(head) else _NEITHER if _is_raw(head) else None
    inflater = None if container is None else _Inflater(container)
    if inflater is None:
        if head:
            yield head
        async for chunk in chunks:
            yield chunk
        return
    async for piece in bounds.inflated(inflater.feed(head)):
        yield piece
    async for chunk in chunks:
        async for piece in bounds.inflated(inflater.feed(chunk)):
            yield piece
    if not inflater.is_whole:
        raise Broken


class _Inflater:
    """Inflates the members of a compressed body, one after the other. The first is in `container`: `_EITHER`, or `_NEITHER`."""

    def __init__(self, container: int) -> None:
        self._member = zlib.decompressobj(container)

    @property
    def is_whole(self) -> bool:
        """Whether the last member has come to its end."""
        return self._member.eof

    def feed(self, data: bytes) -> Generator[bytes]:
        if self._member.eof and not data.startswith(_GZIP):
            return  # filling
        if self._member.eof:
            self._member = zlib.decompressobj(_EITHER)
        while True:
            try:
                piece = self._member.decompress(data, _PIECE)
            except zlib.error as error:
                raise Broken from error
            if piece:
                yield piece
            data = self._member.unconsumed_tail
            if self._member.eof:
                data = self._member.unused_data
                if not data.startswith(_GZIP):
                    return
                self._member = zlib.decompressobj(_EITHER)
            elif not data and len(piece) < _PIECE:
                return


def _is_compressed(head: bytes) -> bool:
    """Return whether a body begins with the header of gzip, or with that of zlib (RFC 1950)."""
    if head.startswith(_GZIP):
        return True
    return len(head) >= 2 and head[0] == 0x78 and int.from_bytes(head[:2], "big") % 31 == 0


def _is_plain(head: bytes) -> bool:
    """Return whether a body begins as one that is not compressed."""
    return image_type(head) is not None or (len(head) >= _TELLING and is_text(head))


def _is_raw(head: bytes) -> bool:
    """Return whether the beginning of a body is deflate without a container: it has no mark, so what it stands for decides."""
    if not head or image_type(head) is not None or is_text(head):
        return False
    try:
        inflated = zlib.decompressobj(_NEITHER).decompress(head, _HEAD)
    except zlib.error:
        return False
    return image_type(inflated) is not None or (_READABLE.match(inflated) is not None and is_text(inflated))


async def in_utf8(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield JSON that is in UTF-16 or UTF-32 as UTF-8, and any other body as it is."""
    head = b""
    async for chunk in chunks:
        head += chunk
        if len(head) >= 4:
            break
    encoding = next((name for mark, name in _WIDE if head.startswith(mark)), None)
    decoder = None if encoding is None else codecs.getincrementaldecoder(encoding)("replace")
    if head:
        yield head if decoder is None else decoder.decode(head).encode()
    async for chunk in chunks:
        yield chunk if decoder is None else decoder.decode(chunk).encode()
