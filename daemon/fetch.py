"""The one client for URLs that come from outside: an image to refine, a result that a provider points to.

Such a URL is whoever wrote it asking this machine to look at something on their behalf. So a host's addresses are
looked up here, all of them are checked, and the connection goes to a checked address, never to a name: a second look-up
that might answer differently does not exist. TLS still asks for the name's certificate. Every redirect starts from
the beginning.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Self

import httpx

from daemon.addresses import Address, is_public, literal
from daemon.errors import Misconfigured, Refused, Retryable

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port → addresses. Raises OSError if there are none."""

MAX_REDIRECTS = 3
_MAX_ADDRESSES = 4
_CONNECT_SECONDS = 10.0
_CHUNK = 1 << 20
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429}
_BINARY = {"application/octet-stream", "binary/octet-stream"}
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
# The C library takes 2130706433, 0x7f.1 and 0177.0.0.1 for addresses. No top-level domain looks like that.
_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")
_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "image-job-orchestrator"}

_OTHER_URL = "Use the https address of an image that anyone on the internet can open."
_OTHER_IMAGE = "Use the address of the image itself, and check that it opens in a browser."
_OTHER_HOOK = "Use the https address of a server that anyone on the internet can reach, or leave it out."
_AGAIN = "It is tried again by itself. If it stays so, check that the address opens in a browser."


class _Failure(Exception):
    """Why there is no download; `fetch` makes a sentence of it."""

    def __init__(self, reason: str, hint: str, error: type[Refused | Retryable] = Refused) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.error = error


@dataclass(frozen=True, slots=True)
class _Origin:
    """Scheme, host and port of a URL, each in its one spelling. `host` has neither brackets nor a trailing dot."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: httpx.URL) -> Self:
        # `url.host` would decode IDNA, and can fail.
        host = url.raw_host.decode("ascii").lower().removesuffix(".")
        port = _PORTS.get(url.scheme, 0) if url.port is None else url.port
        return cls(url.scheme, str(literal(host) or host), port)

    @property
    def is_loopback(self) -> bool:
        """Whether it says so by itself, before any look-up."""
        address = literal(self.host)
        return address.is_loopback if address else f".{self.host}".endswith(".localhost")


class Fetcher:
    """Downloads from strangers. An async context manager; usable by many tasks at once.

    Args:
        allowed: Configured base URLs. One on loopback (`http://127.0.0.1:54321`, `https://localhost`) makes its exact
            origin reachable, by http too. Of any other only a port besides 443 counts, if it is https.
        resolve: Looks names up.
        ssl_context: Whose certificates to trust; None trusts the usual authorities, or SSL_CERT_FILE.

    Raises:
        Misconfigured: If one of `allowed` is no URL.
    """

    def __init__(
        self, allowed: Iterable[str], *, resolve: Resolve | None = None, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        origins = {_Origin.of(_configured(url)) for url in allowed}
        self._local = {origin for origin in origins if origin.is_loopback and origin.scheme in _PORTS}
        self._remote = {origin for origin in origins - self._local if origin.scheme == "https"}
        self._resolve = resolve or _look_up
        # A transport, not a client: it knows no proxies (they would look names up themselves), cookies or passwords.
        # No connection is used twice, for it belongs to an address, and its certificate was checked for one name only.
        self._transport = httpx.AsyncHTTPTransport(
            verify=ssl_context or True, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Lets go of connections."""
        await self._transport.aclose()

    async def fetch(self, url: str, to: Path, *, max_bytes: int, timeout: timedelta, what: str = "the image") -> None:
        """Downloads `url` into a file, piece by piece. What fails, or is cancelled, leaves no file behind.

        Args:
            url: Anything that anyone has written.
            to: The file; one that is there is replaced.
            max_bytes: The largest body to accept.
            timeout: For everything together, from the first look-up to the last byte.
            what: Names it in error messages.

        Raises:
            Refused: Code `download`: an address that is not to be asked, or an answer that is no image.
            Retryable: Code `download`: trouble with the network or on the other side.
        """
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                async with self._opened(url) as response:
                    await _save(response, to, max_bytes)
        except TimeoutError as error:
            seconds = f"{timeout.total_seconds():g}"
            raise Retryable(
                f"Cannot download {what}: it took longer than {seconds} s.", code="download", hint=_AGAIN
            ) from error
        except (httpx.TransportError, ssl.SSLError) as error:
            raise Retryable(
                f"Cannot download {what}: the connection broke off.",
                code="download",
                hint=_AGAIN,
                data={"error": type(error).__name__},
            ) from error
        except _Failure as failure:
            raise failure.error(
                f"Cannot download {what}: {failure.reason}", code="download", hint=failure.hint
            ) from failure.__cause__

    async def check(self, url: str, *, timeout: timedelta, what: str) -> None:
        """Refuses what `fetch` would not connect to, where somebody else will connect on our behalf.

        What its name leads to may have changed by then: whoever connects has to look again.

        Args:
            url: Anything that anyone has written.
            timeout: For looking its name up.
            what: Names it in error messages.

        Raises:
            Refused: Code `invalid_request`: an address that is not to be asked.
            Retryable: The same code: its name was not found.
        """
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await self._addresses(self._checked(_parsed(url)))
        except TimeoutError as error:
            reason = f"its name was not found within {timeout.total_seconds():g} s."
            raise Retryable(f"{what} cannot be used: {reason}", code="invalid_request", hint=_OTHER_HOOK) from error
        except _Failure as failure:
            raise failure.error(
                f"{what} cannot be used: {failure.reason}", code="invalid_request", hint=_OTHER_HOOK
            ) from failure.__cause__

    @asynccontextmanager
    async def _opened(self, address: str) -> AsyncGenerator[httpx.Response]:
        """Follows redirects to an answer whose headers are those of an image."""
        url = _parsed(address)
        for _ in range(1 + MAX_REDIRECTS):
            origin = self._checked(url)
            async with self._asked(url, origin) as response:
                location = response.headers.get("location")
                if response.status_code not in _REDIRECTS or location is None:
                    _check_answer(response, origin.host)
                    yield response
                    return
            url = _parsed(location, relative_to=url)
        raise _Failure(f"there were more than {MAX_REDIRECTS} redirects.", _OTHER_IMAGE)

    def _checked(self, url: httpx.URL) -> _Origin:
        """Refuses what can be refused without asking anybody."""
        if url.userinfo:
            raise _Failure("its URL has a user name or password in it.", _OTHER_URL)
        origin = _Origin.of(url)
        if origin in self._local:
            return origin
        if origin.scheme != "https":
            raise _Failure("its URL is not https.", _OTHER_URL)
        if not literal(origin.host) and (_NUMBER.fullmatch(origin.host) or not _NAME.fullmatch(origin.host)):
            raise _Failure("its URL has no valid host name.", _OTHER_URL)
        if origin.port != _PORTS["https"] and origin not in self._remote:
            raise _Failure(f"port {origin.port} of {origin.host} is not open to it.", _OTHER_URL)
        return origin

    async def _addresses(self, origin: _Origin) -> list[Address]:
        """Where to connect to. One bad address among good ones is somebody's trick, so it spoils them all."""
        own = literal(origin.host)
        try:
            answers = [str(own)] if own else await self._resolve(origin.host, origin.port)
        except OSError as error:
            raise _Failure(f"{origin.host} was not found.", _AGAIN, Retryable) from error
        addresses: list[Address] = []
        for answer in dict.fromkeys(answers):
            address = literal(answer)
            if address is None or not (address.is_loopback if origin in self._local else is_public(address)):
                raise _Failure(f"{origin.host} is not a public address.", _OTHER_URL)
            addresses.append(address)
        if not addresses:
            raise _Failure(f"{origin.host} was not found.", _AGAIN, Retryable)
        return addresses[:_MAX_ADDRESSES]

    @asynccontextmanager
    async def _asked(self, url: httpx.URL, origin: _Origin) -> AsyncGenerator[httpx.Response]:
        """Sends the request to the first address that can be reached."""
        response = await self._send(url, origin, await self._addresses(origin))
        try:
            yield response
        finally:
            await response.aclose()

    async def _send(self, url: httpx.URL, origin: _Origin, addresses: Sequence[Address]) -> httpx.Response:
        failed: httpx.TransportError | None = None
        for address in addresses:
            request = httpx.Request(
                "GET",
                url.copy_with(host=str(address)),
                headers={**_HEADERS, "host": url.copy_with(host=origin.host).netloc.decode("ascii")},
                extensions={
                    "sni_hostname": origin.host,
                    "timeout": httpx.Timeout(None, connect=_CONNECT_SECONDS).as_dict(),
                },
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if _is_forged(error):
                    raise _Failure(f"{origin.host} has no valid certificate.", _OTHER_URL) from error
                failed = error
        raise _Failure(f"{origin.host} cannot be reached.", _AGAIN, Retryable) from failed


async def _look_up(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _configured(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except httpx.InvalidURL as error:
        raise Misconfigured(
            f"A configured address is no URL: {error}", "Check the variables that end in _URL."
        ) from None


def _parsed(url: str, relative_to: httpx.URL | None = None) -> httpx.URL:
    """Reads a URL. The parser's own message quotes from it, tokens included, so it is not kept."""
    try:
        return relative_to.join(url) if relative_to else httpx.URL(url)
    except httpx.InvalidURL:
        raise _Failure("its URL is malformed.", _OTHER_URL) from None


def _is_forged(error: BaseException) -> bool:
    """Whether a certificate was the reason that a connection failed."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _check_answer(response: httpx.Response, host: str) -> None:
    """Refuses what its headers give away."""
    status = response.status_code
    if status >= 500 or status in _PASSING:
        raise _Failure(f"{host} answered {status}.", _AGAIN, Retryable)
    if status != 200:
        raise _Failure(f"{host} answered {status}.", _OTHER_IMAGE)
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _Failure(f"{host} sent it compressed, which was not asked for.", _OTHER_IMAGE)
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not media_type.startswith("image/") and media_type not in _BINARY:
        raise _Failure(f"what {host} sent is not an image.", _OTHER_IMAGE)


async def _save(response: httpx.Response, to: Path, max_bytes: int) -> None:
    """Writes the body as it comes."""
    if int(response.headers.get("content-length", 0)) > max_bytes:  # h11 has made sure that it is a number
        raise _too_large(max_bytes)
    size = 0
    with _whole_or_nothing(to) as file:
        async for chunk in response.aiter_raw(_CHUNK):
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            await asyncio.to_thread(file.write, chunk)


def _too_large(max_bytes: int) -> _Failure:
    return _Failure(f"it is larger than {max_bytes / 1e6:g} MB.", "Use a smaller image.")


@contextmanager
def _whole_or_nothing(path: Path) -> Generator[BinaryIO]:
    """A file to write that is gone again if anything goes wrong, cancellation included."""
    try:
        with path.open("wb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise
