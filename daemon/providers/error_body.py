"""Read the body of an error: the object of the API that was called, that of another server, or a gateway's page."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

from daemon.fetch.encodings import Broken, in_utf8, undone
from daemon.providers.lenient import NotJson, as_text, parse_json
from daemon.providers.words import A_PAGE

MOST = 64 * 1024
"""Bytes of an error that are read."""
_LONGEST_PLAIN = 500
_WORDS = (
    "message",
    "error",
    "detail",
    "details",
    "errors",
    "title",
    "description",
    "reason",
    "msg",
    "error_description",
)
_DEEPEST = 4


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The body of an error.

    Args:
        document: Its JSON; None where it is none.
        reason: The message in it, whatever object it is in. A page is named as one, and never quoted.
    """

    document: object
    reason: str

    @classmethod
    def of(cls, body: bytes, status: int) -> "ErrorBody":
        """Read a body of which `MOST` bytes are there at most."""
        try:
            document = parse_json(body)
        except NotJson:
            return cls(None, _plain(body, status))
        return cls(document, find_reason(document))

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the document; empty where it is no object. A list of one object stands for that."""
        document = self.document
        if isinstance(document, list) and len(listed := cast("list[object]", document)) == 1:
            document = listed[0]
        return cast("dict[str, Any]", document) if isinstance(document, dict) else {}

    @property
    def is_page(self) -> bool:
        """Whether it is something else than JSON, as gateways answer."""
        return self.document is None and bool(self.reason)

    @property
    def is_foreign(self) -> bool:
        """Whether it is an object that gives a reason, as servers do that have an error object of their own."""
        return bool(self.fields) and bool(self.reason)


def find_reason(document: object, depth: int = 0) -> str:
    """Return the message of an error object of any server; empty if there is none."""
    if depth > _DEEPEST:
        return ""
    match document:
        case str():
            return (as_text(document) or "").strip()
        case list():
            found = (find_reason(item, depth + 1) for item in cast("list[object]", document)[:10])
            return " ".join(filter(None, found))
        case dict():
            fields = cast("dict[str, object]", document)
            return next((reason for word in _WORDS if (reason := find_reason(fields.get(word), depth + 1))), "")
        case _:
            return ""


async def read_error(chunks: AsyncIterator[bytes]) -> bytes:
    """Read `MOST` bytes of an error's body at most, without its compression. Never raises for a damaged one."""
    body = bytearray()
    try:
        async for chunk in in_utf8(undone(chunks)):
            body += chunk
            if len(body) > MOST:
                break
    except Broken:
        pass
    return bytes(body[:MOST])


def _plain(body: bytes, status: int) -> str:
    text = body.decode("utf-8", "replace").strip()
    if not text:
        return ""
    if "<" in text or len(text) > _LONGEST_PLAIN or "\ufffd" in text:
        return f"{A_PAGE} ({status})"
    return text
