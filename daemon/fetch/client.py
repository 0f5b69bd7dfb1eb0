"""The one client for URLs that come from outside: an image to refine, a result that a provider points to.

The connection goes to an address that `Destinations` has checked, never to a name: a second look-up that might answer
differently does not exist. TLS still asks for the name's certificate. Every redirect starts from the beginning.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Self

import httpx

from daemon.addresses import Address
from daemon.destinations import AGAIN, OTHER_URL, Destinations, Failure, Origin, Resolve, parsed
from daemon.errors import Retryable

MAX_REDIRECTS = 3
_CONNECT_SECONDS = 10.0
_CHUNK = 1 << 20
_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429}
_BINARY = {"application/octet-stream", "binary/octet-stream"}
_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "image-job-orchestrator"}

_OTHER_IMAGE = "Use the address of the image itself, and check that it opens in a browser."


class Fetcher:
    """Downloads from strangers. An async context manager; usable by many tasks at once.

    Args:
        allowed, resolve: See `Destinations`.
        ssl_context: Whose certificates to trust; None trusts the usual authorities, or SSL_CERT_FILE.

    Raises:
        Misconfigured: If one of `allowed` is no URL.
    """

    def __init__(
        self, allowed: Iterable[str], *, resolve: Resolve | None = None, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        self._destinations = Destinations(allowed, resolve=resolve)
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
                f"Cannot download {what}: it took longer than {seconds} s.", code="download", hint=AGAIN
            ) from error
        except (httpx.TransportError, ssl.SSLError) as error:
            raise Retryable(
                f"Cannot download {what}: the connection broke off.",
                code="download",
                hint=AGAIN,
                data={"error": type(error).__name__},
            ) from error
        except Failure as failure:
            raise failure.error(
                f"Cannot download {what}: {failure.reason}", code="download", hint=failure.hint
            ) from failure.__cause__

    @asynccontextmanager
    async def _opened(self, address: str) -> AsyncGenerator[httpx.Response]:
        """Follows redirects to an answer whose headers are those of an image."""
        url = parsed(address)
        for _ in range(1 + MAX_REDIRECTS):
            origin = self._destinations.origin(url)
            async with self._asked(url, origin) as response:
                location = response.headers.get("location")
                if response.status_code not in _REDIRECTS or location is None:
                    _check_answer(response, origin.host)
                    yield response
                    return
            url = parsed(location, relative_to=url)
        raise Failure(f"there were more than {MAX_REDIRECTS} redirects.", _OTHER_IMAGE)

    @asynccontextmanager
    async def _asked(self, url: httpx.URL, origin: Origin) -> AsyncGenerator[httpx.Response]:
        """Sends the request to the first address that can be reached."""
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
        raise Failure(f"{origin.host} cannot be reached.", AGAIN, Retryable) from failed


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
        raise Failure(f"{host} answered {status}.", AGAIN, Retryable)
    if status != 200:
        raise Failure(f"{host} answered {status}.", _OTHER_IMAGE)
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise Failure(f"{host} sent it compressed, which was not asked for.", _OTHER_IMAGE)
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not media_type.startswith("image/") and media_type not in _BINARY:
        raise Failure(f"what {host} sent is not an image.", _OTHER_IMAGE)


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


def _too_large(max_bytes: int) -> Failure:
    return Failure(f"it is larger than {max_bytes / 1e6:g} MB.", "Use a smaller image.")


@contextmanager
def _whole_or_nothing(path: Path) -> Generator[BinaryIO]:
    """A file to write that is gone again if anything goes wrong, cancellation included."""
    try:
        with path.open("wb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise
