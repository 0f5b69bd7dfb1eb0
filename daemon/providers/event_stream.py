"""Read server-sent events whose data is JSON, piece by piece (https://html.spec.whatwg.org/multipage/server-sent-events.html).

Forgiving at the end: the last event counts without the empty line behind it, if its JSON is complete.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from daemon.providers.lenient import MOST_DOCUMENTS, NotJson
from daemon.providers.spool import JsonStream, Spool

_LINE_END = re.compile(rb"[\r\n]")
_CR = ord("\r")
_MARK = b"\xef\xbb\xbf"
_LONGEST_NAME = 100
"""Characters of a field's name, and of an event's type; longer ones are none that we know."""


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON document; `value` has names of the spool in it. `event` is the type of its event; None outside of a stream."""

    value: object
    event: str | None = None

    @property
    def fields(self) -> dict[str, Any] | None:
        """The document as an object; None if it is something else."""
        return cast("dict[str, Any]", self.value) if isinstance(self.value, dict) else None

    def unwrapped(self) -> list["Document"]:
        """Return the documents of a list of objects, which stand for a stream if there are several; else this one."""
        listed = cast("list[object]", self.value) if isinstance(self.value, list) else []
        if not 0 < len(listed) <= MOST_DOCUMENTS or not all(isinstance(item, dict) for item in listed):
            return [self]
        event = self.event if len(listed) == 1 else self.event or ""
        return [Document(item, event) for item in listed]


class EventStream:
    """Yields the documents of a stream, each before the next is read. No line is ever in memory as a whole."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._first = True  # the first line may begin with a mark
        self._after_cr = False
        self._line = b""
        self._field: bytes | None = None  # None until the line's colon has come
        self._at_start = False
        self._type = b""
        self._data: JsonStream | None = None

    def feed(self, chunk: bytes) -> Iterator[Document]:
        """Take the next bytes. Raises as `JsonStream.feed` does."""
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        position = 0
        has_cr = b"\r" in chunk
        while position < len(chunk):
            end = _line_end(chunk, position) if has_cr else chunk.find(b"\n", position)
            if end < 0:
                self._add(chunk[position:])
                return
            self._add(chunk[position:end])
            position = end + 1
            if chunk[end] == _CR:
                self._after_cr = position == len(chunk)
                position += chunk[position : position + 1] == b"\n"
            if (document := self._end_line()) is not None:
                yield document

    def finish(self) -> Document | None:
        """Return the document of an event that nothing has ended; None if there is none, or a part of one."""
        return self._end_line() or self._dispatch()

    def close(self) -> None:
        """Close the file of a text that breaks off."""
        if self._data is not None:
            self._data.close()

    def _add(self, piece: bytes) -> None:
        if self._field is None:
            self._line += piece[: _LONGEST_NAME + 1]
            if self._first:
                self._line = self._line.removeprefix(_MARK)
            name, colon, _ = self._line.partition(b":")
            if not colon:
                if len(self._line) > _LONGEST_NAME:
                    self._begin(b"")
                return
            self._begin(name)
            piece = piece[piece.index(b":") + 1 :]
        if self._at_start and piece:
            piece = piece.removeprefix(b" ")
            self._at_start = False
        if self._field == b"data" and self._data is not None:
            self._data.feed(piece)
        elif self._field == b"event":
            self._type += piece[: max(0, _LONGEST_NAME - len(self._type))]

    def _begin(self, field: bytes) -> None:
        """Begin the value of a field."""
        self._field = field
        self._at_start = True
        if field == b"event":
            self._type = b""
        if field == b"data":
            if self._data is None:
                self._data = JsonStream(self._spool)
            else:
                self._data.feed(b"\n")

    def _end_line(self) -> Document | None:
        empty = self._field is None and not self._line
        if self._field is None and self._line == b"data":
            self._begin(b"data")
        if self._line or self._field is not None:
            self._first = False
        self._line, self._field = b"", None
        return self._dispatch() if empty else None

    def _dispatch(self) -> Document | None:
        data, kind = self._data, self._type.decode("utf-8", "replace").strip()
        self._data, self._type = None, b""
        if data is None:
            return None
        try:
            return Document(data.finish()[0][0], kind)
        except NotJson:  # a mark of the end, a sign of life
            self._spool.drop(data.names)
            return None


def _line_end(chunk: bytes, position: int) -> int:
    """Find the next end of a line, of either kind. Takes ten times as long as the search for one byte."""
    found = _LINE_END.search(chunk, position)
    return found.start() if found else -1
