"""Attacks by a user-supplied URL (SSRF), against real servers on loopback.

All of 127.0.0.0/8 is this machine, so a name can have several addresses with a server of its own on each.
"""

import ssl
from datetime import timedelta
from pathlib import Path

import pytest
import trustme

from daemon.errors import Refused
from daemon.fetch.client import MAX_REDIRECTS, Fetcher
from tests.support.hostile_servers import (
    PICTURE,
    SECRET,
    Names,
    certified,
    chunked,
    fetch,
    http,
    moved,
    not_asked,
    refused,
    retryable,
    serving,
)

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
