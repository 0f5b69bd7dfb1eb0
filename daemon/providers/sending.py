"""Tell the instant at which a request leaves: right before its first byte, when the connection is there.

Until then a call costs nothing, whatever happens; from then on it may have been paid for.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpx2

from daemon.providers.error_body import read_error

_STARTED = "send_request_headers.started"
"""httpcore's name of that instant (https://www.encode.io/httpcore/extensions/#trace), after the name of a protocol."""
_current: ContextVar["Sending | None"] = ContextVar("sending", default=None)


class Sending:
    """One call of a provider.

    Args:
        report: Reports it. It may raise a `RunError`, which keeps the request from leaving.
        has_image: Whether a previous image goes with it.
    """

    def __init__(self, report: Callable[[], None], *, has_image: bool = False) -> None:
        self._report = report
        self.has_image = has_image
        self.sent = False
        self.status: int | None = None
        """The HTTP status of the response; None until it has come."""

    def leaves(self) -> None:
        """Report the call, if it is not reported yet."""
        if not self.sent:
            self._report()
            self.sent = True

    def came(self, status: int) -> None:
        """Note the status of the response."""
        self.leaves()
        self.status = status

    async def trace(self, event: str, _: Mapping[str, Any]) -> None:
        """Follow a request through the HTTP library."""
        if event.endswith(_STARTED):
            self.leaves()

    @contextmanager
    def in_sdk(self) -> Generator[None]:
        """Follow the requests that an SDK makes meanwhile with a client that has `follow` among its hooks."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


async def shorten(response: httpx2.Response) -> None:
    """Keep an SDK from reading more of an error than we do, and note the status: a hook for its client."""
    if (sending := _current.get()) is not None:
        sending.came(response.status_code)
    if response.status_code >= 300 and isinstance(response.stream, httpx2.AsyncByteStream):
        body = await read_error(aiter(response.stream))
        await response.stream.aclose()
        replace_body(response, body)


def replace_body(response: httpx2.Response, body: bytes) -> None:
    """Have a response yield another body, which is not compressed."""
    for name in ("content-encoding", "content-length", "transfer-encoding"):
        response.headers.pop(name, None)
    response.stream = httpx2.ByteStream(body)


async def follow(request: httpx2.Request) -> None:
    """Follow a request of an SDK: a hook for its client."""
    if (sending := _current.get()) is not None:
        request.extensions = {**request.extensions, "trace": sending.trace}
