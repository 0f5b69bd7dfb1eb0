"""Responses to a fetch: which are the image, how large it may be, and when a result of a provider is asked for again."""

import asyncio
import gzip
import zlib
from datetime import timedelta
from pathlib import Path

import pytest

from daemon.errors import Refused, Retryable
from daemon.fetch.client import Fetcher, NotAnImage
from tests.support.hostile_servers import (
    PICTURE,
    SECRET,
    Visit,
    chunked,
    fetch,
    http,
    nothing_left,
    refused,
    retryable,
    serving,
)

# The response


@pytest.mark.parametrize("status", ["201 Created", "204 No Content", "206 Partial Content", "300 Multiple Choices"])
async def test_a_response_that_is_not_the_image_is_refused(to: Path, status: str) -> None:
    async with serving(http(status, b"")) as server:
        assert f"127.0.0.1 answered {status[:3]}." in await refused(server.url, to, server.url)


@pytest.mark.parametrize(
    "status",
    [
        "302 Found",
        "304 Not Modified",
        "400 Bad Request",
        "401 Unauthorized",
        "403 Forbidden",
        "404 Not Found",
        "410 Gone",
    ],
)
async def test_an_image_that_is_not_there_is_refused(to: Path, status: str) -> None:
    async with serving(http(status, b"")) as server:
        assert f"127.0.0.1 answered {status[:3]}." in await refused(f"{server.url}/?{SECRET}", to, server.url)


async def test_a_refused_response_is_not_read_any_longer(to: Path) -> None:
    async def talk(visit: Visit) -> None:
        await visit.say(http("404 Not Found", b"", content_length=1000))
        await visit.stay()

    async with serving(talk) as server, Fetcher([server.url]) as fetcher:
        with pytest.raises(Refused):
            await fetcher.fetch(server.url, to, max_bytes=1_000_000, timeout=timedelta(seconds=20))
        await server.left.wait()


@pytest.mark.parametrize(
    "status", ["408 Timeout", "429 Too Many", "500 Error", "502 Bad Gateway", "503 Unavailable", "599 ?"]
)
async def test_trouble_on_the_other_side_is_tried_again(to: Path, status: str) -> None:
    async with serving(http(status, b"")) as server:
        assert f"answered {status[:3]}." in await retryable(f"{server.url}/?{SECRET}", to, server.url)


@pytest.mark.parametrize("media_type", [None, "", "text/html", "application/json", "multipart/x-mixed-replace"])
async def test_first_bytes_decide_and_not_the_content_type(to: Path, media_type: str | None) -> None:
    async with serving(http(content_type=media_type)) as server:
        assert await fetch(server.url, to, server.url) == PICTURE


@pytest.mark.parametrize("body", [b"<html>Wait</html>", b"{}", b"", b"<svg/>", bytes(1000), PICTURE[1:]])
async def test_body_that_is_no_image_is_refused(to: Path, body: bytes) -> None:
    async with serving(http(body=body)) as server:
        assert "not an image" in await refused(server.url, to, server.url)
    assert nothing_left(to)


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity, gzip", "br", None])
async def test_compression_is_undone_whatever_the_headers_say(to: Path, encoding: str | None) -> None:
    async with serving(http(body=gzip.compress(PICTURE), content_encoding=encoding)) as server:
        assert await fetch(server.url, to, server.url) == PICTURE


@pytest.mark.parametrize("body", [zlib.compress(PICTURE), gzip.compress(gzip.compress(PICTURE))])
async def test_deflate_and_two_layers_are_undone(to: Path, body: bytes) -> None:
    async with serving(http(body=body)) as server:
        assert await fetch(server.url, to, server.url) == PICTURE


async def test_image_that_is_said_to_be_compressed_is_saved(to: Path) -> None:
    async with serving(http(content_encoding="gzip")) as server:
        assert await fetch(server.url, to, server.url) == PICTURE


async def test_a_compressed_bomb_is_cut_off(to: Path) -> None:
    async with serving(http(body=gzip.compress(PICTURE + bytes(10_000_000)))) as server:
        assert "larger than 1 MB" in await refused(server.url, to, server.url)


async def test_compressed_body_that_breaks_off_is_tried_again(to: Path) -> None:
    async with serving(http(body=gzip.compress(PICTURE)[:-9])) as server:
        assert "compressed" in await retryable(server.url, to, server.url)


# Results of providers


async def fetch_result(url: str, to: Path, seconds: float) -> bytes:
    async with Fetcher([url]) as fetcher:
        await fetcher.fetch_result(url, to, max_bytes=1_000_000, deadline=timedelta(seconds=seconds))
    return await asyncio.to_thread(to.read_bytes)


@pytest.mark.parametrize(
    "before", [http("404 Not Found", b""), http("503 Busy", b""), http(body=b"<html>Wait</html>"), b"HTTP/1.1"]
)
async def test_result_that_is_not_there_yet_is_asked_for_again(to: Path, before: bytes) -> None:
    async with serving(before, http()) as server:
        assert await fetch_result(server.url, to, 5) == PICTURE
        assert len(server.asked) == 2


async def test_result_that_never_comes_ends_with_its_deadline(to: Path) -> None:
    async with serving(http("404 Not Found", b"")) as server:
        with pytest.raises(Retryable) as caught:
            await fetch_result(server.url, to, 0)
        assert len(server.asked) == 1
    assert caught.value.code == "download"
    assert "previousImage" not in caught.value.hint + caught.value.message


async def test_result_that_is_no_image_we_take_is_kept(to: Path) -> None:
    async with serving(http(body=b"\xff\x0a a JPEG XL")) as server:
        with pytest.raises(NotAnImage) as caught:
            await fetch_result(server.url, to, 0)
    assert caught.value.path.read_bytes() == b"\xff\x0a a JPEG XL"


async def test_page_instead_of_a_result_leaves_no_file(to: Path) -> None:
    async with serving(http(body=b"<html>Wait</html>")) as server:
        with pytest.raises(Retryable):
            await fetch_result(server.url, to, 0)
    assert nothing_left(to)


async def test_result_at_a_bad_address_is_asked_for_never(to: Path) -> None:
    async with Fetcher([]) as fetcher:
        with pytest.raises(Refused):
            await fetcher.fetch_result("https://10.0.0.1/a.png", to, max_bytes=1, deadline=timedelta(minutes=1))


# Sizes


async def test_an_image_of_just_the_largest_size_is_saved(to: Path) -> None:
    async with serving(http()) as server:
        assert await fetch(server.url, to, server.url, max_bytes=len(PICTURE)) == PICTURE


async def test_too_large_content_length_is_refused_at_once(to: Path) -> None:
    async with serving(http(body=b"", content_length=10**15)) as server:
        assert "larger than 1 MB" in await refused(server.url, to, server.url)


async def test_a_body_without_end_is_cut_off(to: Path) -> None:
    async def endless(visit: Visit) -> None:
        await visit.say(http(body=b"", content_length=None))
        while True:
            await visit.say(bytes(1 << 16))

    async with serving(endless) as server:
        assert "larger than 1 MB" in await refused(server.url, to, server.url)
        await server.left.wait()


async def test_one_byte_too_many_in_chunks_is_refused(to: Path) -> None:
    async with serving(chunked(PICTURE, b"!")) as server:
        assert "larger than" in await refused(server.url, to, server.url, max_bytes=len(PICTURE))
