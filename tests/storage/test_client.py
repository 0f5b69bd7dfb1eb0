"""Storage as the worker uses it: against the stand-in, and against servers that misbehave."""

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import asyncpg
import httpx
import pytest

from daemon.dev.supabase.keys import Keys, make_keys
from daemon.dev.supabase.storage import storage_app
from daemon.errors import ImageJobsError, Refused, Retryable, RunError
from daemon.storage.client import Storage
from daemon.storage.errors import public_key
from daemon.storage.keys import conversation_key_of, extra_key, object_key, preview_key, thumbnail_key
from daemon.storage.objects import ClaimLost
from tests.support.servers import scripted, served
from tests.support.storage_responses import DOWN, OK, QUICK, read_request, response

PNG = b"\x89PNG\r\n\x1a\n" + bytes(300_000)


@pytest.fixture
def keys() -> Keys:
    return make_keys("a secret of the tests, and of nobody else")


@pytest.fixture
async def pool(database: str) -> AsyncIterator["asyncpg.Pool[asyncpg.Record]"]:
    async with asyncpg.create_pool(database, min_size=1, max_size=4) as pool:
        yield pool


@pytest.fixture
async def url(pool: "asyncpg.Pool[asyncpg.Record]", tmp_path: Path, keys: Keys) -> AsyncIterator[str]:
    async with served(storage_app(pool, tmp_path / "storage", keys)) as url:
        yield url


@pytest.fixture
async def storage(url: str, keys: Keys) -> AsyncIterator[Storage]:
    async with Storage(url, keys.service_role_key, bucket="images", first_wait=timedelta(milliseconds=1)) as storage:
        yield storage


def a_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return a_file(tmp_path / "image.png", PNG)


def test_image_thumbnail_and_preview_lie_beside_each_other() -> None:
    assert object_key("w", "job_1", "png") == "w/job_1.png"
    assert thumbnail_key("w", "job_1") == "w/job_1.thumb.webp"
    assert preview_key("w", "job_1") == "w/job_1.preview.webp"
    assert extra_key("w", "job_1", 2, "png") == "w/job_1.2.png"


async def test_an_upload_can_be_seen_by_everyone(storage: Storage, image: Path) -> None:
    assert await storage.upload("w/1.png", image, content_type="image/png") == 1
    sha256 = hashlib.sha256(PNG).hexdigest()
    public = await storage.object_url("w/1.png", sha256)
    assert public.endswith(f"/storage/v1/object/public/images/w/1.png?v={sha256[:8]}")
    assert await storage.is_public(public)
    async with httpx.AsyncClient() as anybody:
        response = await anybody.get(public)
    assert response.content == PNG
    assert response.headers["content-type"] == "image/png"
    assert response.headers["cache-control"] == "max-age=31536000"


async def test_an_upload_replaces_what_was_there(storage: Storage, image: Path, tmp_path: Path) -> None:
    await storage.upload("w/1.png", image, content_type="image/png")
    await storage.upload("w/1.png", a_file(tmp_path / "newer", b"newer"), content_type="image/png")
    await storage.download("w/1.png", tmp_path / "back", max_bytes=100)
    assert bytes_of(tmp_path / "back") == b"newer"


async def test_metadata_of_an_object_is_found(storage: Storage, image: Path) -> None:
    assert await storage.find("w/1.png") is None
    metadata = {"request": "abc", "ticket": "7"}
    await storage.upload("w/1.png", image, content_type="image/png", metadata=metadata)
    found = await storage.find("w/1.png")
    assert found is not None
    assert (found.key, found.content_type, found.size) == ("w/1.png", "image/png", 300_008)
    assert found.metadata == metadata


async def test_nothing_is_public_that_is_not_there(storage: Storage) -> None:
    assert not await storage.is_public(await storage.object_url("w/none.png", "0" * 8))


async def test_stale_claim_writes_nothing(storage: Storage, image: Path) -> None:
    async def no() -> bool:
        return False

    with pytest.raises(ClaimLost):
        await storage.upload("w/1.png", image, content_type="image/png", may_write=no)
    assert await storage.find("w/1.png") is None
    assert storage.uploads_tried == 0


async def test_the_right_to_write_is_asked_for_before_each_try(image: Path) -> None:
    asked = iter([True, False])

    async def still_ours() -> bool:
        return next(asked)

    async def down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(response("503 Service Unavailable", DOWN))

    async with scripted(down) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
        with pytest.raises(ClaimLost):
            await storage.upload("a.png", image, content_type="image/png", may_write=still_ours)
        assert (storage.uploads_tried, storage.uploads_failed) == (1, 1)


async def test_probe_uploads_and_leaves_nothing(storage: Storage, db: "asyncpg.Connection[asyncpg.Record]") -> None:
    await storage.probe()
    assert await db.fetchval("select count(*) from storage.objects") == 0


async def test_missing_server_is_one_sentence(image: Path) -> None:
    async def unused(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async with scripted(unused) as url:
        pass
    async with Storage(url, "key", bucket="images", **QUICK) as storage:
        with pytest.raises(Retryable, match="cannot be reached") as caught:
            await storage.upload("a.png", image, content_type="image/png")
    assert caught.value.code == "storage_unreachable"


async def test_a_refused_upload_does_not_poison_the_next_request(image: Path) -> None:
    """As the real server: it refuses early, keeps the connection, and never reads the rest of the body."""
    refusal = b'{"statusCode":"413","error":"Payload too large","message":"The object exceeded ...","code":"E"}'

    async def refuse_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            writer.write(response("400 Bad Request", refusal))
        else:
            writer.write(response("200 OK", b'{"size":1}'))
        await asyncio.Event().wait()

    # With the usual time limit of a minute: a poisoned connection would be waited for.
    async with scripted(refuse_early) as url, Storage(url, "key", bucket="images") as storage, asyncio.timeout(5):
        with pytest.raises(Refused):
            await storage.upload("a.png", image, content_type="image/png")
        assert await storage.find("a.png") is not None


async def test_the_key_does_not_follow_a_redirect(image: Path, tmp_path: Path) -> None:
    visits = 0

    async def other_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        visits += 1

    async with scripted(other_server) as other:

        async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(response(f"307 Temporary Redirect\r\nlocation: {other}/", b""))

        async with scripted(redirect) as url, Storage(url, "key", bucket="images", **QUICK) as storage:
            with pytest.raises(Refused, match="307"):
                await storage.upload("a.png", image, content_type="image/png")
            with pytest.raises(RunError):
                await storage.download("a.png", tmp_path / "back", max_bytes=1000)
    assert visits == 0


async def refusal_of(storage: Storage, image: Path, content_type: str = "image/png") -> RunError:
    with pytest.raises(Refused) as caught:
        await storage.upload("w/1.png", image, content_type=content_type)
    assert caught.value.data["uploadTries"] == 1
    assert caught.value.message.endswith(".")
    assert caught.value.hint.endswith(".")
    return caught.value


async def test_a_missing_bucket_is_said_so(url: str, keys: Keys, image: Path) -> None:
    async with Storage(url, keys.service_role_key, bucket="pictures") as storage:
        assert (await refusal_of(storage, image)).code == "storage_no_bucket"
        with pytest.raises(Refused):
            await storage.find("w/1.png")


@pytest.mark.parametrize("which", ["anon", "garbage", "another project's"])
async def test_a_key_that_may_not_write_is_said_so(url: str, keys: Keys, image: Path, which: str) -> None:
    key = {"anon": keys.anon_key, "garbage": "garbage"}.get(which) or make_keys("x" * 32).service_role_key
    async with Storage(url, key, bucket="images") as storage:
        refusal = await refusal_of(storage, image)
        assert refusal.code == "storage_unauthorized"
        assert ("anon key" in refusal.message) == (which == "anon")
        assert key not in str(vars(refusal))
        with pytest.raises(RunError) as caught:
            await storage.probe()
        assert caught.value.code == "storage_unauthorized"


async def test_public_keys_are_known_by_their_role(keys: Keys) -> None:
    assert public_key(keys.anon_key) == "anon"
    assert public_key("sb_publishable_abc") == "publishable"
    assert public_key(keys.service_role_key) is None
    for other in ("sb_secret_abc", "", "a.b.c", "a.WzFd.c", "..", "é.é.é"):
        assert public_key(other) is None


async def test_an_image_over_the_bucket_s_limit_is_said_so(
    storage: Storage, image: Path, db: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    await db.execute("update storage.buckets set file_size_limit = 1000")
    assert (await refusal_of(storage, image)).code == "storage_too_large"


async def test_a_type_that_the_bucket_does_not_take_is_said_so(storage: Storage, image: Path) -> None:
    assert (await refusal_of(storage, image, "image/svg+xml")).code == "storage_type_refused"


async def test_a_download_stops_at_its_limit(storage: Storage, image: Path, tmp_path: Path) -> None:
    await storage.upload("w/1.png", image, content_type="image/png")
    with pytest.raises(Refused) as caught:
        await storage.download("w/1.png", tmp_path / "back", max_bytes=1000)
    assert caught.value.code == "image_too_large"


async def test_a_key_may_have_any_character_that_storage_allows(storage: Storage, image: Path, tmp_path: Path) -> None:
    key = "w/50? off & more.png"
    await storage.upload(key, image, content_type="image/png")
    assert storage.owns(await storage.object_url(key, "0" * 8)) == key
    await storage.download(key, tmp_path / "back", max_bytes=1_000_000)
    assert bytes_of(tmp_path / "back") == PNG


async def test_a_download_of_nothing_is_said_so(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        await storage.download("w/none.png", tmp_path / "back", max_bytes=1000)
    assert caught.value.code == "storage_missing"


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/storage/v1/object/public/images/w/1.png", "w/1.png"),
        ("/storage/v1/object/public/images/w/1.png?v=0123abcd", "w/1.png"),
        ("/storage/v1/object/public/images/w/a%20b.png", "w/a b.png"),
        ("/storage/v1/object/public/images/", None),
        ("/storage/v1/object/public/images/../secret/1.png", None),
        ("/storage/v1/object/public/images/%2e%2e/secret/1.png", None),
        ("/storage/v1/object/public/images2/w/1.png", None),
        ("/storage/v1/object/authenticated/image-sources/w/1.png", None),
        ("/storage/v1/object/sign/images/w/1.png?token=t", "w/1.png"),
        ("/storage/v1/object/authenticated/images/w/1.png", "w/1.png"),
        ("/storage/v1/object/info/images/w/1.png", None),
        ("/storage/v1/object/public/%69mages/w/1.png", None),
        ("/storage/v1/object/public/images//w/1.png", None),
        ("/storage//v1/object/public/images/w/1.png", None),
        ("/STORAGE/v1/object/public/images/w/1.png", None),
        ("/rest/v1/runs", None),
    ],
)
async def test_our_own_urls_are_known(path: str, key: str | None) -> None:
    async with Storage("https://project.supabase.co", "key", bucket="images") as storage:
        assert storage.owns(f"https://project.supabase.co{path}") == key
        assert storage.owns(f"https://PROJECT.supabase.co{path}") == key
        assert storage.owns(f"http://project.supabase.co{path}") is None
        assert storage.owns(f"https://project.supabase.co.evil.example{path}") is None
        assert storage.owns(f"https://project.supabase.co@evil.example{path}") is None


async def test_the_doctor_finds_nothing_wrong(storage: Storage) -> None:
    await storage.check()
    assert await storage.find("doctor/probe.png") is None


async def test_conversation_bucket_is_private_and_takes_no_images(
    url: str, keys: Keys, image: Path, tmp_path: Path
) -> None:
    said = a_file(tmp_path / "said.json", b'{"model": "a"}')
    async with Storage(url, keys.service_role_key, bucket="images-context") as conversations:
        assert await conversations.visibility() is False
        await conversations.upload("w/1.json", said, content_type="application/json")
        await conversations.download("w/1.json", tmp_path / "back", max_bytes=100)
        assert not await conversations.is_public(await conversations.object_url("w/1.json", "0" * 8))
        assert (await refusal_of(conversations, image)).code == "storage_type_refused"
    assert bytes_of(tmp_path / "back") == b'{"model": "a"}'
    async with Storage(url, keys.anon_key, bucket="images-context") as anybody:
        with pytest.raises(Refused):
            await anybody.download("w/1.json", tmp_path / "theirs", max_bytes=100)
        with pytest.raises(Refused):
            await anybody.upload("w/1.json", said, content_type="application/json")


@pytest.mark.parametrize(
    ("image", "conversation"),
    [
        ("w/job_1.png", "w/job_1.json"),
        ("other/job_1.png", None),
        ("w/job_1.thumb.webp", None),
        ("w/job_1.2.png", None),
        ("w/job_1", None),
        ("w/../w/job_1.png", None),
        ("job_1.png", None),
        ("/w/job_1.png", None),
        ("w/x/job_1.png", None),
    ],
)
def test_only_images_of_the_same_workflow_have_conversations(image: str, conversation: str | None) -> None:
    assert conversation_key_of(image, "w") == conversation


@pytest.mark.parametrize("bucket", ["images", "pictures"])
@pytest.mark.parametrize("role", ["anon", "service_role"])
async def test_the_doctor_finds_a_wrong_key_and_a_missing_bucket(url: str, keys: Keys, role: str, bucket: str) -> None:
    if (role, bucket) == ("service_role", "images"):
        bucket = "images2"
    key = keys.anon_key if role == "anon" else keys.service_role_key
    async with Storage(url, key, bucket=bucket) as storage:
        with pytest.raises(ImageJobsError) as caught:
            await storage.check()
    assert caught.value.hint


async def test_address_follows_the_visibility_of_the_bucket(
    storage: Storage, db: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    assert "/object/public/images/w/1.png?v=" in await storage.object_url("w/1.png", "0" * 64)
    await db.execute("update storage.buckets set public = false")
    assert not await storage.is_private()  # it was looked at a moment ago
    assert await storage.is_private(at_once=True)
    url = await storage.object_url("w/1.png", "0" * 64)
    assert "/object/authenticated/images/w/1.png?v=" in url
    assert storage.owns(url) == "w/1.png"


async def test_private_object_is_kept_by_no_cache_in_between(storage: Storage, url: str, image: Path) -> None:
    await storage.upload("w/1.png", image, content_type="image/png", private=True)
    async with httpx.AsyncClient() as http:
        control = (await http.get(f"{url}/storage/v1/object/public/images/w/1.png")).headers["cache-control"]
    assert {part.strip() for part in control.split(",")} == {"private", "max-age=600"}


async def test_visibility_that_fails_leaves_the_mode_as_it_was() -> None:
    async with Storage("http://127.0.0.1:9", "key", bucket="images", **QUICK) as storage:
        assert not await storage.is_private()
    async with Storage("http://127.0.0.1:9", "key", bucket="images", private=True, **QUICK) as storage:
        assert await storage.is_private()


async def test_the_doctor_finds_a_server_that_is_down() -> None:
    async with Storage("http://127.0.0.1:9", "key", bucket="images", **QUICK) as storage:
        with pytest.raises(ImageJobsError, match="cannot be reached"):
            await storage.check()


async def test_an_address_that_is_none_is_said_so() -> None:
    storage = Storage("project", "key", bucket="images")
    with pytest.raises(ImageJobsError, match="Supabase cannot be used"):
        await storage.open()
    await storage.aclose()


async def test_a_large_upload_leaves_memory_and_the_loop_alone(tmp_path: Path) -> None:
    """40 MB: Python's own memory grows by far less, and the loop is never kept for long."""
    large = a_file(tmp_path / "large.png", bytes(40_000_000))
    longest = 0.0

    async def ticks() -> None:
        nonlocal longest
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0)
            longest = max(longest, loop.time() - before)

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        left = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while left:
            left -= len(await reader.read(1 << 16))
        writer.write(response("200 OK", OK))

    async with scripted(swallow) as url, Storage(url, "key", bucket="images") as storage:
        ticking = asyncio.create_task(ticks())
        tracemalloc.start()
        try:
            await storage.upload("a.png", large, content_type="image/png")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            ticking.cancel()
    assert peak < 4_000_000
    assert longest < 0.2
