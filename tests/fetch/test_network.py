"""A network that is slow, silent or broken: a fetch ends in time, and says what it was."""

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path

import pytest
import trustme

from daemon.errors import Retryable
from tests.support.hostile_servers import (
    PICTURE,
    SECRET,
    Names,
    Response,
    Visit,
    certified,
    chunked,
    fetch,
    http,
    nothing_left,
    retryable,
    serving,
    unfit,
)

# The network


async def stay(visit: Visit) -> None:
    await visit.stay()


async def stay_after_the_headers(visit: Visit) -> None:
    await visit.say(http(body=b"", content_length=1000))
    await visit.stay()


async def stay_before_the_end(visit: Visit) -> None:
    await visit.say(http()[:-1])
    await visit.stay()


async def drip(visit: Visit) -> None:
    """Never silent for long, so that only a limit of the whole helps."""
    await visit.say(http(body=b"", content_length=None))
    leaving = asyncio.ensure_future(visit.stay())
    while not leaving.done():
        await visit.say(b".")
        await asyncio.wait([leaving], timeout=0.02)


@pytest.mark.parametrize("response", [stay, stay_after_the_headers, stay_before_the_end, drip])
async def test_the_time_limit_is_for_everything_together(to: Path, response: Response) -> None:
    async with serving(response) as server:
        message = await retryable(f"{server.url}/?{SECRET}", to, server.url, seconds=0.2)
        assert message == "Cannot download the image: it took longer than 0.2 s."
        await server.left.wait()


async def test_a_look_up_that_hangs_is_within_the_time_limit(to: Path) -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        return await asyncio.get_running_loop().create_future()

    assert "took longer" in await retryable("https://host.example/", to, resolve=hang, seconds=0.1)
    error = await unfit("https://host.example/", resolve=hang, seconds=0.1)
    assert isinstance(error, Retryable)
    assert error.message.endswith("its name was not found within 0.1 s.")


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"HTTP/1.1",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x02",
        http()[:-1],
        http()[: -len(PICTURE)],
        chunked(PICTURE)[:-5],
        http(content_length="-1"),
        http(content_length="1, 2"),
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000,
    ],
    ids=[
        "silence",
        "half a line",
        "ssh",
        "tls",
        "one byte less",
        "no body",
        "cut",
        "negative",
        "two lengths",
        "headers",
    ],
)
async def test_broken_responses_are_retried(to: Path, response: bytes) -> None:
    async with serving(response) as server:
        assert "connection" in await retryable(f"{server.url}/?{SECRET}", to, server.url)


async def test_a_host_that_cannot_be_reached_is_tried_again(to: Path) -> None:
    async with serving(http()) as server:
        pass
    assert "127.0.0.1 cannot be reached" in await retryable(f"{server.url}/?{SECRET}", to, server.url)


@pytest.mark.parametrize("responses", [{}, {"host.example": [[]]}])
async def test_a_name_that_is_not_found_is_tried_again(to: Path, responses: dict[str, list[Sequence[str]]]) -> None:
    message = await retryable(f"https://host.example/?{SECRET}", to, resolve=Names(responses))
    assert message == "Cannot download the image: host.example was not found."


async def test_a_handshake_that_fails_is_tried_again(to: Path, authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    tls = certified(authority, "127.0.0.1")
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    trusting.minimum_version = ssl.TLSVersion.TLSv1_3
    async with serving(http(), tls=tls) as server:
        assert "cannot be reached" in await retryable(server.url, to, server.url, tls=trusting)


async def test_cancelling_leaves_no_file_and_no_connection(to: Path) -> None:
    half_way = asyncio.Event()

    async def stop_half_way(visit: Visit) -> None:
        await visit.say(http(body=bytes(3 << 20), content_length=9 << 20))
        half_way.set()
        await visit.stay()

    async with serving(stop_half_way) as server:
        download = asyncio.create_task(fetch(server.url, to, server.url, max_bytes=10 << 20))
        await half_way.wait()
        download.cancel()
        with pytest.raises(asyncio.CancelledError):
            await download
        await server.left.wait()
    assert nothing_left(to)
