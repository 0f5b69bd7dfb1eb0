"""Keep the long texts of a response in files, so that they are never in memory as a whole.

The usual way (read the body, parse it, decode the string) takes 4.2 times the image's size; this takes 0.1 to 0.2.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from daemon.providers.lenient import SPOOLED, parse_cut, parse_documents

LONGEST = 64 * 1024
"""Bytes of a text that stays in memory."""
MOST_REST = 4_000_000
"""Bytes of a document without its long texts: usage, words, signatures. With more it is no response to our requests."""
_BLOCK = 1 << 16
_ESCAPE = re.compile(rb'\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt])')
_WHOLE_ESCAPES = re.compile(rb"(?:[^\\]+|\\(?:u[0-9a-fA-F]{4}|[^u]))*", re.DOTALL)
_ROOM = 6
"""Bytes of JSON for a byte of base64, at most: each character may be escaped as `\\u0041`."""


class TooMuch(Exception):
    """A response is larger than any that has an image of the largest size."""


class Spool:
    """The long texts of one response, as they came: what stands between the quotation marks in its JSON.

    Args:
        folder: The directory of the files; None to keep none.
        max_bytes: Largest image that is accepted. The texts together may have what two of that size need.
        most_rest: Bytes that a document may have besides.
        longest: Bytes of a text that stays in memory.
    """

    def __init__(
        self, folder: Path | None, *, max_bytes: int, most_rest: int = MOST_REST, longest: int = LONGEST
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.most_rest = most_rest
        self.longest = longest
        self._left = LONGEST + max_bytes * 8 // 3 * _ROOM
        self._name = f"{SPOOLED}{uuid4().hex}"  # no server can know it
        self._count = 0
        self._files: dict[str, Path] = {}

    def __contains__(self, value: object) -> bool:
        return value in self._files

    def path(self, value: str) -> Path | None:
        """Return the file of a long text; None for one that is still in memory."""
        return self._files.get(value)

    def new_path(self) -> Path:
        """Return the path of a new file."""
        self._count += 1
        return Path(os.devnull) if self.folder is None else self.folder / f"received-{self._count}"

    def open(self) -> tuple[str, BinaryIO]:
        """Open a file for a long text; return what stands for it in the document, and the file."""
        path = self.new_path()
        name = f"{self._name}:{self._count}"
        self._files[name] = path
        return name, path.open("wb")

    def take(self, size: int) -> None:
        """Count bytes that are kept.

        Raises:
            TooMuch: If there are too many.
        """
        self._left -= size
        if self._left < 0:
            raise TooMuch

    def drop(self, names: Iterable[str]) -> None:
        """Remove the texts of a document that has been read, or that breaks off. Names of others, and other texts, are passed over."""
        for name in names:
            path = self._files.pop(name, None)
            if self.folder is not None and path is not None and path.exists():
                self._left += path.stat().st_size
                path.unlink()


def write_inside(source: Path, target: Path) -> None:
    """Write the text that the inside of a JSON string stands for, whatever it is: JSON once more, a picture."""
    held = b""
    with source.open("rb") as file, target.open("wb") as to:
        while block := file.read(_BLOCK):
            block = held + block
            whole = _WHOLE_ESCAPES.match(block)
            end = whole.end() if whole else 0  # perhaps the block's end cuts an escape
            to.write(_ESCAPE.sub(lambda escape: _unescaped(escape[0]), block[:end]))
            held = block[end:]
        to.write(held)


def _unescaped(escape: bytes) -> bytes:
    text: str = json.loads(b'"' + escape + b'"')
    return text.encode("utf-8", "replace")


class JsonStream:
    """Take one JSON document piece by piece, its long texts into a spool."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._rest = bytearray()
        self.names: list[str] = []
        """These stand for its long texts, in their sequence."""
        self._text: bytearray | None = None  # the text that is being read
        self._file: BinaryIO | None = None  # and where it goes, once it is long
        self._backslashes = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come yet."""
        return not self._rest

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            TooMuch: If there are too many.
            OSError: For trouble with the disk.
        """
        position = 0
        while position < len(chunk):
            end = chunk.find(b'"', position)
            stop = len(chunk) if end < 0 else end
            if self._text is None:
                self._keep(chunk[position : stop + 1])
                if end >= 0:
                    self._text = bytearray()
                    self._backslashes = 0
            else:
                piece = chunk[position:stop]
                self._add(piece)
                escapes = len(piece) - len(piece.rstrip(b"\\"))
                self._backslashes = self._backslashes + escapes if escapes == len(piece) else escapes
                if end >= 0 and self._backslashes % 2:
                    self._add(b'"')
                    self._backslashes = 0
                elif end >= 0:
                    self._end()
            position = stop + 1

    def finish(self) -> tuple[list[object], bool]:
        """Return the document, with a name of the spool for each long text, and those behind it (see `parse_documents`).

        Raises:
            NotJson: If it is none, or breaks off.
        """
        self.close()
        return parse_documents(bytes(self._rest))

    def finish_cut(self) -> object:
        """Return what is complete of a document that breaks off. Raises as `parse_cut` does."""
        self.close()
        return parse_cut(bytes(self._rest))

    def close(self) -> None:
        """Close the file of a text that breaks off."""
        if self._file is not None:
            self._file.close()

    def _keep(self, piece: bytes) -> None:
        self._rest += piece
        if len(self._rest) > self._spool.most_rest:
            raise TooMuch

    def _add(self, piece: bytes) -> None:
        if self._file is not None:
            self._spool.take(len(piece))
            self._file.write(piece)
            return
        assert self._text is not None
        self._text += piece
        if len(self._text) > self._spool.longest:
            name, self._file = self._spool.open()
            self.names.append(name)
            self._spool.take(len(self._text))
            self._file.write(self._text)
            self._text = bytearray(name.encode())

    def _end(self) -> None:
        assert self._text is not None
        if self._file is not None:
            self._file.close()
            self._file = None
        self._keep(bytes(self._text) + b'"')
        self._text = None
