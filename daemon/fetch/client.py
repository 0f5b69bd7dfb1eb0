"""Download user-supplied URLs: an image to refine, a result that a provider points to.

The first bytes of a body say whether it is an image; its headers do not. The connection goes to an address that `Destinations` has checked, never to a name: there is no second look-up that might
return another address (DNS rebinding). TLS still verifies the name's certificate. Every redirect is checked from the start.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Self

import httpx

from daemon.errors import Refused, Retryable, RunError
from daemon.fetch.addresses import Address
from daemon.fetch.destinations import CHECK_ADDRESS, OTHER_URL, Destinations, Failure, Origin, Resolve, parsed
from daemon.fetch.encodings import Broken, undone
from daemon.http_clients import certificates
from daemon.magic import ENOUGH, image_type, is_text

MAX_REDIRECTS = 3
_CONNECT_SECONDS = 10.0
_CHUNK = 1 << 20
_REDIRECTS = {301, 302, 303, 307, 308}
_TRANSIENT = {408, 425, 429}
_TIMEOUT = timedelta(seconds=60)
"""For one try of a result."""
_PAUSES = (0.5, 1, 2, 4, 8, 15)
"""Seconds between two tries of a result; the last one stays."""
_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "image-job-orchestrator"}

_RESULT = "The provider made it, and its address does not hand it over. Requeue the run; if it stays so, choose another model."
_OTHER_IMAGE = "Use the address of the image itself, and check that it opens in a browser."


class NotAnImage(Refused):
    """A result has been downloaded, and is no image that we take.

    Args:
        path: The file, as it came.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message, code="download", hint="Requeue the run, or choose another model.")
        self.path = path


class _Unfit(Failure):
    """A body that is no image. Its file is kept if it is no text, as a page would be."""


class Fetcher:
    """Download from user-supplied URLs. An async context manager; usable by many tasks at once.

    Args:
        allowed, resolve: See `Destinations`.
        tls: The certificates to trust; None trusts the usual authorities, or SSL_CERT_FILE.

    Raises:
        Misconfigured: If one of `allowed` is no URL.
    """

    def __init__(
        self, allowed: Iterable[str], *, resolve: Resolve | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._destinations = Destinations(allowed, resolve=resolve)
        # A transport, not a client: it knows no proxies (they would look names up themselves), cookies or passwords.
        # No connection is used twice, for it belongs to an address, and its certificate was checked for one name only.
        self._transport = httpx.AsyncHTTPTransport(
            verify=tls or certificates() or True,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def fetch(self, url: str, to: Path, *, max_bytes: int, timeout: timedelta, what: str = "the image") -> None:
        """Download `url` into a file, piece by piece. A download that fails, or is cancelled, leaves no file behind.

        Args:
            url: User-supplied; it may be anything.
            to: The file; an existing one is replaced.
            max_bytes: Largest body that is accepted.
            timeout: For the whole download, from the first look-up to the last byte.
            what: The name of the download in error messages.

        Raises:
            Refused: Code `download`: the address is not public, or the response is no image.
            Retryable: Code `download`: the network or the server failed.
        """
        try:
            await self._fetch(url, to, max_bytes=max_bytes, timeout=timeout)
        except Failure as failure:
            raise _error(failure, what, to) from failure.__cause__

    async def fetch_result(
        self, url: str, to: Path, *, max_bytes: int, deadline: timedelta, what: str = "the image"
    ) -> None:
        """Download an image that has been made and paid for, as `fetch` does. Whatever may pass is tried again, with growing pauses.

        A server that has the image in a moment may answer 404 or with a page until then.

        Args:
            url: Named by a provider; it may be anything.
            to, max_bytes, what: See `fetch`.
            deadline: How long it is tried; each try may take a minute. Zero means once.

        Raises:
            NotAnImage: If what came last is neither an image nor a text.
            Refused: Code `download`: the address is not public, or the image is too large.
            Retryable: Code `download`: there was no image until the deadline.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + deadline.total_seconds()
        tries = 0
        while True:
            try:
                return await self._fetch(url, to, max_bytes=max_bytes, timeout=_TIMEOUT)
            except Failure as failure:
                pause = _PAUSES[min(tries, len(_PAUSES) - 1)]
                if not failure.passing or loop.time() + pause > ends:
                    raise _result_error(failure, what, to) from failure.__cause__
            tries += 1
            await asyncio.sleep(pause)

    async def _fetch(self, url: str, to: Path, *, max_bytes: int, timeout: timedelta) -> None:
        """Download once; of a body that is no image, leave the file.

        Raises:
            Failure: If there is no image.
        """
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                async with self._opened(url) as response:
                    await _save(response, to, max_bytes)
        except TimeoutError as error:
            seconds = f"{timeout.total_seconds():g}"
            raise Failure(f"it took longer than {seconds} s.", CHECK_ADDRESS, Retryable) from error
        except (httpx.TransportError, httpx.DecodingError, ssl.SSLError) as error:
            data = {"error": type(error).__name__}
            raise Failure("the connection broke off.", CHECK_ADDRESS, Retryable, data=data) from error
        host = Origin.of(parsed(url)).host
        with to.open("rb") as file:
            head = file.read(ENOUGH)
        if image_type(head) is None:
            raise _Unfit(f"what {host} sent is not an image.", _OTHER_IMAGE, passing=True)

    @asynccontextmanager
    async def _opened(self, address: str) -> AsyncGenerator[httpx.Response]:
        """Follow redirects to a response whose status is that of an image."""
        url = parsed(address)
        for _ in range(1 + MAX_REDIRECTS):
            origin = self._destinations.origin(url)
            async with self._requested(url, origin) as response:
                location = response.headers.get("location")
                if response.status_code not in _REDIRECTS or location is None:
                    _check_status(response, origin.host)
                    yield response
                    return
            url = parsed(location, relative_to=url)
        raise Failure(f"there were more than {MAX_REDIRECTS} redirects.", _OTHER_IMAGE)

    @asynccontextmanager
    async def _requested(self, url: httpx.URL, origin: Origin) -> AsyncGenerator[httpx.Response]:
        """Send the request to the first address that can be reached."""
        response = await self._send(url, origin, await self._destinations.addresses(origin))
        try:
            yield response
        finally:
            await response.aclose()

    async def _send(self, url: httpx.URL, origin: Origin, addresses: Sequence[Address]) -> httpx.Response:
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
                    raise Failure(f"{origin.host} has no valid certificate.", OTHER_URL) from error
                failed = error
        raise Failure(f"{origin.host} cannot be reached.", CHECK_ADDRESS, Retryable) from failed


def _is_forged(error: BaseException) -> bool:
    """Return whether a connection failed for its certificate."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _check_status(response: httpx.Response, host: str) -> None:
    """Refuse a response by its status.

    Raises:
        Failure: If it is no image.
    """
    status = response.status_code
    if status >= 500 or status in _TRANSIENT:
        raise Failure(f"{host} answered {status}.", CHECK_ADDRESS, Retryable)
    if status != 200:
        raise Failure(f"{host} answered {status}.", _OTHER_IMAGE, passing=True)


async def _save(response: httpx.Response, to: Path, max_bytes: int) -> None:
    """Write the body into a file while it is received, without its compression."""
    if int(response.headers.get("content-length", 0)) > max_bytes:  # h11 has made sure that it is a number
        raise _too_large(max_bytes)
    size = 0
    with _whole_or_nothing(to) as file:
        try:
            async for chunk in undone(response.aiter_raw(_CHUNK)):
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                await asyncio.to_thread(file.write, chunk)
        except Broken as error:
            raise Failure("it is compressed, and cannot be read to its end.", CHECK_ADDRESS, Retryable) from error


def _error(failure: Failure, what: str, path: Path) -> RunError:
    path.unlink(missing_ok=True)
    return failure.error(
        f"Cannot download {what}: {failure.reason}", code="download", hint=failure.hint, data=failure.data
    )


def _result_error(failure: Failure, what: str, path: Path) -> RunError:
    """Return the error for a result that is not there: its address is the provider's, so the caller cannot mend it."""
    message = f"Cannot download {what}: {failure.reason}"
    if isinstance(failure, _Unfit) and path.exists():
        with path.open("rb") as file:
            if not is_text(file.read(1024)):
                return NotAnImage(message, path)
        path.unlink()
    error = Retryable if failure.passing else Refused
    return error(message, code="download", hint=_RESULT, data=failure.data)


def _too_large(max_bytes: int) -> Failure:
    return Failure(f"it is larger than {max_bytes / 1e6:g} MB.", "Use a smaller image.")


@contextmanager
def _whole_or_nothing(path: Path) -> Generator[BinaryIO]:
    """Open a file to write; it is removed again after any error, cancellation included."""
    try:
        with path.open("wb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise
