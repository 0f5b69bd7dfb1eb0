"""Check user-supplied URLs, and return the addresses to connect to (SSRF).

With such a URL an outsider has this machine, or another one, open a connection for them. So a host's addresses are looked up
here, and all of them are checked.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import httpx

from daemon.errors import Misconfigured, Refused, Retryable
from daemon.fetch.addresses import Address, is_public, literal

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port → addresses. Raises OSError if there are none."""

OTHER_URL = "Use the https address of an image that anyone on the internet can open."
CHECK_ADDRESS = "If it stays so, check that the address opens in a browser."
_OTHER_WEBHOOK = "Use the https address of a server that anyone on the internet can reach, or leave it out."
_MAX_ADDRESSES = 4
_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
# The C library takes 2130706433, 0x7f.1 and 0177.0.0.1 for addresses. No top-level domain looks like that.
_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")


class Failure(Exception):
    """The reason why a URL is not fetched; callers make a sentence of it.

    Args:
        reason: The end of a sentence.
        hint: The cure.
        error: The error to raise with it.
        passing: Whether it may pass by itself, though it is final for a URL of a user's.
        data: More for the audit trail.
    """

    def __init__(
        self,
        reason: str,
        hint: str,
        error: type[Refused | Retryable] = Refused,
        *,
        passing: bool = False,
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.error = error
        self.passing = passing or error is Retryable
        self.data = data


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of a URL, each in its one spelling. `host` has neither brackets nor a trailing dot."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: httpx.URL) -> Self:
        """Return the origin of any URL, checked or not."""
        # `url.host` would decode IDNA, and can fail.
        host = url.raw_host.decode("ascii").lower().removesuffix(".")
        port = _PORTS.get(url.scheme, 0) if url.port is None else url.port
        return cls(url.scheme, str(literal(host) or host), port)

    @property
    def is_loopback(self) -> bool:
        """Whether the host is loopback by its spelling, before any look-up."""
        address = literal(self.host)
        return address.is_loopback if address else f".{self.host}".endswith(".localhost")


class Destinations:
    """The destinations that a user-supplied URL may have: public addresses, by https.

    Args:
        allowed: Configured base URLs. One on loopback (`http://127.0.0.1:54321`, `https://localhost`) makes its exact
            origin reachable, by http too. Of any other only a port besides 443 counts, if it is https.
        resolve: Looks names up; by default the system's resolver.

    Raises:
        Misconfigured: If one of `allowed` is no URL.
    """

    def __init__(self, allowed: Iterable[str], *, resolve: Resolve | None = None) -> None:
        origins = {Origin.of(_configured(url)) for url in allowed}
        self._local = {origin for origin in origins if origin.is_loopback and origin.scheme in _PORTS}
        self._remote = {origin for origin in origins - self._local if origin.scheme == "https"}
        self._resolve = resolve or _look_up

    async def check(self, url: str, *, timeout: timedelta, what: str) -> None:
        """Check a URL to which another server will connect on our behalf.

        The addresses of its name may have changed by then: that server has to check them again.

        Args:
            url: User-supplied; it may be anything.
            timeout: For the look-up of its name.
            what: The name of the URL in error messages.

        Raises:
            Refused: Code `invalid_request`: the address is not public.
            Retryable: The same code: its name was not found.
        """
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await self.addresses(self.origin(parsed(url)))
        except TimeoutError as error:
            reason = f"its name was not found within {timeout.total_seconds():g} s."
            raise Retryable(f"{what} cannot be used: {reason}", code="invalid_request", hint=_OTHER_WEBHOOK) from error
        except Failure as failure:
            raise failure.error(
                f"{what} cannot be used: {failure.reason}", code="invalid_request", hint=_OTHER_WEBHOOK
            ) from failure.__cause__

    def origin(self, url: httpx.URL) -> Origin:
        """Return the origin of a URL that may be connected to, as far as that is decided without a look-up.

        Raises:
            Failure: If it may not.
        """
        if url.userinfo:
            raise Failure("its URL has a user name or password in it.", OTHER_URL)
        origin = Origin.of(url)
        if origin in self._local:
            return origin
        if origin.scheme != "https":
            raise Failure("its URL is not https.", OTHER_URL)
        if not literal(origin.host) and (_NUMBER.fullmatch(origin.host) or not _NAME.fullmatch(origin.host)):
            raise Failure("its URL has no valid host name.", OTHER_URL)
        if origin.port != _PORTS["https"] and origin not in self._remote:
            raise Failure(f"port {origin.port} of {origin.host} is not open to it.", OTHER_URL)
        return origin

    async def addresses(self, origin: Origin) -> list[Address]:
        """Return the addresses to connect to. One private address among public ones is an attack, so it refuses them all.

        Raises:
            Failure: If there is none, or one that is not public.
        """
        own = literal(origin.host)
        try:
            found = [str(own)] if own else await self._resolve(origin.host, origin.port)
        except OSError as error:
            raise Failure(f"{origin.host} was not found.", CHECK_ADDRESS, Retryable) from error
        addresses: list[Address] = []
        for spelled in dict.fromkeys(found):
            address = literal(spelled)
            if address is None or not (address.is_loopback if origin in self._local else is_public(address)):
                raise Failure(f"{origin.host} is not a public address.", OTHER_URL)
            addresses.append(address)
        if not addresses:
            raise Failure(f"{origin.host} was not found.", CHECK_ADDRESS, Retryable)
        return addresses[:_MAX_ADDRESSES]


def parsed(url: str, relative_to: httpx.URL | None = None) -> httpx.URL:
    """Parse a URL. The parser's own message quotes from it, tokens included, so it is dropped.

    Raises:
        Failure: If it is malformed.
    """
    try:
        return relative_to.join(url) if relative_to else httpx.URL(url)
    except httpx.InvalidURL:
        raise Failure("its URL is malformed.", OTHER_URL) from None


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
