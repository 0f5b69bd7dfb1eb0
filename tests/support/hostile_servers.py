"""Servers and names that strangers may have, on loopback, and how what they try with a URL ends.

All of 127.0.0.0/8 is this machine, so a name can have several addresses with a server of its own on each.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from daemon.errors import Refused, Retryable, RunError
from daemon.fetch.client import Fetcher
from daemon.fetch.destinations import Destinations, Resolve

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
PUBLIC = "93.184.215.14"
SECRET = "token=s3cret"


@dataclass
class Visit:
    """A connection that waits for its response."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    left: asyncio.Event

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def stay(self) -> None:
        """Send nothing more, until the client closes the connection."""
        with suppress(ConnectionError):
            await self.reader.read()
        self.left.set()


Response = Callable[[Visit], Awaitable[None]]


@dataclass
class Server:
    """A server on loopback, and the requests it received."""

    url: str
    port: int
    asked: list[str] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def headers(self) -> dict[str, str]:
        """Return the headers of the last request."""
        lines = self.asked[-1].split("\r\n")[1:-2]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


@asynccontextmanager
async def serving(
    *responses: bytes | Response, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    """Serve `responses`, one for each request; the last one is for every further request, too."""

    async def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server.asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
            response = responses[min(len(server.asked), len(responses)) - 1]
            visit = Visit(reader, writer, server.left)
            await (visit.say(response) if isinstance(response, bytes) else response(visit))
        except (ConnectionError, asyncio.IncompleteReadError):
            server.left.set()
        finally:
            writer.close()

    listener = await asyncio.start_server(visited, host, port, ssl=tls)
    bound = listener.sockets[0].getsockname()[1]
    server = Server(f"{'https' if tls else 'http'}://{host}:{bound}", bound)
    async with listener:
        yield server


def http(status: str = "200 OK", body: bytes = PICTURE, **headers: Any) -> bytes:
    """Return a response. A header that is None is left out."""
    pairs = {"content_type": "image/png", "content_length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in pairs.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def moved(location: str, status: str = "302 Found") -> bytes:
    return http(status, b"", location=location, set_cookie="session=stolen; Path=/")


def chunked(*chunks: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return http(body=body, content_length=None, transfer_encoding="chunked")


@dataclass
class Names:
    """A name server. Every look-up takes the next of a name's responses; the last one stays."""

    responses: dict[str, list[Sequence[str]]]
    asked: list[tuple[str, int]] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        if host not in self.responses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        responses = self.responses[host]
        return responses.pop(0) if len(responses) > 1 else responses[0]


async def nobody(host: str, port: int) -> Sequence[str]:
    pytest.fail(f"{host} was looked up")


async def fetch(
    url: str,
    to: Path,
    *allowed: str,
    max_bytes: int = 1_000_000,
    seconds: float = 20,
    resolve: Resolve | None = nobody,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    async with Fetcher(allowed, resolve=resolve, tls=tls) as fetcher:
        await fetcher.fetch(url, to, max_bytes=max_bytes, timeout=timedelta(seconds=seconds))
    return await asyncio.to_thread(to.read_bytes)


def nothing_left(to: Path) -> bool:
    return not list(to.parent.iterdir())


async def failure(url: str, to: Path, *allowed: str, **options: Any) -> RunError:
    """The error that a fetch ends with, after what holds for every one of them."""
    with pytest.raises(RunError) as caught:
        await fetch(url, to, *allowed, **options)
    error = caught.value
    assert error.code == "download"
    assert re.fullmatch(r"Cannot download the image: .+\.", error.message)
    assert error.hint
    assert SECRET not in f"{error.message} {error.hint} {error.data}"
    assert nothing_left(to)
    return error


async def refused(url: str, to: Path, *allowed: str, **options: Any) -> str:
    error = await failure(url, to, *allowed, **options)
    assert isinstance(error, Refused)
    return error.message


async def not_asked(url: str, to: Path, *allowed: str, **options: Any) -> None:
    """It is refused for its URL: no connection was tried."""
    message = await refused(url, to, *allowed, **options)
    assert re.search(r"not https|malformed|user name|no valid host name|is not open|not a public address", message)


async def unfit(url: str, *allowed: str, resolve: Resolve | None = nobody, seconds: float = 20) -> RunError:
    """The error for an address that somebody else is to be sent to, after what holds for every one of them."""
    destinations = Destinations(allowed, resolve=resolve)
    with pytest.raises(RunError) as caught:
        await destinations.check(url, timeout=timedelta(seconds=seconds), what="metadata.webhookUrl")
    error = caught.value
    assert error.code == "invalid_request"
    assert error.hint
    assert SECRET not in f"{error.message} {error.hint} {error.data}"
    return error


async def nowhere(url: str, to: Path, *allowed: str, resolve: Resolve | None = nobody) -> None:
    """It is neither asked, nor is anybody else sent there, for the same reason."""
    message = await refused(url, to, *allowed, resolve=resolve)
    assert re.search(r"not https|malformed|user name|no valid host name|is not open|not a public address", message)
    error = await unfit(url, *allowed, resolve=resolve)
    assert isinstance(error, Refused)
    assert error.message == message.replace("Cannot download the image:", "metadata.webhookUrl cannot be used:")


async def retryable(url: str, to: Path, *allowed: str, **options: Any) -> str:
    error = await failure(url, to, *allowed, **options)
    assert isinstance(error, Retryable)
    return error.message


def certified(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    """Return the TLS of a server with a certificate for these names."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(tls)
    return tls
