"""Attacks by a user-supplied URL (SSRF), against real servers on loopback.

All of 127.0.0.0/8 is this machine, so a name can have several addresses with a server of its own on each.
"""

import asyncio
import gzip
import ssl
import zlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import trustme

from daemon.errors import Refused, Retryable
from daemon.fetch.client import MAX_REDIRECTS, Fetcher, NotAnImage
from tests.support.hostile_servers import (
    PICTURE,
    SECRET,
    Names,
    Response,
    Visit,
    chunked,
    fetch,
    http,
    moved,
    not_asked,
    nothing_left,
    refused,
    retryable,
    serving,
    unfit,
)


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "download"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    return tls


def certified(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(tls)
    return tls


# What is fetched


@pytest.mark.parametrize(
    "media_type", ["image/png", "IMAGE/WebP; x=y", "application/octet-stream", "binary/octet-stream"]
)
async def test_an_image_is_saved(to: Path, media_type: str) -> None:
    async with serving(http(content_type=media_type)) as server:
        assert await fetch(server.url, to, server.url) == PICTURE


async def test_a_chunked_image_of_any_size_is_saved(to: Path) -> None:
    pieces = [PICTURE * 50] * 6
    async with serving(chunked(*pieces)) as server:
        assert await fetch(server.url, to, server.url, max_bytes=10_000_000) == b"".join(pieces)


async def test_a_signed_url_is_asked_as_it_was_written(to: Path) -> None:
    path = "/a%2Fb+c.png?X-Sig=a%2Bb%3D&e=&x=1+2&u=%7e"
    async with serving(http()) as server:
        await fetch(f"{server.url}{path}#fragment", to, server.url)
        assert server.asked[0].startswith(f"GET {path} HTTP/1.1\r\n")


async def test_the_request_says_nothing_about_us(to: Path) -> None:
    async with serving(http()) as server:
        await fetch(server.url, to, server.url)
        assert server.headers() == {
            "host": f"127.0.0.1:{server.port}",
            "accept": "image/*",
            "accept-encoding": "identity",
            "user-agent": "image-job-orchestrator",
        }


async def test_a_proxy_in_the_environment_is_not_used(to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(http()) as server, serving(http("502 Bad Gateway")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        await fetch(server.url, to, server.url)
        assert not proxy.asked


async def test_an_earlier_file_is_replaced(to: Path) -> None:
    async with serving(http(body=PICTURE * 2), http()) as server:
        await fetch(server.url, to, server.url)
        assert await fetch(server.url, to, server.url) == PICTURE


# The connection


async def test_connects_to_the_checked_address_despite_dns_rebinding(to: Path) -> None:
    async with (
        serving(http(), host="127.0.0.2") as good,
        serving(http(body=b"evil"), host="127.0.0.3", port=good.port) as evil,
    ):
        names = Names({"localhost": [["127.0.0.2"], ["127.0.0.3"]]})
        base = f"http://localhost:{good.port}"
        assert await fetch(base, to, base, resolve=names) == PICTURE
        assert good.headers()["host"] == f"localhost:{good.port}"
        assert not evil.asked
    assert names.asked == [("localhost", good.port)]


async def test_tls_and_host_name_the_host_not_the_address(
    to: Path, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    tls = certified(authority, "images.localhost")
    asked_for: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _tls: asked_for.append(name)
    async with serving(http(), host="127.0.0.2", tls=tls) as server:
        base = f"https://images.localhost:{server.port}"
        names = Names({"images.localhost": [["127.0.0.2"]]})
        assert await fetch(base, to, base, resolve=names, tls=trusting) == PICTURE
        assert asked_for == ["images.localhost"]
        assert server.headers()["host"] == f"images.localhost:{server.port}"


async def test_a_certificate_of_another_name_is_refused(
    to: Path, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    async with serving(http(), tls=certified(authority, "other.localhost", "127.0.0.1")) as server:
        base = f"https://images.localhost:{server.port}"
        names = Names({"images.localhost": [["127.0.0.1"]]})
        assert "certificate" in await refused(base, to, base, resolve=names, tls=trusting)
        assert not server.asked


async def test_a_certificate_of_an_unknown_authority_is_refused(to: Path, authority: trustme.CA) -> None:
    async with serving(http(), tls=certified(authority, "127.0.0.1")) as server:
        assert "certificate" in await refused(server.url, to, server.url)


async def test_names_that_share_an_address_do_not_share_a_connection(
    to: Path, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    async with serving(http(), tls=certified(authority, "one.localhost")) as server:
        names = Names({"one.localhost": [["127.0.0.1"]], "two.localhost": [["127.0.0.1"]]})
        one, two = (f"https://{name}:{server.port}" for name in names.responses)
        async with Fetcher([one, two], resolve=names, tls=trusting) as fetcher:
            await fetcher.fetch(one, to, max_bytes=1_000_000, timeout=timedelta(seconds=20))
            with pytest.raises(Refused, match=r"two\.localhost has no valid certificate"):
                await fetcher.fetch(two, to, max_bytes=1_000_000, timeout=timedelta(seconds=20))


async def test_the_next_address_is_tried_when_one_cannot_be_reached(to: Path) -> None:
    async with serving(http(), host="127.0.0.3") as server:
        base = f"http://localhost:{server.port}"
        names = Names({"localhost": [["127.0.0.2", "127.0.0.3"]]})
        assert await fetch(base, to, base, resolve=names) == PICTURE


async def test_many_addresses_are_not_a_port_scan(to: Path) -> None:
    async with serving(http(), host="127.0.0.9") as server:
        base = f"http://localhost:{server.port}"
        names = Names({"localhost": [[f"127.0.0.{number}" for number in range(2, 10)]]})
        assert "cannot be reached" in await retryable(base, to, base, resolve=names)
        assert not server.asked


# Redirects


async def test_redirects_are_followed_to_the_image(to: Path) -> None:
    async with (
        serving(http()) as images,
        serving(moved("/b?c"), moved(f"{images.url}/d", "308 Permanent Redirect")) as server,
    ):
        assert await fetch(f"{server.url}/a/b?{SECRET}", to, server.url, images.url) == PICTURE
        assert [head.split(" ")[1] for head in server.asked + images.asked] == [f"/a/b?{SECRET}", "/b?c", "/d"]


async def test_a_redirect_takes_nothing_along(to: Path) -> None:
    async with serving(moved("/again"), http()) as server:
        await fetch(f"{server.url}/?{SECRET}", to, server.url)
        assert not {"cookie", "authorization", "referer"} & server.headers().keys()


async def test_redirects_come_to_an_end(to: Path) -> None:
    async with serving(moved("/again")) as server:
        assert "redirects" in await refused(server.url, to, server.url)
        assert len(server.asked) == 1 + MAX_REDIRECTS


@pytest.mark.parametrize(
    "location",
    [
        "http://host.example/",
        "//host.example/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://0x7f.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://inside.example/",
        "https://host.example:22/",
        f"https://user:{SECRET}@host.example/",
        "http://localhost/",
        "file:///etc/passwd",
        "data:image/png,x",
        "https://[",
        "http://[",
        "https://host.example:x/",
        "https://\u200b/",
    ],
)
async def test_a_redirect_is_checked_as_any_url_is(to: Path, location: str) -> None:
    async with serving(moved(location)) as server:
        await not_asked(server.url, to, server.url, resolve=Names({"inside.example": [["10.0.0.1"]]}))


async def test_a_redirect_to_another_port_of_this_machine_is_refused(to: Path) -> None:
    async with serving(http()) as inside, serving(moved(inside.url)) as server:
        await not_asked(server.url, to, server.url)
        assert not inside.asked


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
