"""Decode base64 however it is spelled, piece by piece.

Both alphabets, with and without padding, with line breaks, within quotation marks, after `data:image/png;base64,`, with `%3D` for
`=`, and as several texts with padding of their own, one after the other: all of these have been sent by servers.
"""

import binascii
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

_BLOCK = 1 << 16
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_ONE_ALPHABET = bytes.maketrans(b"-_", b"+/")
_FILLING = b" \t\r\n\v\f\"'"
_LONGEST_PREFIX = 300
_PREFIX = re.compile(rb"(?:data:)?[^,]{0,250}?base64,", re.IGNORECASE)
_CUT_PERCENT = re.compile(rb"%[0-9A-Fa-f]?$")
_ESCAPES = ((b"\\n", b""), (b"\\r", b""), (b"\\t", b""), (b"\\/", b"/"), (b'\\"', b""))
"""Those that may stand in base64, besides `\\u003d` and the like. A backslash of its own may not, so nothing else can be meant."""
_LONGEST_ESCAPE = 6


class NotBase64(ValueError):
    """A text is not base64."""


class ImageTooLarge(Exception):
    """An image is larger than allowed."""


class Base64Decoder:
    """Write the bytes that a text stands for to a file.

    Args:
        to: The file.
        max_bytes: Largest image that is accepted.
    """

    def __init__(self, to: BinaryIO, *, max_bytes: int) -> None:
        self._to = to
        self._left = max_bytes
        self._head: bytes | None = b""  # until it is known whether there is a prefix
        self._percent = b""
        self._carry = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the text.

        Raises:
            NotBase64: If it is something else.
            ImageTooLarge: If the image is too large.
        """
        if self._head is not None:
            self._head += data
            if len(self._head) < _LONGEST_PREFIX:
                return
            data = self._begin(self._head)
        self._decode(data)

    def finish(self) -> None:
        """End the text. Raises as `feed` does."""
        if self._head is not None:
            self._decode(self._begin(self._head))
        self._decode(b"", last=True)
        self._flush()

    def _begin(self, head: bytes) -> bytes:
        self._head = None
        head = head.lstrip(b"\xef\xbb\xbf" + _FILLING)
        prefix = _PREFIX.match(head)
        return head[prefix.end() :] if prefix else head

    def _decode(self, data: bytes, *, last: bool = False) -> None:
        data = self._percent + data
        self._percent = b""
        if b"%" in data:
            if not last and (cut := _CUT_PERCENT.search(data)):
                data, self._percent = data[: cut.start()], cut[0]
            data = unquote_to_bytes(data)
        data = data.translate(_ONE_ALPHABET, _FILLING)
        if data.translate(None, _ALPHABET + b"="):
            raise NotBase64
        first, *others = data.split(b"=")
        self._add(first)
        for piece in others:
            self._flush()
            self._add(piece)

    def _add(self, piece: bytes) -> None:
        piece = self._carry + piece
        whole = len(piece) // 4 * 4
        self._carry = piece[whole:]
        self._write(binascii.a2b_base64(piece[:whole]))

    def _flush(self) -> None:
        if len(self._carry) > 1:  # six bits alone are no byte
            self._write(binascii.a2b_base64(self._carry + b"=" * (4 - len(self._carry))))
        self._carry = b""

    def _write(self, decoded: bytes) -> None:
        self._left -= len(decoded)
        if self._left < 0:
            raise ImageTooLarge
        self._to.write(decoded)


def unescaped(file: BinaryIO, size: int = sys.maxsize) -> Iterator[bytes]:
    """Yield the text that the inside of a JSON string stands for, as far as it may be base64. It has `size` bytes at most."""
    held = b""
    while block := file.read(min(size, _BLOCK)):
        size -= len(block)
        block = held + block
        cut = block.rfind(b"\\", -_LONGEST_ESCAPE + 1)  # perhaps the block's end cuts an escape
        block, held = (block[:cut], block[cut:]) if cut >= 0 else (block, b"")
        yield _unescape(block)
    yield _unescape(held)


def _unescape(block: bytes) -> bytes:
    if b"\\" not in block:
        return block
    for escaped, plain in _ESCAPES:
        block = block.replace(escaped, plain)
    if b"\\u" in block:
        block = block.decode("raw_unicode_escape", "replace").encode("ascii", "replace")
    return block
