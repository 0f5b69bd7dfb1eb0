"""Which URLs that come from outside may be connected to, and at which addresses.

Such a URL is whoever wrote it asking this machine, or another one, to look at something on their behalf. So a host's
addresses are looked up here, and all of them are checked.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import httpx

from daemon.addresses import Address, is_public, literal
from daemon.errors import Misconfigured, Refused, Retryable

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port → addresses. Raises OSError if there are none."""

OTHER_URL = "Use the https address of an image that anyone on the internet can open."
AGAIN = "It is tried again by itself. If it stays so, check that the address opens in a browser."
_OTHER_HOOK = "Use the https address of a server that anyone on the internet can reach, or leave it out."
_MAX_ADDRESSES = 4
_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
# The C library takes 2130706433, 0x7f.1 and 0177.0.0.1 for addresses. No top-level domain looks like that.
_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")


class Failure(Exception):
    """Why a URL leads to nothing; callers make a sentence of it.

    Args:
        reason: The end of a sentence.
        hint: What to do about it.
        error: What it is to become.
    """

    def __init__(self, reason: str, hint: str, error: type[Refused | Retryable] = Refused) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.error = error


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of a URL, each in its one spelling. `host` has neither brackets nor a trailing dot."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: httpx.URL) -> Self:
        """Of any URL, checked or not."""
        # `url.host` would decode IDNA, and can fail.
        host = url.raw_host.decode("ascii").lower().removesuffix(".")
        port = _PORTS.get(url.scheme, 0) if url.port is None else url.port
        return cls(url.scheme, str(literal(host) or host), port)

    @property
    def is_loopback(self) -> bool:
        """Whether it says so by itself, before any look-up."""
        address = literal(self.host)
        return address.is_loopback if address else f".{self.host}".endswith(".localhost")


class Destinations:
    """Where a stranger's URL may lead: to the internet, by https.

    Args:
        allowed: Configured base URLs. One on loopback (`http://127.0.0.1:54321`, `https://localhost`) makes its exact
            origin reachable, by http too. Of any other only a port besides 443 counts, if it is https.
        resolve: Looks names up.

    Raises:
        Misconfigured: If one of `allowed` is no URL.
    """

    def __init__(self, allowed: Iterable[str], *, resolve: Resolve | None = None) -> None:
        origins = {Origin.of(_configured(url)) for url in allowed}
        self._local = {origin for origin in origins if origin.is_loopback and origin.scheme in _PORTS}
        self._remote = {origin for origin in origins - self._local if origin.scheme == "https"}
        self._resolve = resolve or _look_up

    async def check(self, url: str, *, timeout: timedelta, what: str) -> None:
        """Refuses what we would not connect to, where somebody else will connect on our behalf.

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
                await self.addresses(self.origin(parsed(url)))
        except TimeoutError as error:
            reason = f"its name was not found within {timeout.total_seconds():g} s."
            raise Retryable(f"{what} cannot be used: {reason}", code="invalid_request", hint=_OTHER_HOOK) from error
        except Failure as failure:
            raise failure.error(
                f"{what} cannot be used: {failure.reason}", code="invalid_request", hint=_OTHER_HOOK
            ) from failure.__cause__

    def origin(self, url: httpx.URL) -> Origin:
        """The origin of a URL that may be connected to, as far as that can be said without asking anybody.

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
        """Where to connect to. One bad address among good ones is somebody's trick, so it spoils them all.

        Raises:
            Failure: If there is none, or one that is not to be asked.
        """
        own = literal(origin.host)
        try:
            answers = [str(own)] if own else await self._resolve(origin.host, origin.port)
        except OSError as error:
            raise Failure(f"{origin.host} was not found.", AGAIN, Retryable) from error
        addresses: list[Address] = []
        for answer in dict.fromkeys(answers):
            address = literal(answer)
            if address is None or not (address.is_loopback if origin in self._local else is_public(address)):
                raise Failure(f"{origin.host} is not a public address.", OTHER_URL)
            addresses.append(address)
        if not addresses:
            raise Failure(f"{origin.host} was not found.", AGAIN, Retryable)
        return addresses[:_MAX_ADDRESSES]


def parsed(url: str, relative_to: httpx.URL | None = None) -> httpx.URL:
    """Reads a URL. The parser's own message quotes from it, tokens included, so it is not kept.

    Raises:
        Failure: If it is none.
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
