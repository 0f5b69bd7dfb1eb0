"""Where a stranger's URL may lead: to the internet, by https, and nowhere else."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from daemon.errors import Misconfigured, Refused, Retryable
from daemon.fetch.destinations import Destinations
from tests.support.hostile_servers import (
    PICTURE,
    PUBLIC,
    SECRET,
    Names,
    fetch,
    http,
    nowhere,
    refused,
    retryable,
    serving,
    unfit,
)

# Where nobody goes


@pytest.mark.parametrize(
    "url",
    [
        "",
        "image.png",
        "//host.example/image.png",
        "https:///image.png",
        "https://",
        "http://host.example/image.png",
        "HTTP://host.example/image.png",
        "http://host.example:443/image.png",
        "ftp://host.example/image.png",
        "file:///etc/passwd",
        "data:image/png;base64,iVBORw0KGgo=",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "unix:///var/run/docker.sock",
    ],
)
async def test_only_https_is_spoken_with_foreign_servers(to: Path, url: str) -> None:
    await nowhere(url, to)


@pytest.mark.parametrize(
    "url",
    [
        f"https://{SECRET}@host.example/",
        f"https://user:{SECRET}@host.example/",
        f"https://user:{SECRET}@host.example:x/",
        "https://host.example@127.0.0.1/",
        "https://host.example\\@127.0.0.1/",
        "https://host.example%00@127.0.0.1/",
    ],
)
async def test_user_names_and_passwords_are_refused(to: Path, url: str) -> None:
    await nowhere(url, to)


@pytest.mark.parametrize(
    "port", ["0", "22", "80", "444", "5432", "6379", "8443", "65535", "65979", "99999", "-1", "443:22", "x"]
)
async def test_only_the_port_of_https_is_open(to: Path, port: str) -> None:
    await nowhere(f"https://host.example:{port}/", to)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1.",
        "127.0.0.1:443",
        "127.1",
        "127.0.1",
        "2130706433",
        "017700000001",
        "0177.0.0.1",
        "0x7f000001",
        "0X7F.0.0.1",
        "0x7f.1",
        "0x",
        "0",
        "0.0.0.0",
        "10.0.0.1",
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "168.63.129.16",
        "100.100.100.200",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "[fe80::1%25eth0]",
        "[fe80::1%eth0]",
        "[2606:4700::1111%25eth0]",
        "[fd00:ec2::254]",
        "[127.0.0.1]",
        "[::1",
        "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
        "\uff11\uff12\uff17.0.0.1",
        "127\u30020\u30020\u30021",
        "127%2e0%2e0%2e1",
        "%6cocalhost",
        "\u24dbocalhost",
    ],
)
async def test_no_spelling_of_an_inside_address_is_accepted(to: Path, host: str) -> None:
    await nowhere(f"https://{host}/", to)


@pytest.mark.parametrize(
    "host",
    [
        "a..b",
        ".example",
        "host.example..",
        "a b.example",
        "a\tb",
        "a\nb",
        "a\\b.example",
        "*.example",
        "-a.example",
        "xn--",
        "\u200bhost.example",
        "a" * 64 + ".example",
        "a." * 127 + "example",
        "1.2.3.4.5",
        "host.0x1f",
        "host.1",
    ],
)
async def test_malformed_host_names_are_not_looked_up(to: Path, host: str) -> None:
    await nowhere(f"https://{host}/", to)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost."])
async def test_names_of_this_machine_are_refused(to: Path, host: str) -> None:
    assert "localhost is not a public address" in await refused(f"https://{host}/", to, resolve=None)
    assert "localhost is not a public address" in (await unfit(f"https://{host}/", resolve=None)).message


@pytest.mark.parametrize(
    "responses",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1%eth0"],
        ["2130706433"],
        [PUBLIC, "127.0.0.1"],
        ["127.0.0.1", PUBLIC],
        [PUBLIC, PUBLIC, PUBLIC, PUBLIC, PUBLIC, "192.168.0.1"],
    ],
)
async def test_one_private_address_among_public_ones_refuses_all(to: Path, responses: list[str]) -> None:
    names = Names({"host.example": [responses]})
    message = await refused(f"https://host.example/?{SECRET}", to, resolve=names)
    assert message == "Cannot download the image: host.example is not a public address."
    assert names.asked == [("host.example", 443)]
    error = await unfit(f"https://host.example/?{SECRET}", resolve=names)
    assert isinstance(error, Refused)
    assert error.message == "metadata.webhookUrl cannot be used: host.example is not a public address."


@pytest.mark.parametrize("responses", [{}, {"host.example": [[]]}])
async def test_an_address_that_is_not_found_may_be_there_later(responses: dict[str, list[Sequence[str]]]) -> None:
    error = await unfit(f"https://host.example/?{SECRET}", resolve=Names(responses))
    assert isinstance(error, Retryable)
    assert error.message == "metadata.webhookUrl cannot be used: host.example was not found."


async def test_an_address_on_the_internet_may_be_given_to_others() -> None:
    destinations = Destinations([], resolve=Names({"host.example": [[PUBLIC, "2606:4700::1111"]]}))
    for host in ("host.example", PUBLIC, "[2606:4700::1111]"):
        await destinations.check(f"https://{host}/hook?{SECRET}", timeout=timedelta(seconds=20), what="a webhook")


async def test_a_name_beyond_ascii_is_looked_up_as_dns_spells_it(to: Path) -> None:
    names = Names({})
    await retryable("https://Bücher.example./", to, resolve=names)
    assert names.asked == [("xn--bcher-kva.example", 443)]


# What the configuration opens


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:{other}/", "http://localhost:{port}/", "https://127.0.0.1:{port}/", "http://127.0.0.2:{port}/"],
)
async def test_only_the_exact_origin_that_is_configured_is_open(to: Path, url: str) -> None:
    async with serving(http()) as server:
        await nowhere(url.format(port=server.port, other=server.port - 1), to, server.url)
        assert not server.asked


async def test_the_configured_origin_is_known_in_any_spelling(to: Path) -> None:
    async with serving(http()) as server:
        names = Names({"localhost": [["127.0.0.1"]]})
        base = f"http://localhost:{server.port}/storage/v1"
        assert await fetch(f"HTTP://LocalHost.:{server.port}/", to, base, resolve=names) == PICTURE


async def test_a_configured_localhost_that_leads_elsewhere_is_refused(to: Path) -> None:
    names = Names({"localhost": [["127.0.0.1", "10.0.0.1"]]})
    await nowhere("http://localhost:9/", to, "http://localhost:9", resolve=names)


@pytest.mark.parametrize("base", ["http://host.example:8000", "http://10.0.0.1:8000", "https://10.0.0.1:8000"])
async def test_configured_address_opens_nothing_but_loopback(to: Path, base: str) -> None:
    await nowhere(f"{base}/image.png", to, base)


async def test_configured_https_port_is_open_for_its_host_alone(to: Path) -> None:
    names = Names({"host.example": [["10.0.0.1"]], "other.example": [["10.0.0.1"]]})
    base = "https://host.example:8443"
    assert "not a public address" in await refused(f"{base}/a.png", to, base, resolve=names)
    assert "port 8443" in await refused("https://other.example:8443/a.png", to, base, resolve=names)


async def test_a_configured_address_that_is_no_url_is_said_at_once() -> None:
    with pytest.raises(Misconfigured):
        Destinations(["http://127.0.0.1:port"])
