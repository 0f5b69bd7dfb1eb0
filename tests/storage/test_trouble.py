"""Uploads to a Storage in trouble: tried again while it passes, given up at a final refusal."""

import asyncio
import resource
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.errors import ImageJobsError, Refused, Retryable
from daemon.storage.client import Storage
from daemon.storage.errors import retry_after
from tests.support.postgres import wait_until
from tests.support.servers import scripted
from tests.support.storage_responses import DOWN, OK, QUICK, of_storage, read_request, response


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300_000))
    return path


async def test_an_outage_is_bridged(image: Path) -> None:
    connections = 0

    async def down_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(response("200 OK", OK) if connections > 2 else response("503 Service Unavailable", DOWN))

    async with scripted(down_twice) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        assert await storage.upload("a.png", image, content_type="image/png") == 3
        assert (storage.uploads_tried, storage.uploads_failed) == (3, 2)


async def test_the_third_failure_is_the_last_without_patience(image: Path) -> None:
    async def down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(response("503 Service Unavailable", DOWN))

    async with scripted(down) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        with pytest.raises(Retryable, match="status 503") as caught:
            await storage.upload("a.png", image, content_type="image/png")
    assert caught.value.code == "storage_unavailable"
    assert caught.value.data["uploadTries"] == 3


LATER = {
    "an object store that is away": ("500 Internal Server Error", of_storage("500", "Internal")),
    "a lock timeout inside Storage": ("400 Bad Request", of_storage("423", "LockTimeout")),
    "too many connections": ("429 Too Many Requests", of_storage("429", "too_many_connections")),
    "a database timeout": ("544 Database Timeout", of_storage("544", "DatabaseTimeout")),
    "a maintenance page": ("200 OK", b"<html>We will be back soon</html>"),
    "an empty response": ("200 OK", b""),
    "another's JSON": ("200 OK", b'{"status": "ok"}'),
    "another's list": ("200 OK", b"[1]"),
    "a gateway without a route": ("404 Not Found", b'{"message": "no Route matched with those values"}'),
    "a gateway's page": ("403 Forbidden", b"<html>checking your browser</html>"),
}


@pytest.mark.parametrize("trouble", LATER)
async def test_passing_trouble_is_tried_until_patience_ends(image: Path, trouble: str) -> None:
    tries, notices = 0, 0

    async def down_for_long(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        await read_request(reader)
        writer.write(response("200 OK", OK) if tries > 6 else response(*LATER[trouble]))

    def notice() -> None:
        nonlocal notices
        notices += 1

    async with scripted(down_for_long) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        sent = storage.upload("a.png", image, content_type="image/png", patience=lambda: 5.0, waiting=notice)
        assert await sent == 7
    assert notices == 1


async def test_pauses_grow_until_patience_ends(image: Path) -> None:
    at: list[float] = []
    started = time.monotonic()

    async def down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at.append(time.monotonic())
        await read_request(reader)
        writer.write(response("503 Service Unavailable", DOWN))

    options = {"timeout": timedelta(seconds=5), "first_wait": timedelta(milliseconds=40)}
    async with scripted(down) as url, Storage(url, "key", bucket="images", **options) as storage:
        with pytest.raises(Retryable):
            await storage.upload(
                "a.png", image, content_type="image/png", patience=lambda: started + 1.0 - time.monotonic()
            )
    assert 4 <= len(at) <= 6
    assert at[-1] - started >= 1.0  # the last try is made when patience ends
    assert at[3] - at[2] > at[1] - at[0]


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_is_honoured(image: Path, form: str) -> None:
    at: list[float] = []
    asked = 1 if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)

    async def busy_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at.append(time.monotonic())
        await read_request(reader)
        busy = response(f"429 Too Many Requests\r\nretry-after: {asked}", of_storage("429", "too_many_connections"))
        writer.write(response("200 OK", OK) if len(at) > 1 else busy)

    async with scripted(busy_once) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        assert await storage.upload("a.png", image, content_type="image/png", patience=lambda: 60.0) == 2
    assert at[1] - at[0] >= 0.5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5),
        (" 5 ", 5),
        ("0", 0),
        ("86400", 60),
        ("9" * 400, 60),
        ("Sat, 28 Nov 2026 00:00:07 GMT", 7),
        ("Saturday, 28-Nov-26 00:00:07 GMT", 7),
        ("Fri, 27 Nov 2026 00:00:00 GMT", 0),
        ("Sat, 28 Nov 9999 00:00:07 GMT", 60),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("\N{ARABIC-INDIC DIGIT FIVE}", None),
    ],
)
def test_retry_after_is_read_and_capped(value: str, seconds: float | None) -> None:
    found = retry_after(value, datetime(2026, 11, 28, tzinfo=UTC))
    assert found == (None if seconds is None else timedelta(seconds=seconds))


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,6} \d\d:\d\d:\d\d \S{0,5}"))
@settings(max_examples=50)
def test_any_retry_after_is_a_wait_or_none(value: str) -> None:
    """Domain: any text, and texts of a date's form with numbers out of range."""
    found = retry_after(value)
    assert found is None or timedelta(0) <= found <= timedelta(minutes=1)


FINAL = {
    "a gateway's 413": ("413 Content Too Large", b"<html>nginx</html>", "storage_too_large", "gateway"),
    "the bucket's 413": ("400 Bad Request", of_storage("413", "Payload too large"), "storage_too_large", "bucket"),
    "a gateway's 401": ("401 Unauthorized", b'{"message": "Invalid API key"}', "storage_unauthorized", "key"),
}


@pytest.mark.parametrize("refusal", FINAL)
async def test_final_refusal_ends_early_and_names_its_place(image: Path, refusal: str) -> None:
    status, body, code, place = FINAL[refusal]

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(response(status, body))

    async with scripted(refuse) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        with pytest.raises(Refused) as caught:
            await storage.upload("a.png", image, content_type="image/png", patience=lambda: 60.0)
    assert (caught.value.code, caught.value.data["uploadTries"]) == (code, 1)
    assert place in caught.value.message
    assert "<html>" not in str(vars(caught.value))
    assert {"gateway": "bucket", "bucket": "gateway"}.get(place, "<html>") not in caught.value.message


async def test_running_out_of_file_descriptors_is_waited_for(image: Path) -> None:
    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(response("200 OK", OK))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with scripted(take) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            sending = asyncio.create_task(
                storage.upload("a.png", image, content_type="image/png", patience=lambda: 60.0)
            )
            await wait_until(lambda: storage.uploads_failed >= 4)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await sending > 4


async def test_probe_finds_an_object_store_that_is_away() -> None:
    async def away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_request(reader)
        uploads = head.startswith(b"post /storage/v1/object")
        failure = response("500 Internal Server Error", of_storage("500", "Internal"))
        writer.write(failure if uploads else response("200 OK", b'{"id":"images","name":"images","public":true}'))

    async with scripted(away) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        with pytest.raises(Retryable):
            await storage.probe()


async def test_a_server_that_hangs_is_given_up(image: Path) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with scripted(hang) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        with pytest.raises(Retryable) as caught:
            await storage.upload("a.png", image, content_type="image/png")
    assert caught.value.code == "storage_timeout"


@pytest.mark.parametrize("error", [ssl.SSLError(1, "[SSL] record layer failure"), anyio.EndOfStream()])
async def test_broken_tls_is_bridged(image: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP library lets these through as they are."""
    broken = [error]
    send = httpx.AsyncHTTPTransport.handle_async_request

    async def once_broken(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        if broken:
            raise broken.pop()
        return await send(transport, request)

    async def up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(response("200 OK", OK))

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", once_broken)
    async with scripted(up) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        assert await storage.upload("a.png", image, content_type="image/png") == 2


@pytest.mark.parametrize("error", [ssl.SSLError(1, "[SSL] record layer failure"), anyio.EndOfStream()])
async def test_broken_tls_is_named_by_the_check(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        raise error

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", broken)
    async with Storage("https://project.supabase.co", "key", bucket="images") as storage:
        with pytest.raises(ImageJobsError, match="Storage cannot be reached"):
            await storage.check()
        assert await storage.visibility() is None


async def test_visibility_is_unknown_of_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    monkeypatch.setattr("daemon.storage.client.VISIBILITY_TIMEOUT", 0.1)
    async with scripted(hang) as url, Storage(url, "key", bucket="images") as storage, asyncio.timeout(5):
        assert await storage.visibility() is None


async def test_a_cut_connection_is_bridged(image: Path) -> None:
    connections = 0

    async def cut_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            await reader.readexactly(100_000)
            writer.transport.abort()
            return
        await read_request(reader)
        writer.write(response("200 OK", OK))

    async with scripted(cut_once) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        assert await storage.upload("a.png", image, content_type="image/png") == 2
