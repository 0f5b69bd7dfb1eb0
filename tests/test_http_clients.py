"""Proxies and certificates as container hosts inject them."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import httpx2
import pytest
import trustme
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from daemon.errors import Misconfigured
from daemon.fetch.client import Fetcher
from daemon.http_clients import client, client2
from daemon.proxies import Direct, Proxies

NO_PROXY = "localhost, 127.0.0.1,,::1/128,fd00::/8,10.0.0.0/8,[fe80::1]:8080,.svc,*.internal,example.com:8443 metadata"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("SSL_CERT"):
            monkeypatch.delenv(name)


@asynccontextmanager
async def proxy() -> AsyncIterator[tuple[str, list[str]]]:
    """Serve a proxy that says 204 to everything; yields its address and the request lines it got."""
    got: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode())
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", got


@pytest.mark.parametrize("make", [client, client2])
@pytest.mark.parametrize("names", [("HTTP_PROXY", "NO_PROXY"), ("http_proxy", "no_proxy"), ("ALL_PROXY", "NO_PROXY")])
async def test_requests_take_the_proxy(make, names, monkeypatch):
    async with proxy() as (address, got), proxy() as (direct, got_directly):
        monkeypatch.setenv(names[0], f" http://me:secret@{address}/\n")
        monkeypatch.setenv(names[1], NO_PROXY)
        async with make(timeout=10) as http:
            assert (await http.get("http://example.com/a")).status_code == 204
            assert (await http.get(f"http://{direct}/b")).status_code == 204
    assert got == ["GET http://example.com/a HTTP/1.1"]
    assert got_directly == ["GET /b HTTP/1.1"]


@pytest.mark.parametrize("make", [client, client2])
async def test_https_asks_the_proxy_for_a_tunnel(make, monkeypatch):
    async with proxy() as (address, got):
        monkeypatch.setenv("HTTPS_PROXY", address)
        async with make(timeout=10) as http:
            with pytest.raises((httpx.TransportError, httpx2.TransportError)):
                await http.get("https://example.com/a")
    assert got == ["CONNECT example.com:443 HTTP/1.1"]


@pytest.mark.parametrize(
    ("host", "port", "covered"),
    [
        *(("localhost", 80, True), ("127.0.0.1", 80, True), ("127.0.0.2", 80, False), ("[::1]", 80, True)),
        *(("fd12::1", 443, True), ("fe80::1", 8080, True), ("fe80::1", 80, False), ("10.255.0.1", 1, True)),
        *(("a.svc", 80, True), ("svc", 80, False), ("a.b.internal", 80, True), ("METADATA.", 80, True)),
        *(("example.com", 8443, True), ("example.com", 443, False), ("a.example.com", 8443, True)),
        *(("notmetadata", 80, False), ("11.0.0.1", 80, False), ("::2", 80, False)),
    ],
)
def test_no_proxy_is_read_as_curl_does(host, port, covered):
    assert Direct.read(NO_PROXY).covers(host, port) is covered


def test_star_means_no_proxy_at_all(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nonsense://")
    monkeypatch.setenv("NO_PROXY", "localhost,*")
    assert Proxies.read().urls == {}


@pytest.mark.parametrize(
    "value",
    [
        "http://",
        "http://[::1",
        "http://proxy:port",
        "http://proxy:99999",
        "socks4://proxy",
        "http://pro xy",
        "ftp://p",
        "http://p\nx",
    ],
)
@pytest.mark.parametrize("make", [client, client2])
def test_proxy_that_is_none_is_a_sentence(make, value, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", value.replace("://", "://me:secret@"))
    with pytest.raises(Misconfigured, match="HTTPS_PROXY") as raised:
        make()
    assert "secret" not in raised.value.message + raised.value.hint


@pytest.mark.parametrize("make", [client, client2])
def test_socks_without_its_package_is_a_sentence(make, monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5h://proxy:1080")
    with pytest.raises(Misconfigured, match=r"all_proxy names a SOCKS proxy.*socksio"):
        make()


@pytest.mark.parametrize("make", [client, client2, lambda: Fetcher([])])
@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_missing_certificates_are_a_sentence(make, name, monkeypatch):
    monkeypatch.setenv(name, "/nowhere")
    with pytest.raises(Misconfigured, match=f"{name} names .* not there"):
        make()


@pytest.mark.parametrize("make", [client, client2])
async def test_certificate_file_is_used(make, tmp_path, monkeypatch):
    file = tmp_path / "ca.pem"
    file.write_text("rubbish")
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(Misconfigured, match="SSL_CERT_FILE names a file without certificates"):
        make()
    trustme.CA().cert_pem.write_to_path(str(file))
    await make().aclose()


@given(
    st.one_of(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
        st.lists(
            st.sampled_from([",", "::1", "/128", "[", "]", ":", "80", "*", ".", "a", "10.0.0.0", "/8", " ", "://"])
        ).map("".join),
    )
)
@examples(max_examples=300, deadline=None)
def test_any_no_proxy_is_understood(text):
    """Any text of up to 30 characters that an environment can hold, and any sequence of pieces of entries."""
    direct = Direct.read(text)
    for host in ("example.com", "::1", "10.0.0.1", "[fe80::1%eth0]", ""):
        direct.covers(host, 443)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30), st.booleans())
@examples(max_examples=60, deadline=None)
def test_any_proxy_is_a_client_or_a_sentence(text, begun):
    """Any text of up to 30 characters that an environment can hold, with and without http:// before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTPS_PROXY", f"http://{text}" if begun else text)
        for make in (client, client2):
            try:
                make()
            except Misconfigured as error:
                assert len(text) < 9 or text not in error.message + error.hint
