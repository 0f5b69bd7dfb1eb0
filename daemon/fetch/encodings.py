"""Undo the compression of a body, asked for or not: its first bytes say whether there is one, its headers do not."""

import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator

_GZIP = b"\x1f\x8b"
_EITHER = zlib.MAX_WBITS | 32
"""Either container, by its header."""
_MOST_LAYERS = 2
_PIECE = 1 << 16
"""Bytes that are made at once of compressed ones, of which a few may stand for a thousand times as many."""


class Broken(Exception):
    """A compressed body cannot be read to its end."""


async def undone(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield the bytes of a body without its compression (gzip, deflate), in pieces of bounded size.

    Args:
        chunks: As they came from the network.

    Raises:
        Broken: If it breaks off, or is damaged.
    """
    for _ in range(_MOST_LAYERS):
        chunks = _undone_once(chunks)
    async for chunk in chunks:
        yield chunk


async def _undone_once(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    head = b""
    async for chunk in chunks:
        head += chunk
        if len(head) >= 2:
            break
    inflater = _Inflater() if _is_compressed(head) else None
    for piece in inflater.feed(head) if inflater else filter(None, [head]):
        yield piece
    async for chunk in chunks:
        for piece in inflater.feed(chunk) if inflater else (chunk,):
            yield piece
    if inflater is not None and not inflater.is_whole:
        raise Broken


class _Inflater:
    """Inflates the members of a compressed body, one after the other."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_EITHER)

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
